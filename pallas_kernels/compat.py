"""Hides what differs between jax 0.10.2, 0.11 and 0.12, and says what the present device can run.

Mosaic GPU kernels of this package compile for sm_90a (Hopper) on all three versions.
"""

import jax
import jax.numpy as jnp
from jax._src import config as _config
from jax.experimental.pallas import mosaic_gpu as plgpu

JAX_VERSION: tuple[int, ...] = jax.__version_info__[:2]
H100_SMS = 132


def compiler_params(**kwargs) -> plgpu.CompilerParams:
    """Returns Mosaic GPU compiler parameters with warpgroup semantics, the default only from jax 0.11 on."""
    return plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup, **kwargs)


def swizzled(dtype, minor: int) -> tuple:
    """Returns the shared-memory transforms (8-row tiles, widest swizzle) of a buffer with `minor` elements per row."""
    itemsize = jnp.dtype(dtype).itemsize
    swizzle = plgpu.find_swizzle(minor * itemsize * 8)
    return (plgpu.TilingTransform((8, swizzle // itemsize)), plgpu.SwizzleTransform(swizzle))


def load_global(ref, layout) -> jax.Array:
    """Reads a small slice of global memory into registers of `layout`, without shared memory."""
    if JAX_VERSION < (0, 11):
        return plgpu.load(ref, (), layout=layout, optimized=False)
    return plgpu.load(ref, layout=layout, optimized=False)  # type: ignore[call-arg]


def interpreted() -> bool:
    """Says whether kernels that are traced now will run in the CPU interpreter."""
    return _config.pallas_tpu_interpret_mode_context_manager.value is not None


def num_sms() -> int:
    """Returns the number of SMs of the GPU that is traced for: of the device of the abstract mesh in use, else of this
    process's GPU, else of an H100."""
    abstract = jax.sharding.get_abstract_mesh().abstract_device
    if abstract is not None and abstract.num_cores:
        return abstract.num_cores
    return jax.devices()[0].core_count if jax.default_backend() == "gpu" else H100_SMS


def why_not_hopper() -> str | None:
    """Says why the default device cannot run an sm_90a kernel; None where it can, or where this process has no GPU.

    Without a GPU the kernel is still lowered for the platform "cuda", as in compiling ahead of time for a machine
    elsewhere, and that machine is taken to be a Hopper.
    """
    if jax.default_backend() != "gpu":
        return None
    capability = getattr(jax.devices()[0], "compute_capability", None)
    if capability == "9.0":
        return None
    return f"the kernel is compiled for compute capability 9.0 (H100, H200), the device has {capability}"
