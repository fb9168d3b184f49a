"""The weights of a model in FP8: quantised once per step and attached to the parameters that the forward pass reads, or
kept as an FP8 checkpoint has them."""

import math
from typing import Any

import jax
from jax import lax

from deepseek_jax.model.params import Param, tree_map
from deepseek_jax.precision.policy import Policy
from deepseek_jax.precision.product import Quantised, from_blocks, quantise_weight

_LEADING = ("layer", "expert")


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


def attach(params: Any, quantised: Any, policy: Policy | None) -> Any:
    """Parameters with every linear weight as a `Quantised`; gradients flow to `params`."""
    if policy is None:
        return params
    return jax.tree.map(
        lambda w, operands: w if operands is None else Quantised(w, operands[0], operands[1], policy),
        params,
        quantised,
    )


def multiplied_as_stored(params: Any, declared: Any, policy: Policy) -> Any:
    """Parameters of `hf.load(keep_fp8=True)` for inference: leaves {"fp8", "scale"} become weights that are multiplied as
    they are, with activations quantised by `policy`. `declared`: as for `quantise_weights`."""

    def one(p: Param, w: Any) -> Any:
        shape = p.shape[1:] if p.axes[0] == "layer" else p.shape
        return w if hasattr(w, "dtype") else from_blocks(w["fp8"], w["scale"], shape, policy)

    return tree_map(one, declared, params)
