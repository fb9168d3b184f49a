"""Measures correctness and speed of a workload on the present device, next to a peer in the same process."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.testing.metrics import calc_diff_on_device
from pallas_kernels.testing.timing import each, num_sets, seconds_per_call
from pallas_kernels.testing.workloads import Workload

# Share of float8 bytes that may differ: quotients on a rounding boundary, see quantize/kernel.py.
MAX_MISMATCHES = 1e-4
SEED = jax.ShapeDtypeStruct((), jnp.int32)


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
class Once:
    """The op compiled, with what checks it. make: seed -> sources; operands: of sources; op: of operands; apart: what came out,
    sources, operands -> (diff, whether scales agree, if there are some)."""

    make: Callable
    operands: Callable
    op: Callable
    apart: Callable


@dataclasses.dataclass(frozen=True)
class Programs:
    """What `measure` runs of an op, compiled. each: the op for a list of `sets` of operands."""

    once: Once
    each: Callable
    sets: int


def _compiled(fn: Callable, *shapes: Any) -> Callable:
    """No product of XLA's is tried out, which would use the GPU beside what another process measures."""
    return jax.jit(fn).lower(*shapes).compile(compiler_options={"xla_gpu_autotune_level": "0"})


def _shapes(workload: Workload) -> tuple[Any, Any]:
    """Of sources and of operands."""
    sources = jax.eval_shape(workload.make, SEED)
    return sources, jax.eval_shape(workload.operands, *sources)


def _apart(workload: Workload, out: Any, sources: Any, operands: Any) -> tuple[jax.Array, Any]:
    """How far a result is from what is right; from that of the XLA path by the share of bytes that differ."""
    if workload.exact is not None:
        return calc_diff_on_device(out, workload.exact(*sources)), True
    (q, scale), right = out, workload.run(*operands, "xla")
    same = jnp.allclose(scale, right[1], rtol=1e-6, atol=0)
    return jnp.mean(q.astype(jnp.float32) != right[0].astype(jnp.float32)), same


def compile_once(workload: Workload, implementation: str) -> Once:
    """Compiles what `check` runs; needs no operands, and of a GPU only its presence."""
    sources, operands = _shapes(workload)
    run = lambda *xs: workload.run(*xs, implementation)  # noqa: E731
    out = jax.eval_shape(run, *operands)
    return Once(
        make=_compiled(workload.make, SEED),
        operands=_compiled(workload.operands, *sources),
        op=_compiled(run, *operands),
        apart=_compiled(functools.partial(_apart, workload), out, sources, operands),
    )


def compile_op(workload: Workload, implementation: str) -> Programs:
    """Compiles what `measure` runs, but for the peer, whose products XLA tries out."""
    _, operands = _shapes(workload)
    sets = num_sets(operands)
    return Programs(
        once=compile_once(workload, implementation),
        each=_compiled(each(lambda *xs: workload.run(*xs, implementation)), [operands] * sets),
        sets=sets,
    )


def check(workload: Workload, once: Once) -> tuple[float, bool]:
    """Returns (diff, whether it lies in its band) on fresh inputs."""
    sources = once.make(jnp.int32(0))
    operands = once.operands(*sources)
    diff, scales_agree = once.apart(once.op(*operands), sources, operands)
    low, high = (0.0, MAX_MISMATCHES) if workload.exact is None else workload.band
    return float(diff), bool(low <= float(diff) <= high and scales_agree)


def measure(
    workload: Workload, implementation: str, torch_peer: bool, programs: Programs | None = None, **timing
) -> Measurement:
    """Checks and times `workload`; `programs`: of `compile_op`, if made before; `timing` goes to `seconds_per_call`."""
    programs = programs or compile_op(workload, implementation)
    diff, correct = check(workload, programs.once)
    make, operands = programs.once.make, programs.once.operands
    sets = [operands(*make(jnp.int32(seed))) for seed in range(programs.sets)]
    seconds = seconds_per_call(programs.each, sets, **timing)
    del sets
    peer_sets = [make(jnp.int32(seed)) for seed in range(num_sets(_shapes(workload)[0]))]
    peer_seconds = seconds_per_call(each(workload.peer), peer_sets, **timing)
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
