"""Reads in the compiled program what of an expert exchange is hidden behind GEMMs on H100s; needs no GPU.

    python -m experiments.plan overlap          # 64 GPUs, DeepSeek-V3's layer and recomputation, BF16
    python -m experiments.plan overlap --precision=deepseek_fp8 --receive=0 --no-overlap

Compiles the gradient of a stack of MoE layers for a topology of H100s and lists every collective of the schedule: the
GEMMs issued between its start and its done. This shows the order of issue, not time. Needs the packages
jax-cuda13-plugin and jax-cuda13-pjrt (`pip install --no-deps`).
"""

import argparse
import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from configs import v3_671b
from deepseek_jax.config import REMAT, Config, MeshConfig, from_config_dict
from deepseek_jax.model.block import block_params, stack
from deepseek_jax.model.layout import Context
from deepseek_jax.model.params import Param, stacked
from deepseek_jax.model.rope import rope_table
from deepseek_jax.model.weights import attach, quantise_weights
from deepseek_jax.parallel.compiler import compiler_options
from deepseek_jax.parallel.layout import layout_over
from deepseek_jax.parallel.mesh import BATCH_AXES, make_mesh, param_specs, rules
from deepseek_jax.parallel.zero import read_dtype
from deepseek_jax.precision import PRESETS, preset
from experiments import command_line
from experiments.planning import overlap_serving, xla
from experiments.planning.hardware import GIB
from experiments.study.hlo_schedule import Transfer, transfers
from pallas_kernels.tiles import leave_sms

SEQUENCES = 2  # per device
LAYERS = 5  # more than are unrolled: the report is on the body of the loop over layers
SCOPES = ("plan", "dispatch", "combine", "rounds")


def layer_config(nodes: int, local: int, precision: str, receive: float, overlap: bool, remat: str) -> Config:
    """Returns the config of a stack of DeepSeek-V3's MoE layers on nodes x local devices."""
    whole = from_config_dict(v3_671b.get_config())
    model = dataclasses.replace(
        whole.model,
        num_hidden_layers=LAYERS,
        first_k_dense_replace=0,
        num_nextn_predict_layers=0,
        dtype="bfloat16",
    )
    mesh = MeshConfig(data=1, node=nodes, local=local, receive=receive, overlap=overlap)
    train = dataclasses.replace(whole.train, remat=remat)
    return dataclasses.replace(whole, model=model, mesh=mesh, train=train, precision=precision)


def compile_stack(cfg: Config, tokens: int) -> jax.stages.Compiled:
    """Compiles the gradient of the stack for as many H100s as the mesh has, with `tokens` per device."""
    nodes, local = cfg.mesh.node, cfg.mesh.local
    devices = xla.h100s(nodes * local, local)
    mesh, model, policy = make_mesh(cfg.mesh, devices), cfg.model, preset(cfg.precision)
    declared = stacked(block_params(model, True), model.num_moe_layers)
    specs, batch = param_specs(declared, mesh, rules(cfg.mesh, mesh)), PartitionSpec(BATCH_AXES)
    t = tokens // SEQUENCES
    layout = layout_over(dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, seq_len=t)), mesh)
    moe_stack = layout.moe_stack or stack

    def gradient(params, x_btd):
        quantised = quantise_weights(params, declared, policy)
        ctx = Context(rope_table(model, jnp.arange(t)[None]), layout)

        def value(params, x_btd):
            y_btd, stats = moe_stack(attach(params, quantised, policy), model, x_btd, None, ctx)
            return jnp.square(y_btd.astype(jnp.float32)).sum() + stats.seq_loss.sum()

        return jax.grad(value, (0, 1))(params, x_btd)

    def array(shape, dtype, spec):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    params = jax.tree.map(
        lambda p, spec: array(p.shape, read_dtype(p, model.dtype, policy is not None), spec),
        declared,
        specs,
        is_leaf=lambda x: isinstance(x, Param),
    )
    x_btd = array((SEQUENCES * nodes * local, t, model.hidden_size), jnp.bfloat16, batch)
    spread = jax.shard_map(
        gradient, mesh=mesh, in_specs=(specs, batch), out_specs=(specs, batch), check_vma=False
    )
    spread = leave_sms(cfg.mesh.comm_channels)(spread)
    return jax.jit(spread, compiler_options=compiler_options(cfg.mesh, mesh)).lower(params, x_btd).compile()


def _line(t: Transfer) -> str:
    what = t.within(*SCOPES) or "other"
    state = "sync" if t.is_sync else "async"
    verdict = "hidden" if t.hidden else "EXPOSED"
    where = "in the layer" if "/while/" in t.op_name else "outside of the layers"
    direction = "backward" if t.backward else "forward"
    return f"  {direction:<9}{what:<9}{t.opcode:<18}{state:<6}{len(t.gemms):>3} GEMMs  {verdict:<8}{where}"


def report(compiled: jax.stages.Compiled) -> None:
    found = transfers(compiled.as_text() or "")
    for t in found:
        print(_line(t))
    trips = [t for t in found if t.within(*SCOPES) in SCOPES[1:3] and "/while/" in t.op_name]
    hidden = sum(t.hidden for t in trips)
    print(
        f"dispatch and combine in the layer: {hidden} of {len(trips)} collectives asynchronous around GEMMs"
    )
    memory = compiled.memory_analysis()
    assert memory is not None
    print(
        f"per device, {LAYERS} layers: arguments {memory.argument_size_in_bytes / GIB:.2f} GiB, "
        f"temporaries {memory.temp_size_in_bytes / GIB:.2f} GiB (the compiler's estimate)"
    )


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = command_line.Parser(description="Overlap in the schedule compiled for H100s, without a GPU.")
    parser.add_argument("--nodes", type=int, default=8)
    parser.add_argument("--local", type=int, default=8, help="GPUs of a node")
    parser.add_argument("--tokens", type=int, default=1024, help="per GPU, in two sequences")
    parser.add_argument("--precision", choices=tuple(PRESETS), default="bf16")
    parser.add_argument("--receive", type=float, default=8.0, help="mesh.receive; 0: everything at once")
    parser.add_argument("--remat", choices=REMAT, default="deepseek")
    parser.add_argument("--overlap", action=argparse.BooleanOptionalAction, default=True)
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> int:
    if argv and argv[0] in overlap_serving.UNITS:
        return overlap_serving.main(argv)
    args = _arguments(argv)
    xla.check_compiler()
    xla.prepare()
    cfg = layer_config(args.nodes, args.local, args.precision, args.receive, args.overlap, args.remat)
    print(
        f"{args.nodes} nodes x {args.local} H100, {args.tokens} tokens per GPU, {cfg.precision}, {cfg.mesh}"
    )
    report(compile_stack(cfg, args.tokens))
    return 0
