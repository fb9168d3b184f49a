"""Measures correctness and speed of a workload on the present device, next to a peer in the same process."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.testing.metrics import calc_diff_on_device
from pallas_kernels.testing.timing import each, input_sets, median_seconds, num_sets, seconds_per_call
from pallas_kernels.testing.workloads import Workload

# Share of float8 bytes that may differ: quotients on a rounding boundary, see quantize/kernel.py.
MAX_MISMATCHES = 1e-4


@dataclasses.dataclass(frozen=True)
class Measurement:
    """Figures of one workload. `diff` is calc_diff to the exact result, or the share of differing float8 bytes."""

    op: str
    name: str
    implementation: str
    diff: float
    correct: bool
    seconds: float
    tflops: float
    gb_s: float
    bound_share: float  # roofline time of an H100 divided by the time taken
    peer_ratio: float  # time of the peer divided by ours
    torch_ratio: float | None
    published_tflops: float | None


@dataclasses.dataclass(frozen=True)
class Programs:
    """The op compiled: `once` for one set of operands, `each` for a list of `sets` of them."""

    once: Callable
    each: Callable
    sets: int


def compile_op(workload: Workload, implementation: str) -> Programs:
    """Compiles what `measure` runs of `implementation`; needs no operands, and of a GPU only its presence."""
    shapes = jax.eval_shape(lambda: workload.operands(*workload.make(0)))

    def run(*operands):
        return workload.run(*operands, implementation)

    sets = num_sets(shapes)
    return Programs(jax.jit(run).lower(*shapes).compile(), each(run).lower([shapes] * sets).compile(), sets)


def check(workload: Workload, implementation: str, once: Callable | None = None) -> tuple[float, bool]:
    """Returns (diff, whether it lies in its band) on fresh inputs. `once`: the op, where it is compiled already."""
    sources = workload.make(0)
    operands = jax.jit(workload.operands)(*sources)
    once = once or jax.jit(lambda *xs: workload.run(*xs, implementation))
    out = once(*operands)
    if workload.exact is not None:
        diff = float(calc_diff_on_device(out, jax.jit(workload.exact)(*sources)))
        low, high = workload.band
        return diff, low <= diff <= high
    expected = jax.jit(lambda *xs: workload.run(*xs, "xla"))(*operands)
    diff = float(jnp.mean(out[0].astype(jnp.float32) != expected[0].astype(jnp.float32)))
    scales_agree = bool(jnp.allclose(out[1], expected[1], rtol=1e-6, atol=0))
    return diff, diff <= MAX_MISMATCHES and scales_agree


def measure(
    workload: Workload, implementation: str, torch_peer: bool, programs: Programs | None = None, **timing
) -> Measurement:
    """Checks and times `workload`; `programs`: of `compile_op`, if made before; `timing` goes to `median_seconds`."""
    programs = programs or compile_op(workload, implementation)
    diff, correct = check(workload, implementation, programs.once)
    operands = jax.jit(workload.operands)
    sets = [operands(*workload.make(seed)) for seed in range(programs.sets)]
    seconds = seconds_per_call(programs.each, sets, **timing)
    del sets
    peer_sets = input_sets(workload.make)
    peer_seconds = median_seconds(workload.peer, peer_sets, **timing)
    del peer_sets
    torch_seconds = torch_seconds_of(workload) if torch_peer else None
    return Measurement(
        op=workload.op,
        name=workload.name,
        implementation=implementation,
        diff=diff,
        correct=correct,
        seconds=seconds,
        tflops=workload.flops / seconds / 1e12,
        gb_s=workload.bytes / seconds / 1e9,
        bound_share=workload.bound_seconds / seconds,
        peer_ratio=peer_seconds / seconds,
        torch_ratio=None if torch_seconds is None else torch_seconds / seconds,
        published_tflops=workload.published_tflops,
    )


def torch_seconds_of(workload: Workload, repeats: int = 30) -> float | None:
    """Returns the median seconds of torch on this shape; None where torch is missing, has no GPU, or has no such op."""
    make = _TORCH.get(workload.op)
    try:
        import torch
    except ImportError:
        return None
    call = make(torch, workload.shape) if make is not None and torch.cuda.is_available() else None
    if call is None:
        return None
    flush = torch.empty(64 * 2**20, dtype=torch.int32, device="cuda")
    times = []
    for _ in range(repeats):
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return sorted(times)[len(times) // 2]


def _scaled_mm(torch: Any, shape: Any) -> Callable:
    """The FP8 product with one scale per row of both operands."""
    a = torch.randn(shape.m, shape.k, device="cuda").to(torch.float8_e4m3fn)
    b = torch.randn(shape.n, shape.k, device="cuda").to(torch.float8_e4m3fn)
    scale_a, scale_b = torch.ones(shape.m, 1, device="cuda"), torch.ones(1, shape.n, device="cuda")
    return lambda: torch._scaled_mm(a, b.t(), scale_a=scale_a, scale_b=scale_b, out_dtype=torch.bfloat16)


def _attention(torch: Any, shape: Any) -> Callable | None:
    """Causal attention of whole sequences, values padded to the width of keys: its fastest kernels take one width."""
    if shape.documents > 1 or shape.rows != shape.tokens:
        return None
    size = (shape.batch, shape.heads, shape.tokens, shape.qk)
    q, k, v, dout = (torch.randn(size, device="cuda", dtype=torch.bfloat16) for _ in range(4))
    for x in (q, k, v):
        x.requires_grad_(shape.pass_ == "backward")
    attend = functools.partial(torch.nn.functional.scaled_dot_product_attention, q, k, v, is_causal=True)
    if shape.pass_ == "forward":
        return attend
    out = attend()
    return lambda: torch.autograd.grad(out, (q, k, v), dout, retain_graph=True)


_TORCH = {"fp8_gemm": _scaled_mm, "mla_attention": _attention}
