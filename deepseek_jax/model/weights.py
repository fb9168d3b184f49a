"""What the forward pass multiplies by: the weights quantised, and joined, once per step and attached to the parameters that
it reads; or as an FP8 checkpoint has them."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from deepseek_jax.model.params import Param, tree_map
from deepseek_jax.precision.beside import Apart, Joined, can_join, join_operands, joined
from deepseek_jax.precision.policy import Policy
from deepseek_jax.precision.product import Quantised, from_blocks, product, quantise_weight

_LEADING = ("layer", "expert")

# Weights of one input, in the order of their outputs, by the name of what multiplies all of them at once.
JOINED = {
    "wqkv_a_dm": ("wq_a_dq", "wkv_a_dc"),
    "w_gate_up_df": ("w_gate_df", "w_up_df"),
    "w_gate_up_edf": ("w_gate_edf", "w_up_edf"),
}


def beside(p: Any, name: str) -> Joined | Apart:
    """The product of the weights JOINED[name] of a layer, joined if they come so."""
    return p[name] if name in p else Apart(tuple(product(p[part]) for part in JOINED[name]))  # type: ignore[arg-type]


def leading_dims(p: Param) -> int:
    """How many dims come before a weight's input: layer and expert."""
    return sum(axis in _LEADING for axis in p.axes)


def as_matrices(p: Param, w: jax.Array) -> jax.Array:
    """w, of which a device may hold a part -> [layer and expert dims, input width, output width]."""
    assert p.n_in is not None
    lead = leading_dims(p)
    return w.reshape(*w.shape[:lead], math.prod(w.shape[lead : lead + p.n_in]), -1)


def quantise_weights(params: Any, declared: Any, policy: Policy | None) -> Any:
    """The quantised operands of every linear weight, None for other parameters; to be computed once per step.

    declared: the tree of `Param` that `params` came from (`model_params(cfg)`); arrays may hold fewer experts or heads.
    """

    def one(p: Param, w: jax.Array) -> Any:
        if policy is None or p.n_in is None:
            return None
        return quantise_weight(as_matrices(p, lax.stop_gradient(w)), policy)

    return tree_map(one, declared, params)


def join(params: Any, operands: Any, declared: Any, policy: Policy | None, dtype: Any) -> tuple[Any, Any]:
    """Parameters and the operands of `quantise_weights` -> the same with the operands of JOINED ones joined, once per step.

    Under a policy where blocks allow it, and without one in BF16, in which GPUs multiply, cast to it. The parameters are then
    only differentiated: zeros stand for them. dtype: the model's.
    """

    def of(parts: tuple[str, ...], params: Any, operands: Any, declared: Any) -> Any:
        if policy is not None:
            fprop, dgrad = zip(*(operands[name] for name in parts), strict=True)
            return (join_operands(fprop, -2), join_operands(dgrad, -1)) if can_join(fprop) else None
        if jnp.dtype(dtype) != jnp.bfloat16:
            return None
        arrays = (as_matrices(declared[name], lax.stop_gradient(params[name])) for name in parts)
        return jnp.concatenate([w.astype(dtype) for w in arrays], axis=-1)

    def one(params: Any, operands: Any, declared: Any) -> tuple[Any, Any]:
        if not _is_group(params):
            return params, operands
        below = {name: one(params[name], operands[name], declared[name]) for name in params}
        params, operands = ({name: pair[i] for name, pair in below.items()} for i in range(2))
        for name, parts in JOINED.items():
            if all(part in params for part in parts):
                whole = of(parts, params, operands, declared)
                if whole is not None:
                    operands |= {name: whole} | dict.fromkeys(parts)
                    params |= {part: jnp.zeros_like(params[part]) for part in parts}
        return params, operands

    return one(params, operands, declared)


def attach(params: Any, operands: Any, policy: Policy | None, adds: bool = False) -> Any:
    """Parameters with every linear weight as a product by its operands, joined ones under the name in JOINED; gradients flow
    to `params`. adds: parameters that are `only_differentiated` are sums of gradients, see `Quantised`."""
    if operands is None:
        return params
    if not _is_group(params):
        assert policy is not None
        return Quantised(params, operands[0], operands[1], policy, adds=adds)
    out = {name: attach(w, operands[name], policy, adds) for name, w in params.items()}
    for name in operands.keys() & JOINED.keys():
        masters = tuple(out.pop(part) for part in JOINED[name])
        out[name] = joined(operands[name], masters, policy, adds)
    return out


def _adds(w: Any) -> bool:
    return getattr(w, "adds", False)


def gradients_onto(p: Any, dp: Any) -> Any:
    """Parameters of a function, of which those that add (`Quantised`) add to the gradients `dp`, a tree like p."""
    return jax.tree.map(lambda w, d: w.onto(d) if _adds(w) else w, p, dp, is_leaf=_is_product)


def sums_of_gradients(p: Any, dp: Any, more: Any) -> Any:
    """`dp` and the gradients for `gradients_onto(p, dp)` added up, each leaf in the dtype of that of `dp`."""

    def one(w: Any, d: Any, m: Any) -> Any:
        m = jax.tree.map(lambda a, b: b.astype(a.dtype), d, m)
        return m if _adds(w) else jax.tree.map(jnp.add, d, m)

    return jax.tree.map(one, p, dp, more, is_leaf=_is_product)


def _is_group(params: Any) -> bool:
    """Whether it is a dict of parameters, not one of them."""
    return hasattr(params, "items")


def _is_product(w: Any) -> bool:
    return hasattr(w, "fprop")


def only_differentiated(params: Any, operands: Any) -> Any:
    """Which of the parameters are not read, because they have operands: a tree of bool."""
    if not _is_group(params):
        return operands is not None
    out = {name: only_differentiated(w, operands[name]) for name, w in params.items()}
    for name in operands.keys() & JOINED.keys():
        out |= dict.fromkeys(JOINED[name], True)
    return out


def adding(params: Any, operands: Any, policy: Policy | None) -> Any:
    """Which of the parameters may be sums of gradients (`attach`, adds): a tree of bool. Under a policy alone: without one,
    operands are joined copies, and products of arrays do not add."""
    return jax.tree.map(lambda only: only and policy is not None, only_differentiated(params, operands))


def join_for_inference(params: Any) -> Any:
    """Parameters of which no gradient is wanted, with JOINED ones joined where FP8 blocks allow it."""

    def of(parts: list[Any]) -> Any:
        if not any(hasattr(w, "fprop") for w in parts):
            return joined(jnp.concatenate(parts, axis=-1), (), None)
        fprop = [w.fprop_operand for w in parts if getattr(w, "fprop_operand", None) is not None]
        if len(fprop) < len(parts) or not can_join(fprop):
            return None
        return joined((join_operands(fprop, -2), None), (), parts[0].policy)

    if not _is_group(params):
        return params
    out = {name: join_for_inference(w) for name, w in params.items()}
    for name, parts in JOINED.items():
        if all(part in out for part in parts):
            whole = of([out[part] for part in parts])
            if whole is not None:
                out = {key: w for key, w in out.items() if key not in parts} | {name: whole}
    return out


def multiplied_as_stored(params: Any, declared: Any, policy: Policy) -> Any:
    """Parameters of `hf.load(keep_fp8=True)` for inference: leaves {"fp8", "scale"} become weights that are multiplied as
    they are, with activations quantised by `policy`. `declared`: as for `quantise_weights`."""

    def one(p: Param, w: Any) -> Any:
        shape = p.shape[1:] if p.axes[0] == "layer" else p.shape
        return w if hasattr(w, "dtype") else from_blocks(w["fp8"], w["scale"], shape, policy)

    return tree_map(one, declared, params)
