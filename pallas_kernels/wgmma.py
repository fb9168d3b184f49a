"""Tensor-core products whose accumulators, and left operands, are registers of the calling warpgroup."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.compat import interpreted

# (accumulator [m, n] float32, or None for zeros; left operand [m, k], in registers or shared memory; right operand [k, n]
# in shared memory)
Product = tuple[jax.Array | None, Any, Any]


def zeros(rows: int, cols: int) -> jax.Array:
    """Returns float32 zeros laid out as an accumulator."""
    return plgpu.layout_cast(jnp.zeros((rows, cols), jnp.float32), plgpu.Layout.WGMMA)


def multiply_add(products: Sequence[Product], issued: Callable[[], None] = lambda: None) -> list[jax.Array]:
    """Returns acc + a @ b of each product. All are issued at once; `issued` runs while the tensor core works on them."""
    accs = [zeros(a.shape[0], b.shape[1]) if acc is None else acc for acc, a, b in products]
    if interpreted():
        outs = [acc + _interpreted(a, b) for acc, (_, a, b) in zip(accs, products, strict=True)]
        issued()
        return outs

    def issue(refs):
        for ref, (_, a, b) in zip(refs, products, strict=True):
            plgpu.wgmma(ref, a, b)
        issued()

    return list(pl.run_state(issue)(tuple(plgpu.ACC.init(acc) for acc in accs)))


def _interpreted(a: Any, b: Any) -> jax.Array:
    """a @ b in the interpreter, which neither starts an accumulator from registers nor reads `a` from there."""
    if not isinstance(a, jax.Array):

        def product(ref):
            plgpu.wgmma(ref, a, b)
            return ref[...]

        return pl.run_scoped(product, plgpu.ACC((a.shape[0], b.shape[1]), jnp.float32))
    right = b[...]
    plgpu.commit_smem()  # a read by wgmma would not need it
    return jnp.dot(a.astype(jnp.float32), right.astype(jnp.float32))
