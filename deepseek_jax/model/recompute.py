"""What the backward pass computes again instead of keeping it (report section 3.2.3), stated per phase of a block.

"none" keeps what the backward pass reads. "full" keeps a layer's input and computes the layer again. "deepseek" computes
parts of a layer again: RMSNorm (`after_norm`) with what follows from it, as FP8 operands, and the MLA up-projections
(`mla.expanded`), so that neither [b, t, h, k] queries and keys nor norms are kept. Where the routed experts' backward pass
reads the tokens that they got, as on a single device, these stay. The plan of an exchange between experts is made once.
"""

from collections.abc import Callable
from typing import Any

import jax

from deepseek_jax.checks import choice
from deepseek_jax.config import REMAT, ModelConfig
from deepseek_jax.model.dispatch import EXPERT_PLAN
from deepseek_jax.model.ffn import SWIGLU_INPUTS
from deepseek_jax.model.layers import Params, rms_norm


def recompute(fn: Callable[..., Any], policy: str) -> Callable[..., Any]:
    """A whole layer `fn` under a policy. Raises ValueError for an unknown one."""
    if policy == "full":
        return jax.checkpoint(fn, policy=jax.checkpoint_policies.save_only_these_names(EXPERT_PLAN))
    choice("remat", policy, REMAT)
    return fn


def in_part(fn: Callable[..., Any], policy: str) -> Callable[..., Any]:
    """Under "deepseek", the backward pass of `fn` has only its arguments and what is named SWIGLU_INPUTS, and computes
    the rest again: for parts that begin with a norm."""
    if policy != "deepseek":
        return fn
    return jax.checkpoint(fn, policy=jax.checkpoint_policies.save_only_these_names(SWIGLU_INPUTS))


def after_norm(fn: Callable[..., Any], cfg: ModelConfig, policy: str) -> Callable[..., Any]:
    """(p, scale [d], x) -> fn(p, cfg, RMSNorm of x), of which "deepseek" keeps x."""

    def normed(p: Params, scale_d: jax.Array, x_btd: jax.Array) -> Any:
        return fn(p, cfg, rms_norm(x_btd, scale_d, cfg.rms_norm_eps))

    return in_part(normed, policy)
