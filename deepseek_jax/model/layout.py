"""How a pass over the model runs: where its tokens are, how they reach their experts, what is computed again.

One object for training, evaluation, prefill and decoding. `single_device` makes it for one device,
`parallel/layout.py` for a mesh. No function of the library takes one by default, and a pass checks that it runs on the
mesh that its layout was made for: a layout that is forgotten is an error, not one device's experts inside a mesh.
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax

from deepseek_jax.model.dispatch import Dispatcher, Local
from deepseek_jax.model.mla import Rope
from deepseek_jax.model.sequence import WHOLE, Whole


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a pass runs.

    dispatcher: brings tokens to their routed experts, wherever they are.
    sequence: where the tokens of a sequence are.
    remat: what the backward pass computes again, a name of `config.REMAT`.
    detached_mtp: the gradients of MTP modules end at what they read of the rest of the model.
    moe_stack: runs the MoE layers of the main model; None: `block.stack`, with the batch whole.
    in_two: a pass over pages with its rows in two halves (`parallel/two_batches.py`), as `decoding.decode`; None: with all rows
      at once.
    mesh: (name, size) of the mesh axes of more than one device inside whose `shard_map` the pass runs.
    """

    dispatcher: Dispatcher
    sequence: Whole = WHOLE
    remat: str = "none"
    detached_mtp: bool = False
    moe_stack: Callable[..., Any] | None = None
    in_two: Callable[..., Any] | None = None
    mesh: tuple[tuple[str, int], ...] = ()

    @property
    def divided(self) -> bool:
        """Whether devices divide sequences."""
        return self.sequence is not WHOLE

    @property
    def forward_only(self) -> "Layout":
        """For passes without a gradient: nothing is computed again, the batch stays whole."""
        return dataclasses.replace(self, remat="none", moe_stack=None)

    def check(self) -> None:
        """Raises ValueError if what is traced is not inside a `shard_map` over the mesh of this layout."""
        around = jax.sharding.get_abstract_mesh()
        bound = {name: around.shape[name] for name in around.manual_axes if around.shape[name] > 1}
        if bound != dict(self.mesh):
            raise ValueError(
                f"a layout made for {_named(self.mesh)} is used on {_named(bound.items())}: build the one of this mesh "
                "by layout_over, many_tokens or few_tokens of deepseek_jax.parallel.layout"
            )


def single_device(remat: str = "none") -> Layout:
    """Everything on one device."""
    return Layout(Local(), remat=remat)


def _named(axes: Iterable[tuple[str, int]]) -> str:
    return " x ".join(f"{name}={size}" for name, size in axes) or "a single device"


class Inputs(NamedTuple):
    """What a pass reads, int32 [b, t] but the last two.

    positions_bt: 0..t-1 by default. segments_bt: tokens of different segments do not see each other; None: all do.
    counted_bt: bool, False for padding, which goes to no routed expert and counts in no load or balance loss; None: all
    tokens count. routes_btlk: integers, the experts that each token goes to in each MoE layer of the main model (dense layers
    and MTP modules have no place in it), as another pass chose them (`Aux.experts_lbtk`, the engine's `Token.routes`); where
    the first of k is negative, and in MTP modules, the router chooses. None: everywhere.
    """

    tokens_bt: jax.Array
    positions_bt: jax.Array | None = None
    segments_bt: jax.Array | None = None
    counted_bt: jax.Array | None = None
    routes_btlk: jax.Array | None = None


class Context(NamedTuple):
    """What all blocks of one pass share; rope and segments are those of all tokens of a sequence.

    counted_bt: which of this device's tokens are routed, and count in loads and balance losses; None for all.
    routes: experts that are given to this device's tokens: of all MoE layers of the main model [l, b, t, k], for a block its own
    [b, t, k]; None: the router chooses.
    """

    rope: Rope
    layout: Layout
    segments_bt: jax.Array | None = None
    counted_bt: jax.Array | None = None
    routes: jax.Array | None = None
