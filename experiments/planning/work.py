"""What a layer computes, per phase: floating-point operations of each kind of product, and bytes of the passes between.

A phase is a list of `Work`. Its time is that of its products at the rates that kernels reach (or of their bytes, if these
take longer) plus that of the passes over arrays: casts to FP8, norms, rotary embedding, copies of rows, gradients of
activations. A pass counts each array it reads or writes once; what XLA or a kernel fuses is one pass.

Letters: n tokens of a device's micro-batch, d hidden, q and c latents, r rope, h heads x width, f FFN inner, k experts per
token.
"""

from collections.abc import Iterable
from typing import NamedTuple

from experiments.planning.hardware import Hardware
from experiments.planning.run import E5M6, FP8, Run

STREAMS = 0.8  # of the HBM's peak, where a product waits for memory: bench's `quantize` reaches 0.69 to 0.84


class Work(NamedTuple):
    """kind: "linear.fprop", "grouped.wgrad", "core.forward", ..., or "pass"; `precision` names the rates of a product."""

    kind: str
    flops: float
    bytes: float
    precision: str = ""


class Passes(NamedTuple):
    """Forward, gradients of inputs, gradients of weights."""

    forward: tuple[Work, ...]
    backward: tuple[Work, ...]
    weights: tuple[Work, ...]


def seconds(work: Iterable[Work], hardware: Hardware, comm_sms: int = 0) -> float:
    """Seconds of a phase while `comm_sms` SMs move data."""
    return sum(_seconds(w, hardware, hardware.rates_beside(comm_sms)) for w in work)


def _seconds(w: Work, hardware: Hardware, factor: float) -> float:
    if w.kind == "pass":
        return w.bytes / (hardware.passes * factor)
    family, which = w.kind.split(".")
    if family == "core":
        rate = hardware.core_forward if which == "forward" else hardware.core_backward
    else:
        rates = hardware.linear if family == "linear" else hardware.grouped
        rate = getattr(rates[w.precision], which)
    return max(w.flops / (rate * factor), w.bytes / (STREAMS * hardware.hbm))


def total_flops(work: Iterable[Work]) -> float:
    return sum(w.flops for w in work)


# --- products -----------------------------------------------------------------------------------------------------


def _product(run: Run, width_in: int, width_out: int, which: str, rows: float = 0, experts: int = 0) -> Work:
    """One of the three products of a weight, or of as many `experts`."""
    n, element = rows or run.tokens, 1 if run.fp8 else run.act
    moved = n * (width_in * element + width_out * run.act)
    weights = max(1, experts) * width_in * width_out * (8 if which == "wgrad" else element)
    family = "grouped" if experts else "linear"
    return Work(f"{family}.{which}", 2.0 * n * width_in * width_out, moved + weights, run.gemm)


def _linears(run: Run, shapes: list[tuple[int, int]], which: str) -> tuple[Work, ...]:
    return tuple(_product(run, *shape, which) for shape in shapes)


def _pass(run: Run, per_token: float) -> Work:
    return Work("pass", 0.0, run.tokens * per_token)


def _cast(run: Run, width: float) -> float:
    """Bytes per token to quantise an activation, if it is."""
    return width * (run.act + FP8) if run.fp8 else 0.0


def _across(run: Run, width_in: float, width_out: float) -> float:
    """Bytes per token to lay both operands of a weight gradient along the tokens, in FP8: that of the input is kept so."""
    return width_in * 2 * FP8 + width_out * (run.act + FP8) if run.fp8 else 0.0


# --- attention ----------------------------------------------------------------------------------------------------


class Widths(NamedTuple):
    d: int
    q: int  # 0: full-rank queries
    c: int
    low: int  # of what is projected down: q + c + r
    queries: int  # of all heads
    keys_values: int  # as projected up: without the shared key
    values: int


def widths(run: Run) -> Widths:
    m, h = run.model, run.model.num_attention_heads
    q = m.q_lora_rank or 0
    return Widths(
        m.hidden_size,
        q,
        m.kv_lora_rank,
        q + m.kv_lora_rank + m.qk_rope_head_dim,
        h * m.qk_head_dim,
        h * (m.qk_nope_head_dim + m.v_head_dim),
        h * m.v_head_dim,
    )


def _down(w: Widths) -> list[tuple[int, int]]:
    return [(w.d, w.q), (w.d, w.low - w.q)] if w.q else [(w.d, w.low)]


def _up(w: Widths) -> list[tuple[int, int]]:
    return [(w.q or w.d, w.queries), (w.c, w.keys_values)]


def _core(run: Run, which: str) -> Work:
    """Causal: half of the scores. Backward counts 2.5 forwards: five products for two."""
    m, t = run.model, run.cfg.data.seq_len
    flops = run.tokens * t / 2 * 2 * m.num_attention_heads * (m.qk_head_dim + m.v_head_dim)
    return Work(f"core.{which}", flops * (2.5 if which == "backward" else 1), 0.0)


def _expand_bytes(run: Run, w: Widths) -> float:
    """Norm and cast of the latents, rotary embedding, heads put together; bytes per token."""
    norms = 2 * (w.q + w.c) * run.act + _cast(run, w.q + w.c)
    return norms + (2 * w.queries + w.keys_values + w.queries + w.values) * run.act


def _gate(run: Run, which: str) -> Work:
    m = run.model
    return Work(f"linear.{which}", 2.0 * run.tokens * m.hidden_size * m.n_routed_experts, 0.0, "float32")


def attention(run: Run, is_moe: bool) -> Passes:
    """Attention with its norm and residual; and the norm and gate of the MLP after it."""
    w, a = widths(run), run.act
    norm, out = 2 * w.d * a, (w.values, w.d)
    routed = run.model.n_routed_experts * is_moe
    keep_output = w.values * (a + E5M6) if run.fp8 else 0.0
    forward = (
        *_linears(run, [*_down(w), *_up(w), out], "fprop"),
        _core(run, "forward"),
        *([_gate(run, "fprop")] if is_moe else []),
        _pass(run, norm + _cast(run, w.d) + _expand_bytes(run, w)),
        _pass(run, _cast(run, w.values) + keep_output + 3 * w.d * a),
        _pass(run, norm + 3 * 4 * routed),
    )
    again: tuple[Work, ...] = ()
    if run.cfg.train.remat == "deepseek":
        again = (
            *_linears(run, _up(w), "fprop"),
            _pass(run, 2 * norm + _cast(run, w.d) + _expand_bytes(run, w)),
        )
    heads = (
        w.queries + w.keys_values + w.values + w.queries
    )  # gradients of what the core reads, and of what was projected
    backward = (
        *again,
        *_linears(run, [*_down(w), *_up(w), out], "dgrad"),
        _core(run, "backward"),
        *([_gate(run, "dgrad")] if is_moe else []),
        _pass(run, _cast(run, w.d) + keep_output + 2 * w.values * a),
        _pass(run, heads * a + _cast(run, w.queries + w.keys_values)),
        _pass(run, 3 * (w.q + w.c) * a + _cast(run, w.low)),
        _pass(run, 3 * w.d * a + 2 * 3 * w.d * a + 2 * 4 * routed),
    )
    weights = (
        *_linears(run, [*_down(w), *_up(w), out], "wgrad"),
        *([_gate(run, "wgrad")] if is_moe else []),
        _pass(run, _across(run, w.d, w.low) + _across(run, w.q or w.d, w.queries)),
        _pass(run, _across(run, w.c, w.keys_values) + _across(run, *out)),
    )
    return Passes(forward, backward, weights)


# --- MLP ----------------------------------------------------------------------------------------------------------


def _ffn(run: Run, width: int, rows: float, experts: int = 0) -> Passes:
    """A SwiGLU FFN of inner width `width` on `rows` rows, their copies not counted."""
    d, a, per = run.model.hidden_size, run.act, rows / run.tokens
    up, down = [(d, width)] * 2, (width, d)

    def products(which: str) -> tuple[Work, ...]:
        return tuple(_product(run, *shape, which, rows, experts) for shape in (*up, down))

    kept = 2 * width * run.operand
    swiglu = 2 * width * a + width * run.operand + (_cast(run, 2 * width) if run.fp8 else 0)
    gradients = kept + 4 * width * a + _cast(run, 2 * width)
    across = _across(run, d, 2 * width) + _across(run, width, 0) + (d * 2 * FP8 if run.fp8 else 0)
    return Passes(
        (*products("fprop"), _pass(run, per * swiglu)),
        (*products("dgrad"), _pass(run, per * gradients)),
        (*products("wgrad"), _pass(run, per * across)),
    )


def dense_mlp(run: Run) -> Passes:
    """The MLP of a dense layer, and its residual."""
    d = run.model.hidden_size
    ffn = _ffn(run, run.model.intermediate_size, run.tokens)
    around = _pass(run, _cast(run, d) + 3 * d * run.act)
    return Passes((*ffn.forward, around), (*ffn.backward, around), ffn.weights)


def moe_mlp(run: Run) -> Passes:
    """Routed experts with the copies of rows to and from them, shared experts, residuals. Routing is taken as balanced."""
    m, a, k = run.model, run.act, run.model.num_experts_per_tok
    d, row = m.hidden_size, run.operand * m.hidden_size
    filled = 64 * run.experts if run.fp8 else 0  # segments begin at multiples of 128
    routed = _ffn(run, m.moe_intermediate_size, k * run.tokens + filled, run.experts)
    shared = Passes((), (), ())
    if m.n_shared_experts:
        shared = _ffn(run, m.n_shared_experts * m.moe_intermediate_size, run.tokens)
    there, back = 2 * k * row, 2 * k * d * a
    around = _pass(run, there + back + 2 * 3 * d * a + _cast(run, d))
    return Passes(
        (*routed.forward, *shared.forward, around),
        (*routed.backward, *shared.backward, around),
        (*routed.weights, *shared.weights),
    )


# --- the ends -----------------------------------------------------------------------------------------------------


def head(run: Run) -> Passes:
    """Logits and loss, and their gradients."""
    m, n = run.model, run.tokens
    one = 2.0 * n * m.hidden_size * m.vocab_size
    precision = {2: "bf16", 4: "float32"}[run.act]
    fprop, dgrad, wgrad = (
        Work(f"linear.{which}", one, 0.0, precision) for which in ("fprop", "dgrad", "wgrad")
    )
    logits = _pass(run, m.vocab_size * (4 + 4 + 2 * run.act))
    return Passes((fprop, logits), (dgrad,), (wgrad,))


def mtp_input(run: Run) -> Passes:
    """Two norms and the projection of both states."""
    d, a = run.model.hidden_size, run.act
    shape = [(2 * d, d)]
    norms = _pass(run, 4 * d * a + _cast(run, 2 * d))
    again = (norms,) if run.cfg.train.remat == "deepseek" else ()
    return Passes(
        (*_linears(run, shape, "fprop"), norms),
        (*again, *_linears(run, shape, "dgrad"), _pass(run, 6 * d * a + _cast(run, d))),
        (*_linears(run, shape, "wgrad"), _pass(run, _across(run, 2 * d, d))),
    )
