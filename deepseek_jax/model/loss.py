"""Log-probabilities and cross-entropy through the output head in chunks: float32 logits of all tokens never exist at
once.

`weighted_nll` is the sum of a batch under weights that are known beforehand. It forms its gradient in the forward pass,
chunk by chunk, while a chunk's logits are at hand: three products per chunk and no recomputation; backward only scales
by the incoming cotangent. `token_logprobs` gives each token's own, for losses that are functions of them, in the
distribution that tokens are drawn from; their cotangents are known only in the backward pass, which computes a chunk's
logits again: a fourth product.

Dims: n token, d hidden, v vocabulary, w its 32-bit words.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from deepseek_jax.model.id_sets import unpacked
from deepseek_jax.precision.sums import precision


def _chunked(x: jax.Array, chunk: int) -> jax.Array:
    """[n, ...] -> [n / chunk, chunk, ...], zero-padded at the end."""
    pad = -x.shape[0] % chunk
    return jnp.pad(x, ((0, pad), *((0, 0),) * (x.ndim - 1))).reshape(-1, chunk, *x.shape[1:])


def _dot(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(spec, a, b, precision=precision(a.dtype), preferred_element_type=jnp.float32)


def _logits(h_nd: jax.Array, w_dv: jax.Array) -> jax.Array:
    return _dot("nd,dv->nv", h_nd, w_dv.astype(h_nd.dtype))


def _nll(logits_nv: jax.Array, labels_n: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(negative log-likelihood [n], exp(logits - max) [n, v], its row sums [n, 1])."""
    shifted = logits_nv - logits_nv.max(-1, keepdims=True)
    e = jnp.exp(shifted)
    total = e.sum(-1, keepdims=True)
    picked = jnp.take_along_axis(shifted, labels_n[:, None], axis=-1)
    return (jnp.log(total) - picked)[:, 0], e, total


def _logit_gradients(probs_nv: jax.Array, labels_n: jax.Array, weights_n: jax.Array) -> jax.Array:
    """Gradient [n, v] of sum_n weights_n * -log probs_nv[labels_n], float32."""
    onehot = labels_n[:, None] == jnp.arange(probs_nv.shape[1])[None]
    return (probs_nv - onehot) * weights_n[:, None]


def _head_dgrad(h_nd: jax.Array, w_dv: jax.Array, dlogits: jax.Array) -> jax.Array:
    """dh [n, d], in h's dtype."""
    return _dot("nv,dv->nd", dlogits, w_dv.astype(h_nd.dtype)).astype(h_nd.dtype)


def _head_wgrad(h_nd: jax.Array, dlogits: jax.Array) -> jax.Array:
    """dw [d, v], float32."""
    return _dot("nd,nv->dv", h_nd, dlogits)


def _tokens(x: jax.Array, n: int) -> jax.Array:
    """The inverse of `_chunked` for n tokens."""
    return x.reshape(-1, *x.shape[2:])[:n]


# --- a weighted sum -----------------------------------------------------------------------------------------------


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
        return (_nll(_logits(h, w_dv), labels)[0] * weights).sum()

    return lax.map(one, (_chunked(h_nd, chunk), _chunked(labels_n, chunk), _chunked(weights_n, chunk))).sum()


def _weighted_fwd(h_nd, w_dv, labels_n, weights_n, chunk):  # type: ignore[no-untyped-def]
    def one(dw, args):
        h, labels, weights = args
        nll, e, total = _nll(_logits(h, w_dv), labels)
        dlogits = _logit_gradients(e / total, labels, weights).astype(h.dtype)
        return dw + _head_wgrad(h, dlogits), ((nll * weights).sum(), _head_dgrad(h, w_dv, dlogits))

    chunks = (_chunked(h_nd, chunk), _chunked(labels_n, chunk), _chunked(weights_n, chunk))
    dw, (losses, dh) = lax.scan(one, jnp.zeros(w_dv.shape, jnp.float32), chunks)
    return losses.sum(), (_tokens(dh, len(h_nd)), dw.astype(w_dv.dtype))


def _weighted_bwd(chunk, saved, g):  # type: ignore[no-untyped-def]
    # Scaled in float32: in BF16 the cotangent, as the weight of the MTP loss, would be 0.3% off.
    dh, dw = saved
    return (dh * g).astype(dh.dtype), (dw * g).astype(dw.dtype), None, None


weighted_nll.defvjp(_weighted_fwd, _weighted_bwd)


# --- each token's own ---------------------------------------------------------------------------------------------


class LogProbs(NamedTuple):
    """Of each token: its log-probability, and the entropy (nats) of the distribution that it comes from; float32 [n]."""

    logp: jax.Array
    entropy: jax.Array


def token_logprobs(
    h_nd: jax.Array,
    w_dv: jax.Array,
    labels_n: jax.Array,
    chunk: int,
    temperature: float = 1.0,
    kept_nw: jax.Array | None = None,
) -> LogProbs:
    """log softmax(h w / temperature)[labels_n] of each token, and the distribution's entropy, which has no gradient.

    h_nd compute dtype, w_dv the head (cast to it), labels_n int32; at most `chunk` rows of logits are in memory, forward
    and backward. kept_nw: uint32, the ids that the token could be drawn from (`id_sets.py`): others have probability 0. A
    set without an id stands for all of them.
    """
    found = _token_logprobs(h_nd, w_dv, labels_n, kept_nw, chunk, temperature)
    return found._replace(entropy=lax.stop_gradient(found.entropy))


def _drawn_from(h_nd: jax.Array, w_dv: jax.Array, kept_nw: jax.Array | None, temperature: float) -> jax.Array:
    """Logits of the distribution that is sampled."""
    logits = _logits(h_nd, w_dv)
    if kept_nw is not None:
        everything = ~kept_nw.any(-1, keepdims=True)
        logits = jnp.where(unpacked(kept_nw, logits.shape[1]) | everything, logits, -jnp.inf)
    # The largest is 0 before it is divided, as where tokens are sampled.
    return logits if temperature == 1.0 else (logits - logits.max(-1, keepdims=True)) / temperature


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _token_logprobs(
    h_nd: jax.Array,
    w_dv: jax.Array,
    labels_n: jax.Array,
    kept_nw: jax.Array | None,
    chunk: int,
    temperature: float,
) -> LogProbs:
    def one(args: Any) -> LogProbs:
        h, labels, kept = args
        logits = _drawn_from(h, w_dv, kept, temperature)
        nll, e, total = _nll(logits, labels)
        shifted = jnp.where(e > 0, logits - logits.max(-1, keepdims=True), 0)
        return LogProbs(-nll, jnp.log(total[:, 0]) - (e * shifted).sum(-1) / total[:, 0])

    args = jax.tree.map(lambda x: _chunked(x, chunk), (h_nd, labels_n, kept_nw))
    return jax.tree.map(lambda x: _tokens(x, len(h_nd)), lax.map(one, args))


def _logprobs_fwd(h_nd, w_dv, labels_n, kept_nw, chunk, temperature):  # type: ignore[no-untyped-def]
    found = _token_logprobs(h_nd, w_dv, labels_n, kept_nw, chunk, temperature)
    return found, (h_nd, w_dv, labels_n, kept_nw)


def _logprobs_bwd(chunk, temperature, saved, g):  # type: ignore[no-untyped-def]
    h_nd, w_dv, labels_n, kept_nw = saved

    def one(dw, args):
        h, labels, kept, g = args
        _, e, total = _nll(_drawn_from(h, w_dv, kept, temperature), labels)
        dlogits = _logit_gradients(e / total, labels, -g / temperature).astype(h.dtype)
        return dw + _head_wgrad(h, dlogits), _head_dgrad(h, w_dv, dlogits)

    chunks = jax.tree.map(lambda x: _chunked(x, chunk), (h_nd, labels_n, kept_nw, g.logp))
    dw, dh = lax.scan(one, jnp.zeros(w_dv.shape, jnp.float32), chunks)
    return _tokens(dh, len(h_nd)), dw.astype(w_dv.dtype), None, None


_token_logprobs.defvjp(_logprobs_fwd, _logprobs_bwd)
