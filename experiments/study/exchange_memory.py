"""Buffers of an exchange of tokens, on each device and of one MoE layer, from the layout that training plans."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from deepseek_jax.config import Config, ModelConfig
from deepseek_jax.model.rows import num_rows
from deepseek_jax.parallel.exchange.dispatcher import Ragged
from deepseek_jax.parallel.exchange.hops import Plan
from deepseek_jax.parallel.exchange.wire import write
from deepseek_jax.parallel.layout import layout_over
from deepseek_jax.parallel.mesh import EXPERT_AXES, TOKEN_AXES, batch_shards
from deepseek_jax.parallel.pipeline.pipeline import pipeline_over

PLACES = {"node": "between nodes", EXPERT_AXES[1:]: "in the node", EXPERT_AXES: "all devices"}


class Buffer(NamedTuple):
    name: str
    rows: int
    bytes: int


def tokens_at_once(cfg: Config, mesh: Mesh | AbstractMesh) -> int:
    """Tokens of a device in one exchange: of its micro-batch, or, with overlap but without a pipeline, of a half of it."""
    pipeline = pipeline_over(cfg, mesh.shape)
    micro = cfg.train.grad_accumulation if pipeline is None else pipeline.micro
    sequences = cfg.train.batch_size // (batch_shards(mesh) * micro)
    parts = 2 if cfg.mesh.overlap and pipeline is None else 1
    return sequences * cfg.data.seq_len // mesh.shape["tensor"] // parts


def exchange_buffers(cfg: Config, mesh: Mesh | AbstractMesh) -> list[Buffer]:
    """Rows and bytes of each buffer of a round; none where no tokens travel. As many again hold the gradients."""
    d = layout_over(cfg, mesh).dispatcher
    if not isinstance(d, Ragged):
        return []
    n_local = cfg.model.n_routed_experts // (mesh.shape["node"] * mesh.shape["local"] * mesh.shape["tensor"])
    return buffers_of(d, cfg.model, mesh, tokens_at_once(cfg, mesh), n_local)


def buffers_of(
    d: Ragged, model: ModelConfig, mesh: Mesh | AbstractMesh, n: int, n_local: int
) -> list[Buffer]:
    """Of n tokens of a device that has so many experts."""
    found: list[Buffer] = []

    def plan(ids_nk: jax.Array) -> jax.Array:
        found.extend(_buffers(d.plan(ids_nk, n_local), model.hidden_size, model.dtype))
        return jnp.zeros(())

    over_devices = jax.shard_map(
        plan, mesh=mesh, in_specs=PartitionSpec(TOKEN_AXES), out_specs=PartitionSpec(), check_vma=False
    )
    ids = jax.ShapeDtypeStruct((n * mesh.size // mesh.shape["pipe"], model.num_experts_per_tok), jnp.int32)
    jax.eval_shape(over_devices, ids)
    return found


def _buffers(plan: Plan, d: int, dtype: str) -> list[Buffer]:
    assert plan.experts_nk is not None
    x, weights = jnp.zeros((1, d), dtype), jnp.zeros((1, plan.experts_nk.shape[1]), jnp.float32)

    def row(form: str, *beside: jax.Array) -> int:
        """Bytes of a row, with what travels beside it."""
        return write((x, *beside), form).words_nw.nbytes

    there = row(plan.wire.dispatch, weights, weights.astype(jnp.int32))
    back, out = row(plan.wire.combine), []
    for hop in plan.hops:
        place = PLACES[hop.axis]
        out.append(Buffer(f"dispatch, sent {place}", len(hop.token_s), len(hop.token_s) * there))
        out.append(Buffer(f"dispatch, received {place}", hop.rows, hop.rows * there))
    experts = num_rows(plan.pairs, plan.n_local)
    out.append(Buffer("experts, sorted rows", experts, experts * row(plan.wire.dispatch)))
    for hop in reversed(plan.hops):
        place = PLACES[hop.axis]
        out.append(Buffer(f"combine, back {place}", len(hop.token_s), len(hop.token_s) * back))
        out.append(Buffer(f"combine, sums {place}", len(hop.row_mj), len(hop.row_mj) * x.nbytes))
    return out
