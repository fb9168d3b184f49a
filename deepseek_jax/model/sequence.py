"""Where the tokens of a sequence are: all on this device, unless `parallel/tensor.py` divides them over several.

Most of the model looks at one token at a time and does not care. Attention, the tokens that an MTP module reads ahead
and the sequence-wise balance loss look further: they ask here.

Dims: b sequence, t token of the whole sequence, d hidden.
"""

from typing import Any

import jax

from deepseek_jax.model.mla import Low


class Whole:
    """Whole sequences on one device: nothing is elsewhere."""

    @property
    def parts(self) -> int:
        """Over how many devices a sequence is divided, equally."""
        return 1

    def own(self, x_bt: jax.Array) -> jax.Array:
        """The tokens of this device, of an array [b, t, ...] of them all."""
        return x_bt

    def total(self, x: Any) -> Any:
        """Sum over the devices that share a sequence. Not to be differentiated."""
        return x

    def gathered(self, low: Low) -> Low:
        """All tokens of the sequences, projected down, from this device's."""
        return low

    def scattered(self, partial_btd: jax.Array) -> jax.Array:
        """This device's tokens, summed over all heads, from the sum over this device's heads for all tokens."""
        return partial_btd

    # Over pages, each device has rows of its own, whose latents it keeps; those that divide sequences run all of them.

    def all_rows(self, x_bt: jax.Array) -> jax.Array:
        """The rows [b, ...] of all devices that divide sequences, from this device's."""
        return x_bt

    def own_rows(self, h_btd: jax.Array) -> jax.Array:
        """All tokens of this device's rows, from this device's tokens of all rows."""
        return h_btd

    def own_tokens(self, h_btd: jax.Array) -> jax.Array:
        """The inverse of `own_rows`."""
        return h_btd

    def all_views(self, view: Any) -> Any:
        """The view of all rows, from that of this device's."""
        return view

    def seen(self, view: Any, i: Any) -> tuple[Any, Any]:
        """What the new tokens attend to in layer i, all rows' latents: a view, and which layer of it."""
        return view, i

    def own_view(self, view: Any) -> Any:
        """The inverse of `all_views`, after latents were written."""
        return view

    def ready_heads(self, p: Any) -> Any:
        """This device's heads of an attention's prepared weights (`mla.py: HEADS`), which it holds whole."""
        return p


WHOLE = Whole()
