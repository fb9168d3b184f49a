"""The SwiGLU FFN: w_down(silu(w_gate x) * w_up x), written once for dense layers, shared experts and routed experts.

With `rows` (`rows.py`), x are rows sorted by expert, each multiplied by the weights of its expert, and the routing
weight (gain) is applied between SwiGLU and down-projection, so that results are plain sums over experts. Input gradient
and weight gradients are apart. Kept for the backward pass are x and the SwiGLU's inputs, as the weights' products keep
them; the SwiGLU's output is computed again (report section 3.3.3).

Dims: m token or row, d hidden, f FFN inner, e expert.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from deepseek_jax.model.layers import Params
from deepseek_jax.model.params import Param
from deepseek_jax.model.rows import Rows
from deepseek_jax.model.weights import beside
from deepseek_jax.precision.product import product

# Name of what the recompute policy "deepseek" keeps of an FFN: its SwiGLU's inputs, not the result.
SWIGLU_INPUTS = "swiglu_inputs"


class Gated(NamedTuple):
    """The products of an FFN's weights, gate and up beside each other (`precision/beside.py`); or their gradients."""

    gate_up: Any
    down: Any

    def kept_for_backward(self) -> "Gated":
        return Gated(*(w.kept_for_backward() for w in self))


class ForWeights(NamedTuple):
    """What `ffn_wgrad` needs beside x and the gradient of y: the input of the down-projection, and the gradient of the
    output of gate and up."""

    act_mf: jax.Array
    d_gate_up: Any


def swiglu_gradients(
    gate: jax.Array, up: jax.Array, dact: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """silu(gate) * up once more, and the gradients of gate and up, given that of silu(gate) * up."""
    sig = jax.nn.sigmoid(gate)
    silu = gate * sig
    return silu * up, dact * up * (sig + silu * (1 - sig)), dact * silu


def ffn_fprop(w: Gated, x: Any, dtype: Any, rows: Rows | None = None) -> tuple[jax.Array, Any]:
    """x, a left operand of `w.gate_up` -> (y [m, d], the SwiGLU's inputs as they are kept)."""
    groups, gain_m = (None, None) if rows is None else (rows.groups, rows.gain_m)
    gate_up = w.gate_up.fprop(x, dtype, groups)
    kept = checkpoint_name(w.gate_up.packed(gate_up), SWIGLU_INPUTS)
    return w.down.fprop(w.down.swiglu(gate_up, gain_m), dtype, groups), kept


def ffn_dgrad(
    w: Gated, kept: Any, dy: Any, dtype: Any, rows: Rows | None = None
) -> tuple[jax.Array, jax.Array, ForWeights]:
    """(dx [m, d], the gradient of the gains [m], what `ffn_wgrad` needs), given that of y, a left operand of dgrad."""
    groups = None if rows is None else rows.groups
    gate, up = w.gate_up.unpacked(kept, jnp.float32)
    gain_m1 = 1 if rows is None else rows.gain_m[:, None].astype(gate.dtype)
    dact = w.down.dgrad(dy, dtype, groups)
    act, d_gate, d_up = swiglu_gradients(gate, up, dact * gain_m1)
    d_gate_up = w.gate_up.together(d_gate.astype(dtype), d_up.astype(dtype))
    dx = w.gate_up.dgrad(d_gate_up, dtype, groups)
    dgain_m = (dact.astype(jnp.float32) * act).sum(-1)
    return dx, dgain_m, ForWeights((act * gain_m1).astype(dtype), d_gate_up)


def ffn_wgrad(w: Gated, x: Any, at: ForWeights, dy: Any, rows: Rows | None = None) -> Gated:
    """Gradients of the weights."""
    groups = None if rows is None else rows.groups
    return Gated(w.gate_up.wgrad(x, at.d_gate_up, groups), w.down.wgrad(at.act_mf, dy, groups))


# --- dense --------------------------------------------------------------------------------------------------------


def mlp_params(d: int, f: int) -> dict[str, Param]:
    """Dense SwiGLU FFN; also the shared experts, merged into one of inner width n_shared * f."""
    return {
        "w_gate_df": Param((d, f), ("embed", "mlp"), n_in=1),
        "w_up_df": Param((d, f), ("embed", "mlp"), n_in=1),
        "w_down_fd": Param((f, d), ("mlp", "embed"), n_in=1),
    }


def mlp(p: Params, x: jax.Array) -> jax.Array:
    """[..., d] -> [..., d]."""
    return _mlp(x, Gated(beside(p, "w_gate_up_df"), product(p["w_down_fd"])))


@jax.custom_vjp
def _mlp(x, w):  # type: ignore[no-untyped-def]
    return _mlp_fwd(x, w)[0]


def _mlp_fwd(x, w):  # type: ignore[no-untyped-def]
    a = w.gate_up.operand(x)
    y, kept = ffn_fprop(w, a, x.dtype)
    return y.reshape(x.shape), (w.gate_up.kept(a), kept, w.kept_for_backward())


def _mlp_bwd(saved, dy):  # type: ignore[no-untyped-def]
    a, kept, w = saved
    dx, _, at = ffn_dgrad(w, kept, dy, dy.dtype)
    return dx.reshape(dy.shape), ffn_wgrad(w, a, at, dy)


_mlp.defvjp(_mlp_fwd, _mlp_bwd)
