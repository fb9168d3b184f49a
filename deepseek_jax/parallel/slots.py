"""Experts in slots: where the prepared weights of a model's experts lie over a mesh, and how they get from one plan to the next.

A layer's `ffn` then has its experts by slots, [slot, ...] in the place of [expert, ...], and beside them the `placement` that says
which slots hold which expert. Both change together, by one program, which is compiled once for all layers and plans: what differs
are arrays. It takes the memory of one layer's experts beside those that there are, of two where layers are stacked. To fill the
slots takes that of all (`bytes_in_slots`).

Dims: l layer, p slot, e expert, c copy of an expert.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from deepseek_jax.balancing.eplb import planned
from deepseek_jax.balancing.loads import with_shared
from deepseek_jax.balancing.moves import sources
from deepseek_jax.balancing.plan import Ints, Plan, Unit
from deepseek_jax.checks import require
from deepseek_jax.config import MeshConfig, ModelConfig
from deepseek_jax.model.decoding import unrolled
from deepseek_jax.parallel.compiler import compiler_options
from deepseek_jax.parallel.exchange.dispatcher import FLAT
from deepseek_jax.parallel.exchange.moves import moved
from deepseek_jax.parallel.exchange.placement import Placement
from deepseek_jax.parallel.mesh import EXPERT_AXES, expert_exchange
from deepseek_jax.parallel.prepared import WHOLE, Devices, experts_spec, generation_mesh, parameter_specs


def unit_over(
    cfg: ModelConfig, mesh: MeshConfig, devices: Mesh, redundant: int, shared_routed: bool = False
) -> Unit:
    """What plans are made for: slots for the model's experts and `redundant` more, over the devices that share them. shared_routed:
    the shared expert is one of them, which is of none of the gate's groups: plans then do not look at groups.

    Raises ValueError for experts that all devices have, and for a number of slots that does not divide.
    """
    spread = expert_exchange(mesh, devices) != "replicated" and cfg.n_routed_experts > 0
    require(
        spread,
        f"redundant={redundant}: there is no device without the experts of another: give a mesh with node x local x tensor > 1 "
        "that shares the experts (mesh.experts), or leave redundant experts and plans out",
    )
    node, holders = devices.shape["node"], int(np.prod([devices.shape[a] for a in EXPERT_AXES]))
    experts = cfg.n_routed_experts + shared_routed
    slots = experts + redundant
    require(
        slots % holders == 0,
        f"{experts} experts and redundant={redundant} more do not divide over {holders} devices of "
        f"node x local x tensor: give {-experts % holders} more, or that and a multiple of {holders}",
    )
    return Unit(slots, 1 if shared_routed else cfg.n_group, node, holders)


class InSlots(NamedTuple):
    """How the experts of a checkpoint are read: so many more than the model has, copies of busy ones (0: none has copies, and all
    move); shared_routed: the shared expert as one more routed one, with copies."""

    redundant: int = 0
    shared_routed: bool = False


def plan_over(cfg: ModelConfig, mesh: MeshConfig, asked: InSlots, at: Devices = None) -> Plan:
    """The plan to begin with, when no load is known: of the MoE layers, and of the MTP module. Raises ValueError as `unit_over`,
    and for a shared expert that cannot be one of the others."""
    require(
        not asked.shared_routed or cfg.n_shared_experts == 1,
        f"shared_routed: the model has {cfg.n_shared_experts} shared experts, and one can be routed as one more of the others; leave "
        "it out",
    )
    unit = unit_over(cfg, mesh, generation_mesh(cfg, mesh, at), *asked)
    load_le: Any = np.ones((_layers(cfg), cfg.n_routed_experts))
    return planned(with_shared(load_le, cfg.num_experts_per_tok) if asked.shared_routed else load_le, unit)


def _layers(cfg: ModelConfig) -> int:
    """With experts in slots: of the model, and of the MTP module that drafts."""
    return cfg.num_moe_layers + min(1, cfg.num_nextn_predict_layers)


def bytes_in_slots(ready: Any, cfg: ModelConfig, redundant: int) -> int:
    """What the experts of `ready`, which lie in their order, take on a device once they lie in slots: beside them, until whoever has
    `ready` lets go of it."""
    blocks = [*_listed(ready.get("moe_layers")), *([ready["mtp"]["block"]] if "mtp" in ready else [])]
    leaves = jax.tree.leaves([block["ffn"]["experts"] for block in blocks])
    held = sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)
    return held * (cfg.n_routed_experts + redundant) // cfg.n_routed_experts


def _listed(blocks: Any) -> list[Any]:
    """Blocks that lie apart, or are stacked, or are not there."""
    return blocks if isinstance(blocks, list) else [] if blocks is None else [blocks]


class Programs(NamedTuple):
    """Jitted. fill: (experts, source_p or, of stacked layers, source_lp) -> experts in slots. move: (experts in slots, which it
    consumes, placement, layer, source_p, its new placement) -> (experts, placement); layer: of stacked ones, else None."""

    fill: Callable[..., Any]
    move: Callable[..., Any]


@functools.cache
def programs(cfg: ModelConfig, mesh: MeshConfig, slots: int, stacked: bool, at: Devices = None) -> Programs:
    """For the experts of layers that lie apart, or are `stacked`. cfg: that decoding runs with."""
    devices = generation_mesh(cfg, mesh, at)
    options = compiler_options(mesh, devices)
    new = slots // int(np.prod([devices.shape[a] for a in EXPERT_AXES]))
    specs = parameter_specs(cfg, mesh, devices, in_slots=True)
    spec = experts_spec(specs, "moe_layers" if cfg.num_moe_layers else "mtp")
    spec = spec if stacked else PartitionSpec(*spec[1:])
    over_devices = functools.partial(jax.shard_map, mesh=devices, check_vma=False)

    @functools.partial(jax.jit, compiler_options=options)
    @functools.partial(over_devices, in_specs=(spec, WHOLE), out_specs=spec)
    def fill(experts: Any, source: jax.Array) -> Any:
        return _all_layers(experts, source, new) if stacked else moved(experts, source, new)

    @functools.partial(jax.jit, donate_argnums=0, compiler_options=options)
    def move(experts: Any, placement: Placement, layer: Any, source_p: Any, placed: Placement) -> Any:
        def run(experts: Any, placement: Placement, layer: Any, source_p: Any, placed: Placement) -> Any:
            if layer is None:
                return moved(experts, source_p, new), placed
            one = jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, layer, keepdims=False), experts)
            one = moved(one, source_p, new), placed
            put = functools.partial(lax.dynamic_update_index_in_dim, index=layer, axis=0)
            return jax.tree.map(put, (experts, placement), one)

        specs = (spec, WHOLE, WHOLE, WHOLE, WHOLE)
        return over_devices(run, in_specs=specs, out_specs=(spec, WHOLE))(
            experts, placement, layer, source_p, placed
        )

    return Programs(fill, move)


def _all_layers(experts: Any, source_lp: Any, new: int) -> Any:
    return lax.map(lambda layer: moved(layer[0], layer[1], new), (experts, jnp.asarray(source_lp)))


def check_plan(plan: Plan, cfg: ModelConfig, mesh: MeshConfig, devices: Any) -> None:
    """Raises ValueError for a plan that is not one of a model's MoE layers, without MTP modules, over a mesh."""
    layers, slots = plan.physical_lp.shape
    require(layers == cfg.num_moe_layers, f"a plan of {layers} layers for {cfg.num_moe_layers} MoE layers")
    unit = unit_over(cfg, mesh, devices, slots - cfg.n_routed_experts)
    plan.checked(cfg.n_routed_experts, unit.slots)


def in_slots(params: Any, plan: Plan) -> Any:
    """Parameters of a forward pass, inside `shard_map`: those of MoE layers with this device's experts, which lie in their order,
    in its slots of a plan."""
    new = plan.physical_lp.shape[1] // lax.axis_size(FLAT[0])
    experts = _all_layers(params["moe_layers"]["ffn"]["experts"], plan.physical_lp, new)
    placement = Placement(jnp.asarray(plan.log2phy), jnp.asarray(plan.logcnt))
    return {**params, "moe_layers": _with(params["moe_layers"], experts, placement)}


class Slots:
    """The experts of a model's prepared parameters, in slots over a mesh.

    Args:
        cfg: the config that decoding runs with.
        plan: in whose slots the experts come, as `deepseek_jax.hf.load` reads them; None: they come in their order.

    Attributes:
        plan: which expert each slot holds, of all MoE layers, the MTP module's last.
        shared_routed: whether the shared expert is one of them, the last.

    Raises:
        ValueError: as `unit_over`.
    """

    def __init__(
        self, cfg: ModelConfig, mesh: MeshConfig, redundant: int, at: Devices = None, plan: Plan | None = None
    ):
        self.devices, self.came_in_slots = generation_mesh(cfg, mesh, at), plan is not None
        self.shared_routed = plan is not None and plan.experts > cfg.n_routed_experts
        self.unit = unit_over(cfg, mesh, self.devices, redundant, self.shared_routed)
        self.cfg, self.layers = cfg, _layers(cfg)
        self.plan = (
            plan_over(cfg, mesh, InSlots(redundant), at) if plan is None else Plan(plan.physical_lp.copy())
        )
        self._stacked = cfg.num_moe_layers > 0 and not unrolled(cfg)
        self._of_layer, self._of_stack = (
            programs(cfg, mesh, self.unit.slots, stacked, at) for stacked in (False, True)
        )
        self._copies = redundant + 1  # of an expert, at most

    def filled(self, ready: Any) -> Any:
        """`ready` with experts in the slots of the plan, where they do not lie there already, and their placement. What does not
        change is shared with it."""
        source_lp, tables = self.plan.physical_lp, self._placements(self.plan)
        first = self.cfg.num_moe_layers if self._stacked else 0  # of those that lie apart

        def fill(programs: Programs, experts: Any, source: Any) -> Any:
            return experts if self.came_in_slots else programs.fill(experts, source)

        if self._stacked:
            experts = fill(self._of_stack, ready["moe_layers"]["ffn"]["experts"], source_lp[:first])
            placement = self._put(_rows(tables, slice(0, first)))
            ready = {**ready, "moe_layers": _with(ready["moe_layers"], experts, placement)}
        for layer in range(first, self.layers):
            experts = fill(self._of_layer, _ffn(ready, self.cfg, layer)["experts"], source_lp[layer])
            ready = _replaced(ready, self.cfg, layer, experts, self._put(_rows(tables, layer)))
        return ready

    def moved(self, ready: Any, layer: int, new_p: Ints) -> Any:
        """`ready` with the experts of a layer in the slots of `new_p`, which is then the plan. Consumes them."""
        new, old = Plan(new_p[None]), Plan(self.plan.physical_lp[layer][None])
        (source_p,) = sources(new, old, self.unit.gpus, self.unit.nodes)
        placed = self._put(_rows(self._placements(new), 0))
        self.plan.physical_lp[layer] = new_p
        if self._stacked and layer < self.cfg.num_moe_layers:
            ffn = ready["moe_layers"]["ffn"]
            out = self._of_stack.move(ffn["experts"], ffn["placement"], np.int32(layer), source_p, placed)
            return {**ready, "moe_layers": _with(ready["moe_layers"], *out)}
        ffn = _ffn(ready, self.cfg, layer)
        out = self._of_layer.move(ffn["experts"], ffn["placement"], None, source_p, placed)
        return _replaced(ready, self.cfg, layer, *out)

    def _placements(self, plan: Plan) -> Placement:
        """Of all layers, host arrays; of the same shapes for every plan."""
        return Placement(plan.copies(self._copies), plan.logcnt)  # type: ignore[arg-type]

    def _put(self, tree: Any) -> Any:
        """Host arrays, on all devices."""
        everywhere = NamedSharding(self.devices, WHOLE)
        return jax.tree.map(
            lambda x: jax.make_array_from_callback(x.shape, everywhere, lambda index: x[index]), tree
        )


def _rows(tree: Any, index: Any) -> Any:
    return jax.tree.map(lambda x: x[index], tree)


def _with(block: Any, experts: Any, placement: Placement) -> Any:
    """A block with other experts."""
    return {**block, "ffn": {**block["ffn"], "experts": experts, "placement": placement}}


def _ffn(ready: Any, cfg: ModelConfig, layer: int) -> Any:
    """Of a layer that lies apart."""
    block = ready["moe_layers"][layer] if layer < cfg.num_moe_layers else ready["mtp"]["block"]
    return block["ffn"]


def _replaced(ready: Any, cfg: ModelConfig, layer: int, experts: Any, placement: Placement) -> Any:
    """With other experts of a layer that lies apart."""
    if layer < cfg.num_moe_layers:
        blocks = list(ready["moe_layers"])
        blocks[layer] = _with(blocks[layer], experts, placement)
        return {**ready, "moe_layers": blocks}
    block = _with(ready["mtp"]["block"], experts, placement)
    return {**ready, "mtp": {**ready["mtp"], "block": block}}
