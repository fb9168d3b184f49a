"""The programs of `programs.py` over the devices of a mesh, each of which is a rank of the engine: what the engine launches.

Attention is data parallel: each device has slots, pages and a scheduler of its own. Nothing of a sequence leaves its device but
tokens on their way to experts, and sums on their way back. So all devices run the same program at the same time, of the size
that any of them needs; who has no sequence for it runs rows of padding, which go to no expert, and serves the others'.

Decode rows, and chunks of few tokens, take the exchange made for few tokens: no wait for the host, and each token has a row
for each node, taken or not. Longer chunks take the one for many, which sends the rows that there are, after four waits a
layer, some 0.1 ms. Of DeepSeek-V3 on 8 nodes a token in FP8 there sends 3.06 rows to other nodes (3.5 nodes, of which 1/8
is its own) instead of 7, each of 7,456 bytes out and 14,336 back: 67 instead of 153 kB, 2.1 us at 40 GB/s. From FEW tokens on,
that is more than the waits take; and buffers for few tokens hold all tokens of all devices. Over `tensor`, chunks for many
tokens are divided: each device of a group takes a part of the tokens of the group's rows, and of the heads, whose latents it
gathers from their pages (`parallel/tensor.py`).

From so many tokens of a device on as `overlap` says (`overlap.py`), the rows of a program are in two halves, one of which
computes while the other's tokens travel (`parallel/two_batches.py`). So each size has one form.

Dims: s slot, r row of a program, on all devices one after the other.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from deepseek_jax.balancing.plan import Ints, Plan
from deepseek_jax.checks import require
from deepseek_jax.config import MeshConfig, ModelConfig
from deepseek_jax.model.layout import Layout
from deepseek_jax.parallel.compiler import compiler_options
from deepseek_jax.parallel.exchange.dispatcher import AS_IT_IS
from deepseek_jax.parallel.exchange.wire import Wire
from deepseek_jax.parallel.layout import few_tokens, halved, many_tokens
from deepseek_jax.parallel.mesh import TOKEN_AXES
from deepseek_jax.parallel.prepared import (
    WHOLE,
    Devices,
    generation_mesh,
    parameter_specs,
    ready_specs,
)
from deepseek_jax.parallel.slots import Slots
from deepseek_jax.parallel.two_batches import divides
from deepseek_jax.precision.policy import Policy
from deepseek_jax.serving.drafting import decode_pairs
from deepseek_jax.serving.one_device import Call, OneDevice, several
from deepseek_jax.serving.programs import (
    Chunks,
    DecodeRows,
    State,
    Weights,
    brought,
    decode_rows,
    decode_times,
    empty_state,
    prefill_chunks,
    taken,
)
from deepseek_jax.serving.sampler import Row, put
from deepseek_jax.serving.sizes import Sizes

FEW = 64  # tokens of a device: up to so many of a chunk take the exchange of decoding

ROWS, BY_LAYER = PartitionSpec(TOKEN_AXES), PartitionSpec(None, TOKEN_AXES)
STATE = State(
    pages_lpsw=BY_LAYER,  # type: ignore[arg-type]
    **dict.fromkeys(("table_sn", "length_s", "token_s", "slots", "h_sd", "loads_le"), ROWS),  # type: ignore[arg-type]
)


class Programs(NamedTuple):
    """Jitted, over global arrays; all but `empty` consume the state.

    empty: (sizes, pages, fp8, drafts) -> state; admit: (state, rank, slot, row) -> state; decode, decode_pairs: (weights, state,
    rows, times, most), prefill: (weights, state, chunks, most) -> (state, what they give). counted: loads of experts of each
    device -> (zeros, their sum). taken, brought: of each device, as in `programs.py`.
    """

    empty: Callable[..., State]
    admit: Callable[..., State]
    decode: Callable[..., Any]
    decode_pairs: Callable[..., Any]
    prefill: Callable[..., Any]
    counted: Callable[..., Any]
    taken: Callable[..., Any]
    brought: Callable[..., State]


def layout_of(
    program: tuple[Any, ...],
    cfg: ModelConfig,
    mesh: MeshConfig,
    devices: Any,
    wire: Wire,
    overlap: int | None,
    in_slots: bool = False,
) -> Layout:
    """Of the program of this name (`pace.py`), whose sizes are those of each device. overlap: from how many tokens on its rows
    are in two halves, where they have any; None: never. in_slots: experts lie where plans say."""
    kind, rows, *more = program
    tokens = more[0] if kind == "prefill" else 2 if kind == "drafts" else 1
    layout = few_tokens(cfg, mesh, devices, wire)
    if kind == "prefill" and rows * tokens > FEW and tokens % devices.shape["tensor"] == 0:
        layout = many_tokens(cfg, mesh, devices, tokens, wire, in_slots)
    parts = devices.shape["tensor"] if layout.divided else 1
    large = overlap is not None and rows * tokens >= overlap and cfg.num_moe_layers > 0
    fits = large and divides(rows, tokens, parts)
    return halved(layout) if fits else layout


def wire_of(policy: Policy | None) -> Wire:
    """In which formats tokens travel where the mesh config does not say: those of the weights' policy."""
    return AS_IT_IS if policy is None else Wire(policy.dispatch, policy.combine)


@functools.cache
def programs(
    cfg: ModelConfig,
    mesh: MeshConfig,
    policy: Policy | None = None,
    at: Devices = None,
    in_slots: bool = False,
    overlap: int | None = None,
    shared_routed: bool = False,
) -> Programs:
    """Of a model over a mesh. cfg: that decoding runs with. policy: of weights in FP8. in_slots: experts are, and their loads are
    counted. overlap: see `layout_of`. shared_routed: the shared expert is in slots, too. Raises ValueError as `generation_mesh`,
    and for experts that do not divide where they are in no slots."""
    devices = generation_mesh(cfg, mesh, at)
    wire = wire_of(policy)
    specs = parameter_specs(cfg, mesh, devices, in_slots, shared_routed)
    of_ready = ready_specs(cfg, specs, placed=in_slots)
    weights_specs = Weights(of_ready, WHOLE, WHOLE)
    over_devices = functools.partial(jax.shard_map, mesh=devices, check_vma=False)
    options = compiler_options(mesh, devices)
    consuming = functools.partial(jax.jit, donate_argnames="state", compiler_options=options)

    @functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
    def empty(sizes: Sizes, pages: int, fp8: bool, drafts: bool) -> State:
        one = functools.partial(empty_state, cfg, sizes.slots, pages, sizes.pages_each, fp8, drafts, in_slots)
        return over_devices(one, in_specs=(), out_specs=STATE)()

    @consuming
    @functools.partial(over_devices, in_specs=(STATE, WHOLE, WHOLE, WHOLE), out_specs=STATE)
    def admit(state: State, rank: jax.Array, slot: jax.Array, row: Row) -> State:
        nowhere = len(state.length_s)
        here = jnp.where(lax.axis_index(TOKEN_AXES) == rank, slot, nowhere)
        return state._replace(slots=put(state.slots, here, row))

    def decoding(name: str, program: Callable[..., Any]) -> Callable[..., Any]:
        @functools.partial(consuming, static_argnames="most")
        def decode(weights: Weights, state: State, rows: DecodeRows, times: Any, most: int | None) -> Any:
            each = len(rows.slot_r) // devices.size
            layout = layout_of((name, each), cfg, mesh, devices, wire, overlap)

            def run(weights: Weights, state: State, rows: DecodeRows, times: Any) -> Any:
                return decode_times(program, weights, cfg, layout, state, rows, times, most)

            specs = (weights_specs, STATE, ROWS, WHOLE)
            return over_devices(run, in_specs=specs, out_specs=(STATE, BY_LAYER))(weights, state, rows, times)

        return decode

    @functools.partial(consuming, static_argnames="most")
    def prefill(weights: Weights, state: State, chunks: Chunks, most: int | None) -> Any:
        r, t = chunks.tokens_rt.shape
        layout = layout_of(("prefill", r // devices.size, t), cfg, mesh, devices, wire, overlap, in_slots)

        def run(weights: Weights, state: State, chunks: Chunks) -> Any:
            return prefill_chunks(weights, cfg, layout, state, chunks, most)

        return over_devices(run, in_specs=(weights_specs, STATE, ROWS), out_specs=(STATE, ROWS, ROWS))(
            weights, state, chunks
        )

    @functools.partial(jax.jit, donate_argnums=0, compiler_options=options)
    @functools.partial(over_devices, in_specs=(ROWS,), out_specs=(ROWS, WHOLE))
    def counted(loads_le: jax.Array) -> Any:
        return jnp.zeros_like(loads_le), lax.psum(loads_le, TOKEN_AXES)

    take = jax.jit(over_devices(taken, in_specs=(BY_LAYER, ROWS), out_specs=ROWS))
    bring = consuming(over_devices(brought, in_specs=(STATE, ROWS, ROWS), out_specs=STATE))
    rows, pairs = decoding("decode", decode_rows), decoding("drafts", decode_pairs)
    return Programs(empty, admit, rows, pairs, prefill, counted, take, bring)


class OverMesh(OneDevice):
    """As `OneDevice`, over the devices of a mesh.

    Args:
        cfg: the config that decoding runs with.
        sizes, pages, fp8, drafts: of each device.
        mesh: `data`, `node`, `local`, `tensor`; `experts`, `dispatch`, `combine` and `receive` as in training.
        policy: of weights in FP8.
        redundant: experts more than the model has, in each layer, of which `weights` brings the model's own in their order; or the
            plan in whose slots they come; None: they lie in their order, and never move.

    Attributes:
        slots: in which experts lie, where they move.

    Raises:
        ValueError: a mesh that does not fit the devices or the model.
    """

    def __init__(
        self,
        cfg: ModelConfig,
        sizes: Sizes,
        pages: int,
        fp8: bool = False,
        drafts: bool = False,
        *,
        mesh: MeshConfig,
        policy: Policy | None = None,
        redundant: int | Plan | None = None,
        at: Devices = None,
    ):
        self.devices: Mesh = generation_mesh(cfg, mesh, at)
        self.ranks = self.devices.size
        plan = redundant if isinstance(redundant, Plan) else None
        redundant = redundant.redundant if isinstance(redundant, Plan) else redundant
        if redundant is not None:
            self.slots = Slots(cfg, mesh, redundant, at, plan)
        shared_routed = self.slots is not None and self.slots.shared_routed
        self._run = programs(cfg, mesh, policy, at, redundant is not None, sizes.overlap, shared_routed)
        self._layout_of = functools.partial(
            layout_of,
            cfg=cfg,
            mesh=mesh,
            devices=self.devices,
            wire=wire_of(policy),
            overlap=sizes.overlap,
            in_slots=redundant is not None,
        )
        self._rows, self._whole = (NamedSharding(self.devices, spec) for spec in (ROWS, WHOLE))
        self._gather = jax.jit(lambda x: x, out_shardings=self._whole)
        self._one_of = jax.jit(
            lambda x, rank: lax.dynamic_slice_in_dim(x, rank * sizes.moved, sizes.moved),
            out_shardings=self._whole,
        )
        self._all_may_come: dict[int, jax.Array] = {}
        self._empty_blocks: dict[Any, jax.Array] = {}
        super().__init__(cfg, sizes, pages, fp8, drafts)

    def in_two(self, program: tuple[Any, ...]) -> bool:
        return self._layout_of(program).in_two is not None

    def _empty(self, fp8: bool) -> State:
        return self._run.empty(self.sizes, self.pages, fp8, self.drafts)

    def _admit(self, rank: int, slot: int, row: Row) -> None:
        self._state = self._run.admit(self._state, np.int32(rank), np.int32(slot), row)

    _weights: Weights | None = None

    @property
    def weights(self) -> Weights | None:
        """Bias and number of ids are brought to all devices when they are set, not in each step; and experts, which are given in
        their order, into the slots of the plan."""
        return self._weights

    @weights.setter
    def weights(self, new: Weights | None) -> None:
        if new is not None:
            require(
                self._weights is None or self._rows.is_fully_addressable,
                "an engine over several processes keeps its weights: start the processes again for others",
            )
            require(
                self._weights is None or self.slots is None or not self.slots.came_in_slots,
                "experts that were read into slots have moved since: give an engine of new weights a model of its own",
            )
            bias_le, num_ids = jax.tree.map(lambda x: self._put(np.asarray(x), self._whole), new[1:])
            ready = new.ready if self.slots is None else self.slots.filled(new.ready)
            new = Weights(ready, bias_le, num_ids)
        self._weights = new

    def move(self, layer: int, physical_p: Ints) -> None:
        """Puts the experts of a layer, counted from the first with experts, where a new plan has them; what is launched from now
        on finds them there."""
        assert self.slots is not None and self._weights is not None
        self._weights = self._weights._replace(ready=self.slots.moved(self._weights.ready, layer, physical_p))

    def wait(self) -> None:
        """Until what was moved is there."""
        jax.block_until_ready(self._weights)

    def loads(self) -> jax.Array:
        """Rows that went to each expert of each layer since the last call, of all ranks, int32 [l, e], on their way to the host."""
        zeros, loads_le = self._run.counted(self._state.loads_le)
        self._state = self._state._replace(loads_le=zeros)
        loads_le.copy_to_host_async()
        return loads_le  # type: ignore[no-any-return]

    def warm_up(self) -> Iterator[str]:
        yield from super().warm_up()
        if self.slots is not None:
            yield "moves of experts"
            for layer in sorted({0, self.slots.layers - 1}):
                self.move(layer, self.slots.plan.physical_lp[layer].copy())
            self.loads()

    def _decoding(
        self, program: Callable[..., Any], rows: DecodeRows, most: int | None, times: int = 1
    ) -> Call:
        run = self._run.decode_pairs if program is decode_pairs else self._run.decode
        return run, (self.weights, self._state, self._placed(rows), several(times), most)

    def _prefilling(self, chunks: Chunks, most: int | None) -> Call:
        return self._run.prefill, (self.weights, self._state, self._placed(chunks), most)

    def export(self, rank: int, pages: list[int]) -> jax.Array:
        """Where there are several processes, on this one."""
        blocks = self._run.taken(self._state.pages_lpsw, self._put(self._of_all(rank, pages)))
        if not self._rows.is_fully_addressable:
            return self._one_of(blocks, np.int32(rank)).addressable_data(0)  # type: ignore[no-any-return]
        return next(x.data for x in blocks.addressable_shards if x.device == self.place(rank))

    def bring(self, rank: int, pages: list[int], block: Any) -> None:
        n, *rest = self.block.shape
        shape = (self.ranks * n, *rest)
        blocks = [
            jax.device_put(block, device) if device == self.place(rank) else self._nothing(device)
            for device in self._rows.addressable_devices_indices_map(shape)
        ]
        placed = jax.make_array_from_single_device_arrays(shape, self._rows, blocks)
        self._state = self._run.brought(self._state, self._put(self._of_all(rank, pages)), placed)

    def place(self, rank: int) -> Any:
        where = self._rows.devices_indices_map((self.ranks,))
        return next(device for device, (at,) in where.items() if (at.start or 0) == rank)

    def _nothing(self, device: Any) -> jax.Array:
        if device not in self._empty_blocks:
            self._empty_blocks[device] = jax.device_put(np.zeros(self.block.shape, self.block.dtype), device)
        return self._empty_blocks[device]

    def _of_all(self, rank: int, pages: list[int]) -> np.ndarray:
        page_rn = np.full((self.ranks, self.sizes.moved), -1, np.int32)
        page_rn[rank, : len(pages)] = pages
        return page_rn.reshape(-1)

    def _readable(self, results: Any) -> Any:
        return results if self._rows.is_fully_addressable else self._gather(results)

    def _placed(self, plan: Any) -> Any:
        """A plan, rows over the devices."""
        placed = jax.tree.map(self._put, plan._replace(mask_rw=None))
        masked = isinstance(plan.mask_rw, np.ndarray)
        return placed._replace(mask_rw=self._put(plan.mask_rw) if masked else self._no_mask(len(plan.slot_r)))

    def _no_mask(self, rows: int) -> jax.Array:
        if rows not in self._all_may_come:
            self._all_may_come[rows] = self._put(np.full((rows, self.words), 2**32 - 1, np.uint32))
        return self._all_may_come[rows]

    def _put(self, x: np.ndarray, sharding: NamedSharding | None = None) -> jax.Array:
        sharding = sharding or self._rows
        if sharding.is_fully_addressable:
            return jax.device_put(x, sharding)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])
