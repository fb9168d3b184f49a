"""Cross-entropy through the output head in chunks: float32 logits of all tokens never exist at once.

The gradient is formed in the forward pass, chunk by chunk, while a chunk's logits are at hand: three
products per chunk and no recomputation; backward only scales by the incoming cotangent.

Dims: n token, d hidden, v vocabulary.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from deepseek_jax.precision.sums import precision


def _chunked(x: jax.Array, chunk: int) -> jax.Array:
    """[n, ...] -> [n / chunk, chunk, ...], zero-padded at the end."""
    pad = -x.shape[0] % chunk
    return jnp.pad(x, ((0, pad), *((0, 0),) * (x.ndim - 1))).reshape(-1, chunk, *x.shape[1:])


def _dot(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(spec, a, b, precision=precision(a.dtype), preferred_element_type=jnp.float32)


def _nll(h_nd: jax.Array, w_dv: jax.Array, labels_n: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(negative log-likelihood [n], exp(logits - max) [n, v], its row sums [n, 1])."""
    logits = _dot("nd,dv->nv", h_nd, w_dv.astype(h_nd.dtype))
    shifted = logits - logits.max(-1, keepdims=True)
    e = jnp.exp(shifted)
    total = e.sum(-1, keepdims=True)
    picked = jnp.take_along_axis(shifted, labels_n[:, None], axis=-1)
    return (jnp.log(total) - picked)[:, 0], e, total


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def weighted_nll(
    h_nd: jax.Array, w_dv: jax.Array, labels_n: jax.Array, weights_n: jax.Array, chunk: int
) -> jax.Array:
    """sum_n weights_n * -log softmax(h w)[labels_n], float32 scalar.

    h_nd compute dtype, w_dv the head (cast to it), labels_n int32, weights_n float32 (0 ignores a token);
    at most `chunk` rows of logits are in memory. Not differentiable in weights_n.
    """

    def one(args):
        h, labels, weights = args
        return (_nll(h, w_dv, labels)[0] * weights).sum()

    return lax.map(one, (_chunked(h_nd, chunk), _chunked(labels_n, chunk), _chunked(weights_n, chunk))).sum()


def _fwd(h_nd, w_dv, labels_n, weights_n, chunk):  # type: ignore[no-untyped-def]
    def one(dw, args):
        h, labels, weights = args
        nll, e, total = _nll(h, w_dv, labels)
        onehot = labels[:, None] == jnp.arange(w_dv.shape[1])
        dlogits = ((e / total - onehot) * weights[:, None]).astype(h.dtype)
        dw = dw + _dot("nd,nv->dv", h, dlogits)
        dh = _dot("nv,dv->nd", dlogits, w_dv.astype(h.dtype)).astype(h.dtype)
        return dw, ((nll * weights).sum(), dh)

    chunks = (_chunked(h_nd, chunk), _chunked(labels_n, chunk), _chunked(weights_n, chunk))
    dw, (losses, dh) = lax.scan(one, jnp.zeros(w_dv.shape, jnp.float32), chunks)
    dh_nd = dh.reshape(-1, h_nd.shape[1])[: h_nd.shape[0]]
    return losses.sum(), (dh_nd, dw.astype(w_dv.dtype))


def _bwd(chunk, saved, g):  # type: ignore[no-untyped-def]
    dh, dw = (
        saved  # scaled in float32: in BF16 the cotangent, as the weight of the MTP loss, would be 0.3% off
    )
    return (dh * g).astype(dh.dtype), (dw * g).astype(dw.dtype), None, None


weighted_nll.defvjp(_fwd, _bwd)
