"""Causal attention core: exact softmax attention in query chunks that read only the keys they may see.

Dims: b batch, h heads, t query token, s key token, k query/key head dim, v value head dim.
"""

import jax
import jax.numpy as jnp

# A query chunk is a dense product; below this many rows its overhead shows, above it masked work does.
MIN_CHUNK = 64
MAX_CHUNKS = 8


def _chunk(t: int) -> int:
    """Rows per query chunk: at most MAX_CHUNKS chunks, each at least MIN_CHUNK rows."""
    return max(MIN_CHUNK, -(-t // MAX_CHUNKS))


def causal_attention(
    q_bthk: jax.Array,
    k_bshk: jax.Array,
    v_bshv: jax.Array,
    scale: float,
    segments_bt: jax.Array | None = None,
) -> jax.Array:
    """softmax(scale * q k^T + mask) v -> [b, t, h, v]; scores and softmax in float32.

    Token t sees tokens s <= t, and only those of its own segment if `segments_bt` (int32) is given.
    """
    q_bhtk, k_bhsk, v_bhsv = (jnp.swapaxes(x, 1, 2) for x in (q_bthk, k_bshk, v_bshv))
    t, outs = q_bhtk.shape[2], []
    step = _chunk(t)
    for start in range(0, t, step):
        end = min(start + step, t)
        keys, values = k_bhsk[:, :, :end], v_bhsv[:, :, :end]
        s = jnp.einsum("bhtk,bhsk->bhts", q_bhtk[:, :, start:end], keys, preferred_element_type=jnp.float32)
        seen = jnp.arange(end)[None, :] <= jnp.arange(start, end)[:, None]
        if segments_bt is not None:
            same = segments_bt[:, start:end, None] == segments_bt[:, None, :end]
            seen = (seen & same)[:, None]
        p = jax.nn.softmax(jnp.where(seen, s * scale, -jnp.inf), axis=-1).astype(values.dtype)
        outs.append(jnp.einsum("bhts,bhsv->bhtv", p, values))
    return jnp.swapaxes(jnp.concatenate(outs, axis=2), 1, 2)
