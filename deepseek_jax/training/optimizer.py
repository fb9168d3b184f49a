"""AdamW as in report sections 3.3.3 and 4.2: both moments stored in BF16, gradients clipped by global norm.

`optax.adamw` can store only the first moment in another dtype and takes its learning rate from a schedule of
its own step count; here both moments have `moment_dtype`, all arithmetic is float32, and the learning rate is
an argument, because the report's schedule follows the token count. Otherwise the formulas are optax's.

The step is computed from the moments as stored, that is after rounding: what a checkpoint holds determines the
step, and the old moments are dead by then, so that XLA updates donated moments in place. Computed from the
unrounded moments, XLA's CPU compiler evaluates them twice and copies the old ones first, 2 to 3 times slower.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from deepseek_jax.config import OptimizerConfig

PyTree = Any


class AdamWState(NamedTuple):
    """State of `adamw`: int32 number of applied updates, both moments like the parameters, in moment_dtype."""

    num_updates: jax.Array
    mu: PyTree
    nu: PyTree


def decay_matrices(params: PyTree) -> PyTree:
    """Which leaves decay: everything but norm scales (`norm` or `scale` in the leaf's name) and vectors.

    The report gives the weight decay but not what it covers. Layers are stacked on a leading dim, so a norm
    scale may have two dims: the name decides.
    """

    def decays(path: tuple, leaf: jax.Array) -> bool:
        name = jax.tree_util.keystr(path[-1:], simple=True)
        return leaf.ndim >= 2 and "norm" not in name and "scale" not in name

    return jax.tree_util.tree_map_with_path(decays, params)


def adamw(
    config: OptimizerConfig, mask: Callable[[PyTree], PyTree] = decay_matrices, frozen: PyTree | None = None
) -> optax.GradientTransformationExtraArgs:
    """Clipped AdamW with decoupled weight decay.

    Args:
        config: b1, b2, eps, weight_decay, clip_norm, moment_dtype.
        mask: tree of params -> tree of bools, True where the weight decays.
        frozen: tree of bools, True where a parameter and its moments stay as they are; None: nowhere.

    Returns:
        `init(params) -> AdamWState` and
        `update(grads, state, params, lr, grad_norm=None, finite=None) -> (updates, state)`, updates in the
        parameters' dtype, to be added (`optax.apply_updates`). `lr`: float32 []. `grad_norm`: the global norm,
        where the caller has it already or where this device holds only a part of `grads`. `finite`: bool [];
        where False, the state comes back as it was and adding the updates changes no bit.
    """
    moment_dtype = jnp.dtype(config.moment_dtype)

    def init(params: PyTree) -> AdamWState:
        # Two calls: the moments must not share buffers, the state is donated.
        mu, nu = (jax.tree.map(lambda p: jnp.zeros(p.shape, moment_dtype), params) for _ in range(2))
        return AdamWState(jnp.zeros((), jnp.int32), mu, nu)

    def update(
        grads: PyTree,
        state: AdamWState,
        params: PyTree = None,
        lr: jax.Array | float | None = None,
        grad_norm: jax.Array | None = None,
        finite: jax.Array | bool | None = None,
    ) -> tuple[PyTree, AdamWState]:
        if params is None or lr is None:
            raise ValueError(
                "adamw.update needs params (weight decay) and lr: update(grads, state, params, lr)"
            )
        norm = global_norm(grads) if grad_norm is None else grad_norm
        finite = True if finite is None else finite
        clip = jnp.minimum(1.0, config.clip_norm / jnp.maximum(norm, jnp.finfo(jnp.float32).tiny))
        num_updates = state.num_updates + 1
        # 1 / (1 - b^n), without the cancellation of float32 at b close to 1
        mu_factor = -1.0 / jnp.expm1(num_updates * math.log(config.b1))
        nu_factor = -1.0 / jnp.expm1(num_updates * math.log(config.b2))

        def leaf(g, mu, nu, p, decays, stays):
            if stays:
                return jnp.full_like(p, -0.0), mu, nu
            g = g.astype(jnp.float32) * clip
            new_mu = config.b1 * mu.astype(jnp.float32) + (1.0 - config.b1) * g
            new_nu = config.b2 * nu.astype(jnp.float32) + (1.0 - config.b2) * g * g
            mu = jnp.where(finite, new_mu.astype(moment_dtype), mu)
            nu = jnp.where(finite, new_nu.astype(moment_dtype), nu)
            mu, nu = jax.lax.optimization_barrier((mu, nu))  # see the module's docstring
            step = (mu.astype(jnp.float32) * mu_factor) / (
                jnp.sqrt(nu.astype(jnp.float32) * nu_factor) + config.eps
            )
            if decays:
                step = step + config.weight_decay * p.astype(jnp.float32)
            # -0.0, not 0.0: x + -0.0 is x for every x
            return jnp.where(finite, -lr * step, -0.0).astype(p.dtype), mu, nu

        stay = jax.tree.map(lambda _: False, params) if frozen is None else frozen
        leaves = jax.tree.map(leaf, grads, state.mu, state.nu, params, mask(params), stay)
        updates, mu, nu = jax.tree.transpose(jax.tree.structure(grads), jax.tree.structure((0, 0, 0)), leaves)
        num_updates = jnp.where(finite, num_updates, state.num_updates)
        return updates, AdamWState(num_updates, mu, nu)

    return optax.GradientTransformationExtraArgs(init, update)


def global_norm(tree: PyTree) -> jax.Array:
    """L2 norm over all leaves, float32 [], accumulated in float32."""
    squares = [jnp.sum(jnp.square(x.astype(jnp.float32))) for x in jax.tree.leaves(tree)]
    return jnp.sqrt(sum(squares, jnp.zeros((), jnp.float32)))


def apply_if_finite(new: PyTree, old: PyTree, finite: jax.Array) -> PyTree:
    """`new` where `finite` (bool []), else `old`, leaf by leaf.

    For what the optimizer does not guard itself (`update(..., finite=...)`). A select per leaf fuses into the
    loop that produces the new leaf; `lax.cond` would keep both trees alive. Leaves that are the same array are
    passed through.
    """
    return jax.tree.map(lambda n, o: n if n is o else jnp.where(finite, n, o), new, old)
