"""A hop inside a node whose devices write into each other's memory (`pallas_kernels/peer_exchange`).

What device q sends here has places of its own, as many as there are rows at the source of the hop, of which the first so many
are taken as there are rows. So nobody exchanges counts first, and nothing is packed, padded or zeroed.

Dims: m row at the source, p peer, r row received (p * m places), w word.
"""

import flax.struct
import jax
import jax.numpy as jnp

from deepseek_jax.parallel.exchange.hops import static
from deepseek_jax.parallel.exchange.ragged import Axis
from deepseek_jax.parallel.exchange.wire import Message
from pallas_kernels.peer_exchange.ops import peer_exchange


@flax.struct.dataclass
class PeerHop:
    """rows_pm int32: the row that goes to each place at each peer; counts_p: how many go there. received_p: how many came;
    None before `there`. row_mj int32: where the results of each row come back, by peer; p * m for none."""

    rows_pm: jax.Array
    counts_p: jax.Array
    row_mj: jax.Array
    received_p: jax.Array | None
    axis: Axis = static()

    @property
    def live_r(self) -> jax.Array:
        """Which of the places received are taken; the others may hold anything."""
        assert self.received_p is not None
        return (jnp.arange(self.rows_pm.shape[1])[None] < self.received_p[:, None]).reshape(-1)

    def there(self, message: Message) -> tuple[Message, "PeerHop"]:
        """Rows at the source -> rows received, and the hop that knows which."""
        words_pmw, received_p = peer_exchange(message.words_nw, self.rows_pm, self.counts_p, self.axis)
        hop = self.replace(received_p=received_p)  # type: ignore[attr-defined]
        return message.with_words(words_pmw.reshape(-1, words_pmw.shape[-1])), hop

    def back(self, message: Message) -> Message:
        """Rows received -> rows as they were sent, by peer and place."""
        assert self.received_p is not None
        own_pm = jnp.arange(self.rows_pm.size, dtype=jnp.int32).reshape(self.rows_pm.shape)
        words_pmw, _ = peer_exchange(message.words_nw, own_pm, self.received_p, self.axis)
        return message.with_words(words_pmw.reshape(-1, words_pmw.shape[-1]))


def plan_peers(to_mp: jax.Array, axis: Axis) -> PeerHop:
    """Row m goes to every peer p with `to_mp`."""
    m, p = to_mp.shape
    place_mp = jnp.where(to_mp, jnp.cumsum(to_mp, 0, dtype=jnp.int32) - 1, m)
    peer_mp = jnp.broadcast_to(jnp.arange(p, dtype=jnp.int32)[None], (m, p))
    row_mp = jnp.broadcast_to(jnp.arange(m, dtype=jnp.int32)[:, None], (m, p))
    rows_pm = jnp.zeros((p, m), jnp.int32).at[peer_mp, place_mp].set(row_mp, mode="drop")
    row_mj = jnp.where(to_mp, peer_mp * m + place_mp, p * m)
    return PeerHop(rows_pm, to_mp.sum(0, dtype=jnp.int32), row_mj, None, axis)
