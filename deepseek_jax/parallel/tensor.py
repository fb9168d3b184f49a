"""Tensor and sequence parallel attention (report section 3.4.1: TP4 with SP in the attention of the prefill).

Outside of the attention core, the tokens of a sequence are divided over the mesh axis `tensor`: norms, router,
experts and the residual stream see t / T tokens on each of T devices. Inside, heads are divided. MLA makes the change
cheap: a device projects its own tokens down, and only the latents travel (q_lora_rank + kv_lora_rank +
qk_rope_head_dim values per token, 2112 of DeepSeek-V3's 7168). Up-projections, core and output projection run on the
device's heads, and its partial outputs are summed to the devices of their tokens:

    x [b, t/T, d] -> latents -> all-gather -> q, k, v [b, t, h/T, .] -> core, w_o -> reduce-scatter -> [b, t/T, d]

Every device knows the ids, positions and segments of the whole sequence, so neither an MTP module nor a label has to
reach across to another device.

Runs inside `shard_map` (check_vma=False). Each device differentiates its own part of the loss; the all-gather and the
reduce-scatter are each other's transpose and carry cotangents to the devices they belong to.

Under an FP8 policy, the scales of the sharded weights and of the attention output span what one device holds: blocks
of 128 columns are those of a single device where its share of heads is a multiple of 128 columns wide, as in
DeepSeek-V3; else they begin anew on each device.

Dims: b sequence, t token of the whole sequence, d hidden, q query latent, c key/value latent, r rope.
"""

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh, Mesh

from deepseek_jax.model.cache import LatentCache, PagedView
from deepseek_jax.model.mla import HEADS, Low
from deepseek_jax.model.sequence import WHOLE, Whole
from deepseek_jax.precision.product import Quantised
from pallas_kernels.blocks import BLOCK


@flax.struct.dataclass
class SharedView:
    """The view of the rows of all devices of a mesh axis, in their order: each device keeps the latents of its `own`, and
    gathers those of all, a layer at a time, to attend to them. lengths, positions_bt: of all rows."""

    own: PagedView
    lengths: jax.Array
    positions_bt: jax.Array
    sequence: "Divided" = flax.struct.field(pytree_node=False)

    @property
    def counted_bt(self) -> jax.Array:
        return self.positions_bt >= 0

    @property
    def slots(self) -> int:
        return self.own.slots

    @property
    def pages_lpsw(self) -> jax.Array:
        return self.own.pages_lpsw

    def over(self, pages_lpsw: jax.Array) -> "SharedView":
        return self.replace(own=self.own.over(pages_lpsw))  # type: ignore[attr-defined,no-any-return]

    def append(self, i: Any, new: LatentCache) -> "SharedView":
        return self.replace(own=self.own.append(i, self.sequence.cached(new)))  # type: ignore[attr-defined,no-any-return]

    def gathered(self, i: Any) -> PagedView:
        """The rows' pages in layer i, one row's behind the other's."""
        with jax.named_scope("gather_pages"):
            pages = self.sequence.all_rows(self.own.pages_lpsw[i, self.own.block_table])
        b, n, *token = pages.shape
        table = jnp.arange(b * n, dtype=jnp.int32).reshape(b, n)
        return PagedView(pages.reshape(1, b * n, *token), table, self.lengths, self.positions_bt)


@dataclasses.dataclass(frozen=True)
class Divided(Whole):
    """Sequences divided over a mesh axis into equal parts that follow each other; see `Whole` for the methods."""

    axis: str = "tensor"

    @property
    def parts(self) -> int:
        return lax.axis_size(self.axis)

    def _part(self, x: jax.Array, dim: int) -> jax.Array:
        size = x.shape[dim] // self.parts
        return lax.dynamic_slice_in_dim(x, lax.axis_index(self.axis) * size, size, dim)

    def own(self, x_bt: jax.Array) -> jax.Array:
        return self._part(x_bt, 1)

    def total(self, x: Any) -> Any:
        return lax.psum(x, self.axis)

    def cached(self, latent: LatentCache) -> LatentCache:
        """Latents are gathered anyway: each device keeps whole sequences, an equal part of them."""
        return jax.tree.map(lambda x: self._part(x, 0), latent)

    def gathered(self, low: Low) -> Low:
        with jax.named_scope("gather_latents"):
            all_bt = lax.all_gather(jnp.concatenate(low, axis=-1), self.axis, axis=1, tiled=True)
        return Low(*jnp.split(all_bt, [low.q_btq.shape[-1]], axis=-1))

    def scattered(self, partial_btd: jax.Array) -> jax.Array:
        with jax.named_scope("scatter_output"):
            return lax.psum_scatter(partial_btd, self.axis, scatter_dimension=1, tiled=True)

    def all_rows(self, x_bt: jax.Array) -> jax.Array:
        return lax.all_gather(x_bt, self.axis, tiled=True)

    def own_rows(self, h_btd: jax.Array) -> jax.Array:
        return lax.all_to_all(h_btd, self.axis, 0, 1, tiled=True)

    def own_tokens(self, h_btd: jax.Array) -> jax.Array:
        return lax.all_to_all(h_btd, self.axis, 1, 0, tiled=True)

    def all_views(self, view: Any) -> SharedView:
        return SharedView(view, self.all_rows(view.lengths), self.all_rows(view.positions_bt), self)

    def seen(self, view: Any, i: Any) -> tuple[PagedView, int]:
        return view.gathered(i), 0

    def own_view(self, view: Any) -> Any:
        return view.own

    def ready_heads(self, p: Any) -> Any:
        return {name: self._heads(name, w) if name in HEADS else w for name, w in p.items()}

    def _heads(self, name: str, w: Any) -> Any:
        dim = HEADS[name]
        if not isinstance(w, Quantised):
            return self._part(w, dim)
        assert w.fprop_operand is not None
        shape, along = list(w.shape), -1 if dim == 0 else -2  # of [out, in]
        if (wide := w.fprop_operand.q.shape[along] // self.parts) % BLOCK:
            raise ValueError(
                f"{name} in FP8: {self.parts} devices of {self.axis} would have {wide} columns each, no multiple of the "
                f"{BLOCK} that share a scale: change mesh.{self.axis}, or keep no FP8"
            )
        shape[dim] //= self.parts
        q, scale = (self._part(x, x.ndim + along) for x in (w.fprop_operand.q, w.fprop_operand.scale))
        operand = w.fprop_operand.replace(q=q, scale=scale)  # type: ignore[attr-defined]
        return dataclasses.replace(w, fprop_operand=operand, master_shape=tuple(shape))


def sequence_over(mesh: Mesh | AbstractMesh, tokens: int) -> Whole:
    """The `sequence` argument of a forward pass inside `shard_map`, for sequences of `tokens` tokens.

    Raises ValueError if they do not divide over the axis `tensor`.
    """
    parts = mesh.shape["tensor"]
    if parts == 1:
        return WHOLE
    if tokens % parts:
        raise ValueError(
            f"sequences of {tokens} tokens do not divide over tensor={parts} devices; change data.seq_len or "
            "config.mesh.tensor"
        )
    return Divided()
