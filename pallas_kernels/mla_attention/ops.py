"""Public functions of the attention: forward with log-sum-exp, and backward.

Legend: B batch, H heads, T query tokens, S key tokens, K query and key width, V value width.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import dispatch
from pallas_kernels.mla_attention import fallback, kernel, kernel_backward, reference
from pallas_kernels.mla_attention.shapes import DEFAULT, AttentionConfig


def mla_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments: jax.Array | None = None,
    q_offset: jax.Array | None = None,
    *,
    implementation: str | None = None,
    config: AttentionConfig = DEFAULT,
) -> tuple[jax.Array, jax.Array]:
    """softmax(q k^T) v, causal; scores and softmax in float32.

    Args:
      q: [B, H, T, K], scaled already; bfloat16 or float32, k and v alike.
      k: [B, H, S, K], and v: [B, H, S, V]; finite, also where no query sees them.
      segments: int32 [B, T] with T == S: a query sees keys of its own segment only. None: of all.
      q_offset: int32 [] or [B]: query t has position q_offset + t and sees keys s <= q_offset + t, of which there are S;
        a query of a negative position sees nothing. None: T == S, query t sees keys s <= t. Not with segments.
      implementation: None (by platform), "mosaic", "xla" or "reference".
      config: tiling of the kernel.

    Returns:
      (out [B, H, T, V] of v's dtype, log-sum-exp of the scores float32 [B, H, T]); 0 and +inf for a query that sees
      nothing.
    """
    _check("mla_attention", q, k, v, segments, q_offset)
    operands = (q, k, v, segments, q_offset)
    return dispatch(
        "mla_attention",
        implementation,
        *operands,
        mosaic=functools.partial(kernel.mla_attention, config=config),
        xla=fallback.mla_attention,
        reference=reference.mla_attention,
        unsupported=kernel.unsupported(q, k, v),
    )


def mla_attention_backward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments: jax.Array | None,
    out: jax.Array,
    lse: jax.Array,
    dout: jax.Array,
    *,
    implementation: str | None = None,
    config: AttentionConfig = DEFAULT,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of q, k and v, each of its dtype, given that of the output.

    Args:
      q, k, v, segments, implementation, config: as of `mla_attention`, with T == S and no q_offset.
      out, lse: what it returned.
      dout: [B, H, T, V].
    """
    _check("mla_attention_backward", q, k, v, segments, None)
    shape = (*q.shape[:3], v.shape[3])
    for name, x, expected in (("out", out, shape), ("dout", dout, shape), ("lse", lse, q.shape[:3])):
        if x.shape != expected:
            raise ValueError(
                f"mla_attention_backward: {name} has shape {list(x.shape)}, that of the forward pass is {list(expected)}"
            )
    operands = (q, k, v, segments, out, lse, dout)
    return dispatch(
        "mla_attention_backward",
        implementation,
        *operands,
        mosaic=functools.partial(kernel_backward.mla_attention_backward, config=config),
        xla=fallback.mla_attention_backward,
        reference=reference.mla_attention_backward,
        unsupported=kernel.unsupported(q, k, v),
    )


def _check(op: str, q, k, v, segments, q_offset) -> None:
    """Raises ValueError if the operands do not fit."""
    described = ", ".join(f"{n} {x.dtype}{list(x.shape)}" for n, x in (("q", q), ("k", k), ("v", v)))
    if {x.ndim for x in (q, k, v)} != {4} or k.shape[:3] != v.shape[:3] or q.shape[:2] != k.shape[:2]:
        raise ValueError(f"{op}: {described} do not fit; they are [B, H, T, K], [B, H, S, K], [B, H, S, V]")
    (b, _, t, width), s = q.shape, k.shape[2]
    if k.shape[3] != width or 0 in (*q.shape, *k.shape, *v.shape):
        raise ValueError(f"{op}: {described}; queries and keys have one width, and no dimension is empty")
    if not q.dtype == k.dtype == v.dtype or q.dtype not in (jnp.bfloat16, jnp.float32):
        raise ValueError(f"{op}: {described}; all are bfloat16, or all float32")
    if q_offset is None and t != s:
        raise ValueError(
            f"{op}: {t} queries and {s} keys; where they differ, q_offset says which queries they are"
        )
    if q_offset is not None and segments is not None:
        raise ValueError(f"{op}: segments and q_offset exclude each other")
    if q_offset is not None and (jnp.shape(q_offset) not in ((), (b,)) or t > s):
        raise ValueError(
            f"{op}: q_offset has shape {list(jnp.shape(q_offset))} for {t} queries and {s} keys; it is [] or [{b}], and "
            "queries are among the keys"
        )
    if segments is not None and (segments.shape != (b, t) or not jnp.issubdtype(segments.dtype, jnp.integer)):
        raise ValueError(
            f"{op}: segments is {segments.dtype}{list(segments.shape)}, expected int32 [{b}, {t}]"
        )
