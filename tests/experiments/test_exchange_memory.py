"""Buffers of an exchange: those of DeepSeek-V3's deployment by hand, and as they stand in the traced program.

Dims: n token, k selected expert, e expert.
"""

import dataclasses
import importlib

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from deepseek_jax.config import from_config_dict
from deepseek_jax.parallel.layout import layout_over
from deepseek_jax.parallel.mesh import TOKEN_AXES, abstract_mesh
from experiments import plan
from experiments.study.exchange_memory import exchange_buffers, tokens_at_once
from tests.parallel.harness import with_gradients
from tests.programs import equations
from tests.tiny_run import tiny


def shipped(name):
    return from_config_dict(importlib.import_module(f"configs.{name}").get_config())


def test_v3_in_its_pipeline():
    """8 nodes of 8 devices with 4 experts each, 8 per token on at most 4 nodes; 10 pairs per token in a round. In FP8 a
    row has 7168 bytes, 56 scales, 8 weights and 8 ids. Every expert's rows are filled up to 128."""
    cfg = shipped("v3_671b")
    mesh = abstract_mesh(cfg.mesh, 2048)
    n, fp8, bf16 = tokens_at_once(cfg, mesh), 7168 + 4 * (56 + 8 + 8), 2 * 7168
    assert n == 4096
    sorted_rows = -(-(10 * n + 8 * 3 + 4 * 127) // 128) * 128
    assert [(b.rows, b.bytes // b.rows) for b in exchange_buffers(cfg, mesh)] == [
        (4 * n, fp8),
        (8 * n, fp8),
        (10 * n, fp8),
        (10 * n, fp8),
        (sorted_rows, 7168 + 4 * 56),
        (10 * n, bf16),
        (8 * n, bf16),
        (4 * n, bf16),
        (n, bf16),
    ]


@pytest.mark.parametrize("mode", ["flat", "two_hop"])
@pytest.mark.parametrize("receive", [0.0, 2.5])
def test_they_are_those_of_the_traced_program(mode, receive):
    """Every collective of forward and backward moves one of the listed buffers into another, each is there, and no array
    of the width of a token has more rows."""
    d, f, e = 256, 128, 32
    cfg = tiny(
        model={"hidden_size": d, "moe_intermediate_size": f, "n_routed_experts": e, "num_experts_per_tok": 4},
        data={"seq_len": 64},
        train={"batch_size": 32},
        mesh={"data": 1, "node": 4, "local": 2, "experts": mode, "receive": receive, "dispatch": "fp8"},
    )
    mesh = abstract_mesh(cfg.mesh, 8)
    buffers, n = exchange_buffers(cfg, mesh), tokens_at_once(cfg, mesh)
    dispatcher = dataclasses.replace(layout_over(cfg, mesh).dispatcher, implementation="native")
    shapes = {"w_gate_edf": (e, d, f), "w_up_edf": (e, d, f), "w_down_efd": (e, f, d)}
    p = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    x, w = (jax.ShapeDtypeStruct((8 * n, width), jnp.float32) for width in (d, 4))
    spec = PartitionSpec(TOKEN_AXES)
    run = jax.shard_map(
        with_gradients(dispatcher), mesh=mesh, in_specs=(spec,) * 5, out_specs=spec, check_vma=False
    )
    ids = jax.ShapeDtypeStruct((8 * n, 4), jnp.int32)
    [on_each_device] = jax.make_jaxpr(run)(p, x, w, x, ids).eqns
    program = list(equations(on_each_device.params["jaxpr"]))
    moved = [v.aval for eqn in program if eqn.primitive.name == "ragged_all_to_all" for v in eqn.invars[:2]]
    listed = {
        (b.rows, b.bytes // b.rows // 4) for b in buffers if b.name.split()[1] in ("sent", "received", "back")
    }
    wide = {a.shape for a in moved if a.shape[1] > d // 4}
    assert listed <= wide and {rows for rows, _ in wide} == {rows for rows, _ in listed}
    arrays = [v.aval.shape for eqn in program for v in eqn.outvars if len(getattr(v.aval, "shape", ())) == 2]
    assert max(rows for rows, width in arrays if width >= d // 4) == max(b.rows for b in buffers)


def test_the_command(capsys):
    assert plan.main(["memory", "--config=configs/v3_671b.py"]) == 0
    out = capsys.readouterr().out
    assert "exchange, 4096 tokens per device" in out
    [line] = [line for line in out.splitlines() if "dispatch, sent in the node" in line]
    assert line.split()[-3:] == ["40960", "10.00", "291.2"]
    assert plan.main(["memory", "--config=configs/small_1b.py", "--devices=1"]) == 0
    assert "exchange" not in capsys.readouterr().out
