"""DeepSeek-V3's decode step over the devices of its deployments, lowered for GPUs without any: 40 nodes of the report (section
3.4.2), one expert and no other on each GPU; and 18 nodes, as online, two of 288 on each.

    python -m tests.serving.deployment
"""

import dataclasses
import re

import jax
import jax.numpy as jnp
import pytest

from configs import v3_671b
from deepseek_jax.config import MeshConfig, from_config_dict
from deepseek_jax.model import decoding
from deepseek_jax.model.decoding import prepare
from deepseek_jax.parallel.exchange.placement import Placement
from deepseek_jax.parallel.exchange.wire import Wire
from deepseek_jax.parallel.layout import few_tokens
from deepseek_jax.parallel.mesh import abstract_mesh
from deepseek_jax.parallel.prepared import WHOLE, parameter_specs, ready_specs
from deepseek_jax.serving.over_mesh import ROWS, STATE
from deepseek_jax.serving.programs import Weights, decode_plan, decode_rows, empty_state
from deepseek_jax.serving.sampling import FILTERED
from experiments.planning.serving_weights import stored_params

CFG = dataclasses.replace(
    from_config_dict(v3_671b.get_config()).model, dtype="bfloat16", num_nextn_predict_layers=0
)
SEQUENCES, TOKENS = 88, 4989  # of a GPU, and of each of them
REPLICAS = 8  # of an expert at most


def on_all(tree, devices, dim=0):
    """Shapes of the arrays of all devices."""

    def one(x):
        shape = list(x.shape)
        shape[dim] *= devices
        return jax.ShapeDtypeStruct(shape, x.dtype)

    return jax.tree.map(one, tree)


def check(nodes, experts):
    """Of the weights, a GPU of 144 reads 22.1 GB in FP8 a step, the gates apart; in BF16 the absorbed up-projections take a byte
    more. Nothing but counts is gathered, tokens travel between nodes in fixed places, and inside of one as rows; no loop but
    those over layers and, without the kernel, over keys."""
    mesh_cfg, devices = MeshConfig(data=1, node=nodes, local=8), nodes * 8
    mesh, physical = abstract_mesh(mesh_cfg, devices), dataclasses.replace(CFG, n_routed_experts=experts)
    params = stored_params(physical)
    params["moe_layers"]["ffn"]["gate"] = stored_params(CFG)["moe_layers"]["ffn"]["gate"]
    specs = parameter_specs(physical, mesh_cfg, mesh)
    of_ready = ready_specs(CFG, specs)
    placed = ready_specs(CFG, specs, in_slots=True)
    over = lambda f, **specs: jax.shard_map(f, mesh=mesh, check_vma=False, **specs)  # noqa: E731
    prepared = over(lambda p: prepare(p, CFG, whole=False), in_specs=(specs,), out_specs=of_ready)
    here = {}

    def step(weights, state, rows):
        here["weights"] = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(weights.ready))
        here["experts"] = weights.ready["moe_layers"]["ffn"]["experts"]["w_down_efd"].fprop_operand.q.shape[1]
        layout = few_tokens(CFG, mesh_cfg, mesh, Wire("fp8", "bf16"))
        return decode_rows(weights, CFG, layout, state, rows, FILTERED)

    shape = jax.ShapeDtypeStruct
    bias = shape(CFG.balance_bias_shape, jnp.float32)
    ready, e = jax.eval_shape(prepared, params), CFG.n_routed_experts
    replicas = ((CFG.num_moe_layers, e, REPLICAS), (CFG.num_moe_layers, e))
    ready["moe_layers"]["ffn"]["placement"] = Placement(*(shape(x, jnp.int32) for x in replicas))
    weights = Weights(ready, bias, shape((), jnp.int32))
    pages = -(-TOKENS // 64)
    state = jax.eval_shape(lambda: empty_state(CFG, SEQUENCES, SEQUENCES * pages, pages, loads=True))
    state = on_all(state, devices)._replace(pages_lpsw=on_all(state.pages_lpsw, devices, 1))
    rows = on_all(decode_plan(SEQUENCES, -(-CFG.vocab_size // 32)), devices)
    run = over(
        step,
        in_specs=(Weights(placed, WHOLE, WHOLE), STATE, ROWS),
        out_specs=(STATE, ROWS),
    )
    traced = jax.jit(run, donate_argnums=1).trace(weights, state, rows)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()

    d, f = CFG.hidden_size, CFG.moe_intermediate_size
    layers, moe = CFG.num_hidden_layers, CFG.num_moe_layers
    assert here["experts"] == experts // devices
    absorbed = layers * CFG.kv_lora_rank * CFG.num_attention_heads * (CFG.qk_nope_head_dim + CFG.v_head_dim)
    more = absorbed + 4 * moe * d * CFG.n_routed_experts - (2 - here["experts"]) * moe * 3 * d * f
    read = here["weights"] - 2 * CFG.vocab_size * d  # of the embedding, a row for each token
    assert read == pytest.approx(22.1e9 + more, rel=0.003)
    gathered = re.findall(r'"stablehlo.all_gather".*?-> tensor<([\dxa-z]+)>', text, re.DOTALL)
    assert gathered == ["8x8xi32"]  # how many rows each device of a node has for each
    assert len(re.findall(r'"stablehlo.all_to_all"', text)) == 2
    assert len(re.findall(r"@ragged_all_to_all", text)) == 2
    assert len(re.findall(r"stablehlo\.while\b", text)) <= 4


if __name__ == "__main__":
    decoding.on_cpu = lambda: False
    for nodes, experts in ((18, 288), (40, 320)):
        check(nodes, experts)
        print(f"{nodes} nodes, {experts} experts: as expected")
