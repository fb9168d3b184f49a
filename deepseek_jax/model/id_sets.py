"""Sets of token ids as bits: bit i % 32 of word i // 32 says whether id i is one of them.

Dims: n row, v vocabulary, w its 32-bit words.
"""

import jax
import jax.numpy as jnp


def words(vocab: int) -> int:
    """32-bit words with a bit for each id."""
    return -(-vocab // 32)


def unpacked(set_nw: jax.Array, v: int) -> jax.Array:
    """A set's bits as bool [n, v]."""
    bits = (set_nw[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)[None, None]) & 1
    return bits.reshape(len(set_nw), -1)[:, :v].astype(bool)


def packed(set_nv: jax.Array) -> jax.Array:
    """The bits of a bool set, uint32 [n, w]."""
    n, v = set_nv.shape
    bits = jnp.pad(set_nv, ((0, 0), (0, -v % 32))).reshape(n, -1, 32).astype(jnp.uint32)
    return (bits << jnp.arange(32, dtype=jnp.uint32)[None, None]).sum(axis=-1, dtype=jnp.uint32)
