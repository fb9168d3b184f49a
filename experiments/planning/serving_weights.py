"""Shapes of what a device of a deployment unit holds, as the engine prepares it for GPUs; no array is made.

Dims: l layer, e expert.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from deepseek_jax.config import ModelConfig
from deepseek_jax.hf import fp8
from deepseek_jax.hf.names import leaves, unflatten
from deepseek_jax.model.cache import PAGE, empty_pages
from deepseek_jax.model.decoding import prepare
from deepseek_jax.model.platform import as_on_gpus
from deepseek_jax.model.transformer import model_params
from deepseek_jax.model.weights import multiplied_as_stored
from deepseek_jax.precision import preset
from deepseek_jax.serving.deployment import POLICY, Deployment
from deepseek_jax.serving.programs import empty_state, layers_in_pages


def stored_params(cfg: ModelConfig, in_fp8: bool = True) -> Any:
    """Shapes of the parameters as `hf.load(keep_fp8=True)` gives them; else all in BF16."""
    flat: dict[str, Any] = {}
    for path, leaf in leaves(cfg).items():
        if leaf.may_be_fp8 and in_fp8:
            flat[f"{path}.fp8"] = jax.ShapeDtypeStruct((*leaf.stack, *leaf.hf_shape), jnp.float8_e4m3fn)
            blocks = (*leaf.stack, *fp8.scale_shape(leaf.hf_shape))
            flat[f"{path}.scale"] = jax.ShapeDtypeStruct(blocks, jnp.float32)
        else:
            flat[path] = jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16)
    policy = preset(POLICY)
    assert policy is not None
    return multiplied_as_stored(unflatten(flat), model_params(cfg), policy)


def main_model(unit: Deployment) -> ModelConfig:
    """The model that the unit runs: without the MTP module, unless that drafts."""
    return unit.model if unit.drafts else dataclasses.replace(unit.model, num_nextn_predict_layers=0)


def weights(unit: Deployment, experts: int) -> Any:
    """The prepared parameters, with so many physical experts in each layer: those of a device, or of all of them."""
    cfg = main_model(unit)
    of_unit = dataclasses.replace(
        cfg, n_routed_experts=experts, num_experts_per_tok=1, n_group=1, topk_group=1
    )
    stored = stored_params(of_unit, unit.weights == "fp8")
    for name, block in _blocks(stored):
        block["ffn"]["gate"] = dict(_blocks(stored_params(cfg, False)))[name]["ffn"]["gate"]
        if unit.shared_routed:
            block["ffn"].pop("shared")
    with as_on_gpus():
        return jax.eval_shape(lambda params: prepare(params, cfg, whole=False), stored)


def _blocks(params: Any) -> list[tuple[str, Any]]:
    """The stacks of MoE blocks of a tree of parameters."""
    found = [("moe_layers", params.get("moe_layers"))]
    found += [("mtp", params["mtp"]["block"])] if "mtp" in params else []
    return [(name, block) for name, block in found if block is not None]


def num_bytes(tree: Any) -> int:
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


_FFN = {"gate": "routers", "shared": "shared experts", "experts": "routed experts"}


@functools.lru_cache(16)
def weight_bytes(unit: Deployment) -> dict[str, int]:
    """Part -> bytes on a device."""
    found: dict[str, int] = {}

    def add(name: str, tree: Any) -> None:
        found[name] = found.get(name, 0) + num_bytes(tree)

    for name, tree in weights(unit, unit.experts).items():
        if name == "mtp":
            add("MTP module", tree)
        elif name.endswith("_layers"):
            for block in tree if isinstance(tree, list) else [tree]:
                ffn = block["ffn"]
                add("attention and norms", {key: x for key, x in block.items() if key != "ffn"})
                for key, x in ffn.items() if "experts" in ffn else [("", ffn)]:
                    add(_FFN.get(key, "dense MLPs"), x)
        else:
            add("embedding and head", tree)
    return found


def page_bytes(unit: Deployment) -> int:
    """Of PAGE tokens, in all layers."""
    layers = layers_in_pages(unit.model, unit.drafts)
    return num_bytes(jax.eval_shape(lambda: empty_pages(unit.model, layers, 1, unit.cache == "fp8")))


def state_bytes(unit: Deployment) -> int:
    """What the engine keeps of its sequences beside pages."""
    sizes = unit.options.sizes(unit.model)
    state = jax.eval_shape(
        lambda: empty_state(unit.model, sizes.slots, 1, sizes.pages_each, False, unit.drafts)
    )
    return num_bytes(state._replace(pages_lpsw=()))


def pages_of(tokens: int) -> int:
    return -(-tokens // PAGE)
