"""The CPU interpreter of Mosaic GPU kernels.

It executes FP8 kernels from jax 0.11 on; 0.10.2 cannot interpret a `wgmma` whose second operand is a transposed reference.
"""

from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.compat import JAX_VERSION

HAS_INTERPRETER = JAX_VERSION >= (0, 11)


def interpret_mode():
    """Runs every Mosaic GPU kernel that the block traces in the interpreter, with race detection."""
    return plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True))


def reset_interpreter() -> None:
    """Clears the interpreter's simulated memory: after a failed kernel it would poison the next one."""
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

    gpu_callbacks.reset_gpu_interpret_mode_state()


def races_found() -> bool:
    """Says whether the last interpreted kernel had a data race (jax 0.12 raises by itself as well)."""
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

    return bool(getattr(gpu_callbacks.get_races(), "races_found", False))
