"""Which implementation an op runs, and that every kernel lowers for CUDA on this jax, without any GPU package."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import compat
from pallas_kernels.dispatch import dispatch
from pallas_kernels.fp8_gemm.ops import fp8_gemm
from pallas_kernels.fp8_gemm.shapes import GemmShape
from pallas_kernels.fp8_grouped_gemm.shapes import GroupedShape
from pallas_kernels.mla_attention.shapes import AttentionShape
from pallas_kernels.mla_decode.shapes import DecodeShape
from pallas_kernels.quantize.ops import quantize
from pallas_kernels.quantize.shapes import QuantizeShape
from pallas_kernels.testing.workloads import workload

LOWERED = {
    "quantize_rows": ("quantize", QuantizeShape("", "quantize", 128, 256), {"scale": "ue8m0"}),
    "quantize_columns": ("quantize", QuantizeShape("", "quantize", 128, 256, (128, 1)), {}),
    "quantize_blocks": ("quantize", QuantizeShape("", "quantize", 128, 256, (128, 128)), {}),
    "swiglu_quantize": ("quantize", QuantizeShape("", "swiglu_quantize", 128, 256), {}),
    "quantize_transposed": ("quantize", QuantizeShape("", "quantize_transposed", 128, 256), {}),
    "requantize_transposed": ("quantize", QuantizeShape("", "requantize_transposed", 128, 256), {}),
    "fp8_gemm": ("fp8_gemm", GemmShape("", 128, 256, 512), {}),
    "fp8_gemm_wgrad": ("fp8_gemm", GemmShape("", 128, 256, 512, "1d1d", True), {}),
    "fp8_grouped_gemm": ("fp8_grouped_gemm", GroupedShape("", "contiguous", 2, 128, 256, 512), {}),
    "fp8_grouped_wgrad": ("fp8_grouped_gemm", GroupedShape("", "wgrad", 2, 128, 256, 512), {}),
    "grouped_gemm": ("grouped_gemm", GroupedShape("", "contiguous", 2, 128, 256, 512), {}),
    "grouped_gemm_dgrad": (
        "grouped_gemm",
        GroupedShape("", "contiguous", 2, 128, 256, 512),
        {"transpose_b": False},
    ),
    "grouped_wgrad": ("grouped_gemm", GroupedShape("", "wgrad", 2, 128, 256, 512), {}),
    "mla_attention": ("mla_attention", AttentionShape("", "forward", 1, 2, 256), {}),
    "mla_attention_backward": ("mla_attention", AttentionShape("", "backward", 1, 2, 256, 2), {}),
    "mla_decode": ("mla_decode", DecodeShape("", 2, 128, 2, 16, "fp8"), {}),
}
KERNELS = {"mla_attention_backward": 2, "mla_decode": 2}  # of an op, where it has several


def lowered_for_cuda(fn, *operands) -> str:
    return jax.jit(fn).trace(*operands).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("name", LOWERED)
def test_kernel_lowers_for_cuda(name):
    if name == "requantize_transposed" and compat.JAX_VERSION < (0, 11):
        pytest.skip("jax 0.10 searches half a minute for the layouts of this kernel")
    op, shape, options = LOWERED[name]
    fn, operands = workload(op, shape, **options).program()
    assert lowered_for_cuda(fn, *operands).count("mosaic_gpu_v2") == KERNELS.get(name, 1)


def test_platform_picks_the_implementation():
    x = jax.ShapeDtypeStruct((128, 128), jnp.bfloat16)
    assert "mosaic_gpu" in lowered_for_cuda(quantize, x)
    assert "mosaic_gpu" not in jax.jit(quantize).lower(x).as_text()
    ragged = jax.ShapeDtypeStruct((130, 100), jnp.bfloat16)
    assert "mosaic_gpu" in lowered_for_cuda(quantize, ragged)


def test_a_fallback_is_logged_once_where_the_program_is_for_cuda(caplog):
    x = jax.ShapeDtypeStruct((3, 7, 130), jnp.float16)  # a shape of this test only

    def anew():
        return lambda x: quantize(x)

    jax.jit(anew()).lower(x)
    assert not caplog.records
    for _ in range(2):
        assert "mosaic_gpu" not in lowered_for_cuda(anew(), x)
    [record] = caplog.records
    assert record.levelname == "WARNING"
    assert record.message == (
        "quantize of float16[3, 7, 130] runs without its GPU kernel: dtype float16; the kernel reads bfloat16 or float32"
    )


def test_what_notes_a_fallback_is_the_identity():
    """Gradients and batches go through it: an op with a refused shape is as differentiable as its XLA path."""
    square = lambda x: run(None, "reason", x * x) - 2  # noqa: E731
    assert float(jax.grad(square)(jnp.float32(3))) == 6
    assert jax.vmap(square)(jnp.arange(3.0)).tolist() == [0, 1, 4]


def run(implementation, unsupported=None, x=None):
    return dispatch(
        "op",
        implementation,
        np.float32(1) if x is None else x,
        None,
        mosaic=lambda x, none: x + 1,
        xla=lambda x, none: x + 2,
        reference=lambda x, none: x + 3,
        unsupported=unsupported,
    )


def test_named_implementations_are_used_or_refused():
    assert [float(run(i)) for i in (None, "mosaic", "xla", "reference")] == [3, 2, 3, 4]
    assert float(run(None, "reason")) == 3
    with pytest.raises(ValueError, match="op: the Mosaic GPU kernel does not support this call: reason"):
        run("mosaic", "reason")
    with pytest.raises(ValueError, match="implementation='triton' is unknown"):
        run("triton")


def test_other_gpus_get_the_xla_path(monkeypatch):
    class Device:
        compute_capability = "8.0"

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda: [Device()])
    assert "the device has 8.0" in compat.why_not_hopper()
    assert float(run(None)) == 3
    Device.compute_capability = "9.0"
    assert compat.why_not_hopper() is None


def test_kernel_does_not_run_on_cpu_by_accident():
    q, s = quantize(jnp.ones((128, 128)))
    with pytest.raises(ValueError, match=r"CPU|cpu"):
        jax.block_until_ready(jax.jit(lambda q, s: fp8_gemm(q, s, q, s, implementation="mosaic"))(q, s))
