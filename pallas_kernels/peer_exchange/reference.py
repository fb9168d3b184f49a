"""Defines what the exchange means, by collectives of jax: chunks padded to one size; and is what runs without a kernel.

Dims: n row of this device, w word, p peer, m place.
"""

import jax
import jax.numpy as jnp
from jax import lax


def peer_exchange(
    x_nw: jax.Array, rows_pm: jax.Array, counts_p: jax.Array, *, axis: tuple[str, ...]
) -> tuple[jax.Array, jax.Array]:
    """Arguments and results as `ops.peer_exchange`; places without a row are zero."""
    there_pm = jnp.arange(rows_pm.shape[1])[None] < counts_p[:, None]
    sent_pmw = x_nw.at[jnp.where(there_pm, rows_pm, len(x_nw))].get(mode="fill", fill_value=0)
    return tuple(lax.all_to_all(x, axis, 0, 0, tiled=True) for x in (sent_pmw, counts_p))  # type: ignore[return-value]
