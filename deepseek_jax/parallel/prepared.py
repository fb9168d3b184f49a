"""The parameters of generation over a mesh: where they lie, as they are and as decoding reads them (`model/decoding.py: prepare`).

Experts are spread over node x local x tensor, those of the MTP module, which drafts, too; everything else is whole on each
device, of whose heads a prefill over `tensor` takes a slice.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from deepseek_jax.config import MeshConfig, ModelConfig
from deepseek_jax.model.decoding import decoding_config, prepare, unrolled
from deepseek_jax.model.params import tree_map
from deepseek_jax.model.transformer import model_params
from deepseek_jax.parallel.compiler import compiler_options
from deepseek_jax.parallel.mesh import (
    TENSOR_PARALLEL,
    TOKEN_AXES,
    WHOLE_ATTENTION,
    make_mesh,
    param_specs,
    rules,
)
from deepseek_jax.precision.policy import Policy
from deepseek_jax.precision.product import Quantised

# Of a mesh; None: those at hand. An abstract mesh has none: programs over it can be lowered, not run.
Devices = tuple[Any, ...] | AbstractMesh | None
WHOLE = PartitionSpec()


@functools.cache
def generation_mesh(cfg: ModelConfig, mesh: MeshConfig, at: Devices = None) -> Any:
    """The devices of `mesh`. Raises ValueError for what generation does not do, and for heads that do not divide."""
    for name, idle in (("pipe", 1), ("zero", False), ("overlap", False)):
        if getattr(mesh, name) != idle:
            raise ValueError(
                f"mesh.{name}={getattr(mesh, name)} is for training: generation divides work over "
                f"{', '.join(TOKEN_AXES)}; leave it out"
            )
    devices = at if isinstance(at, AbstractMesh) else make_mesh(mesh, at)
    param_specs(model_params(cfg), devices, TENSOR_PARALLEL)
    return devices


def declared_in(cfg: ModelConfig, slots: int, shared_routed: bool = False) -> Any:
    """The parameters of a model whose experts lie in so many slots of each layer; shared_routed: the shared one, too."""
    tree = model_params(cfg)
    blocks = [tree["moe_layers"]] if "moe_layers" in tree else []
    blocks += [tree["mtp"]["block"]] if "mtp" in tree else []
    for block in blocks:
        block["ffn"]["experts"] = tree_map(
            lambda p: dataclasses.replace(p, shape=(p.shape[0], slots, *p.shape[2:])), block["ffn"]["experts"]
        )
        if shared_routed:
            del block["ffn"]["shared"]
    return tree


def parameter_specs(
    cfg: ModelConfig,
    mesh: MeshConfig,
    devices: Mesh | AbstractMesh,
    in_slots: bool = False,
    shared_routed: bool = False,
) -> Any:
    """Of each parameter: experts over the devices that share them, all else whole. in_slots: experts lie in slots (`slots.py`), of
    which all devices have as many, whether the model's own experts divide over them or not; shared_routed: the shared one, too.
    Raises ValueError if they do not."""
    spread = "expert" in rules(mesh, devices)
    slots = math.lcm(cfg.n_routed_experts, devices.size) if in_slots and spread else cfg.n_routed_experts
    tree = declared_in(cfg, slots, shared_routed)
    return param_specs(tree, devices, WHOLE_ATTENTION if spread else {})


def parameter_shardings(
    cfg: ModelConfig, mesh: MeshConfig, in_slots: bool = False, shared_routed: bool = False
) -> Any:
    """Where generation over a mesh reads each parameter: a tree of shardings, for `deepseek_jax.hf.load`. A weight in FP8 lies
    as a whole weight does, its scales beside it. in_slots, shared_routed: as for `parameter_specs`."""
    devices = generation_mesh(cfg, mesh)
    put = functools.partial(NamedSharding, devices)
    specs = parameter_specs(cfg, mesh, devices, in_slots, shared_routed)
    return jax.tree.map(put, specs, is_leaf=lambda x: isinstance(x, PartitionSpec))


def policy_of(params: Any) -> Policy | None:
    """By which weights in FP8 are multiplied, if there are any."""
    leaves = jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, Quantised))
    return next((x.policy for x in leaves if isinstance(x, Quantised)), None)


# --- prepared -----------------------------------------------------------------------------------------------------


def experts_spec(specs: Any, name: str) -> PartitionSpec:
    """Of the experts [layer, expert, ...] of "moe_layers" or "mtp"."""
    block = specs[name] if name == "moe_layers" else specs[name]["block"]
    return block["ffn"]["experts"]["w_up_edf"]  # type: ignore[no-any-return]


def ready_specs(cfg: ModelConfig, specs: Any, placed: bool = False) -> Any:
    """Of what `preparing` makes of parameters that lie as `specs` say. A prefix of the tree, which fits whatever a weight
    brings: values and scales have experts where an array has them. cfg: that decoding runs with. placed: with the `placement` of
    experts in slots (`slots.py`)."""
    declared = specs
    ready: dict[str, Any] = dict.fromkeys(declared, WHOLE)

    def moe_block(declared: Any, of_experts: PartitionSpec) -> dict[str, Any]:
        block: dict[str, Any] = dict.fromkeys(declared, WHOLE)
        block["ffn"] = dict.fromkeys(declared["ffn"], WHOLE) | {"experts": of_experts}
        if placed:
            block["ffn"]["placement"] = WHOLE
        return block

    if n := cfg.num_moe_layers:
        spec = experts_spec(specs, "moe_layers")
        spec = PartitionSpec(*spec[1:]) if unrolled(cfg) else spec
        block = moe_block(declared["moe_layers"], spec)
        ready["moe_layers"] = [block] * n if unrolled(cfg) else block
    if "mtp" in declared:
        spec = PartitionSpec(*experts_spec(specs, "mtp")[1:])  # the first module, apart
        ready["mtp"] = dict.fromkeys(declared["mtp"], WHOLE) | {
            "block": moe_block(declared["mtp"]["block"], spec)
        }
    return ready


@functools.cache
def preparing(
    cfg: ModelConfig,
    mesh: MeshConfig,
    at: Devices = None,
    in_slots: bool = False,
    shared_routed: bool = False,
) -> Callable[[Any], Any]:
    """Jitted: parameters that lie by `parameter_shardings` -> the same as decoding reads them."""
    devices, decoding = generation_mesh(cfg, mesh, at), decoding_config(cfg)
    specs = parameter_specs(cfg, mesh, devices, in_slots, shared_routed)
    over_devices = jax.shard_map(
        lambda params: prepare(params, decoding, whole=False),
        mesh=devices,
        in_specs=(specs,),
        out_specs=ready_specs(decoding, specs),
        check_vma=False,
    )
    return jax.jit(over_devices, compiler_options=compiler_options(mesh, devices))
