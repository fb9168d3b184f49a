"""The engine's programs over the devices of a deployment unit, traced without any: at the real dimensions, no array is made."""

from typing import Any

import jax
import jax.numpy as jnp

from deepseek_jax.model.platform import as_on_gpus
from deepseek_jax.parallel.exchange.placement import Placement
from deepseek_jax.parallel.mesh import abstract_mesh
from deepseek_jax.parallel.prepared import Devices
from deepseek_jax.precision import preset
from deepseek_jax.serving.deployment import POLICY, Deployment
from deepseek_jax.serving.over_mesh import programs
from deepseek_jax.serving.plans import chunk_plan, decode_plan
from deepseek_jax.serving.programs import Weights
from deepseek_jax.serving.sampling import FILTERED
from experiments.planning.serving_weights import main_model, weights


def placed_weights(unit: Deployment) -> Weights:
    """Shapes of all devices' weights, experts in slots."""
    cfg = main_model(unit)
    ready = weights(unit, unit.physical_experts)
    experts = cfg.n_routed_experts + (cfg.n_shared_experts if unit.shared_routed else 0)
    for name, layers in (("moe_layers", (cfg.num_moe_layers,)), ("mtp", ())):
        if name in ready:
            block = ready[name] if name == "moe_layers" else ready[name]["block"]
            copies = unit.redundant + 1  # of an expert at most
            block["ffn"]["placement"] = Placement(_int32(*layers, experts, copies), _int32(*layers, experts))
    bias = jax.ShapeDtypeStruct(
        (cfg.num_moe_layers + cfg.num_nextn_predict_layers, cfg.n_routed_experts), jnp.float32
    )
    return Weights(ready, bias, _int32())  # type: ignore[arg-type]


def _int32(*shape: int) -> Any:
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def traced(unit: Deployment, pages: int, at: Devices = None) -> dict[str, jax.stages.Traced]:
    """By name, "decode" and "prefill", those that the unit's role has, with so many pages on each device. at: devices; None: an
    abstract mesh of as many."""
    cfg, sizes = main_model(unit), unit.options.sizes(unit.model)
    policy = preset(POLICY) if unit.weights == "fp8" else None
    mesh = abstract_mesh(unit.mesh, unit.devices) if at is None else at
    words, found = -(-cfg.vocab_size // 32), {}
    with as_on_gpus():
        run: Any = programs(cfg, unit.mesh, policy, mesh, in_slots=True, shared_routed=unit.shared_routed)
        state = run.empty.eval_shape(sizes, pages, unit.cache == "fp8", unit.drafts)
        arguments = placed_weights(unit), state
        if unit.role != "prefill":
            rows = decode_plan(unit.rows * unit.devices, words)
            decode = run.decode_pairs if unit.drafts else run.decode
            found["decode"] = decode.trace(*arguments, rows, None, most=FILTERED)
        if unit.role != "decode":
            chunks = chunk_plan(unit.devices, sizes.chunk, sizes.pages_each, words)
            found["prefill"] = run.prefill.trace(*arguments, chunks, most=FILTERED)
    return found
