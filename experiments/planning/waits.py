"""Lists what makes a host wait for its GPUs, in programs compiled for H100s; needs no GPU.

    python -m experiments.plan waits                  # of the engine, and of a layer's training, on 8 hosts of 8
    python -m experiments.plan waits decoding drafts --nodes=2

Compiles layers of DeepSeek-V3's widths with the weights of its checkpoint, in FP8, and the overlapped training of such layers
(`planning/overlap.py`). What is listed stands in the program once; in a loop over layers it happens in each.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from configs import v3_671b
from deepseek_jax.config import MeshConfig, ModelConfig, from_config_dict
from deepseek_jax.model.decoding import UNROLL_LAYERS
from deepseek_jax.model.platform import as_on_gpus
from deepseek_jax.parallel.prepared import preparing
from deepseek_jax.precision import preset
from deepseek_jax.serving.deployment import POLICY
from deepseek_jax.serving.over_mesh import programs
from deepseek_jax.serving.plans import chunk_plan, decode_plan
from deepseek_jax.serving.programs import Weights
from deepseek_jax.serving.sampling import FILTERED
from deepseek_jax.serving.sizes import Sizes
from experiments import command_line
from experiments.planning import overlap, xla
from experiments.planning.serving_weights import stored_params
from experiments.study.host_waits import host_waits, summary

PROGRAMS = ("decoding", "drafts", "chunks", "training")
LONGEST, CHUNK = 8192, 2048  # tokens of a sequence of the engine, and of a chunk


def layers_of_v3(vocab_size: int) -> ModelConfig:
    """More layers than are unrolled, the first of them dense."""
    whole = from_config_dict(v3_671b.get_config()).model
    return dataclasses.replace(
        whole,
        num_hidden_layers=UNROLL_LAYERS + 2,
        first_k_dense_replace=1,
        num_nextn_predict_layers=0,
        vocab_size=vocab_size,
        dtype="bfloat16",
    )


def engine(cfg: ModelConfig, mesh: MeshConfig, rows: int) -> dict[str, jax.stages.Lowered]:
    """The engine's programs over pages, with `rows` sequences on each GPU, whose tokens are drawn."""
    devices = tuple(xla.h100s(mesh.node * mesh.local, mesh.local))
    sizes, words = Sizes(rows, LONGEST, CHUNK), -(-cfg.vocab_size // 32)
    with as_on_gpus():
        jitted: Any = programs(cfg, mesh, preset(POLICY), devices)
        state = jitted.empty.eval_shape(sizes, rows * sizes.pages_each, False, True)
        ready = jax.eval_shape(preparing(cfg, mesh, devices), stored_params(cfg))
        bias = jax.ShapeDtypeStruct((cfg.num_moe_layers + 1, cfg.n_routed_experts), jnp.float32)
        weights = Weights(ready, bias, jax.ShapeDtypeStruct((), jnp.int32))
        plan = decode_plan(rows * len(devices), words)
        chunks = chunk_plan(len(devices), CHUNK, sizes.pages_each, words)
        return {
            "decoding": jitted.decode.lower(weights, state, plan, None, most=FILTERED),
            "drafts": jitted.decode_pairs.lower(weights, state, plan, None, most=FILTERED),
            "chunks": jitted.prefill.lower(weights, state, chunks, most=FILTERED),
        }


def main(argv: Sequence[str]) -> int:
    parser = command_line.Parser(prog="plan waits", description="What makes a host wait for its GPUs.")
    parser.add_argument("programs", nargs="*", choices=(*PROGRAMS, "all"), default="all")
    parser.add_argument("--nodes", type=int, default=8)
    parser.add_argument("--local", type=int, default=8, help="GPUs of a node")
    parser.add_argument("--sequences", type=int, default=128, help="decoded on each GPU")
    parser.add_argument("--vocab", type=int, default=129_280)
    parser.add_argument(
        "--receive", type=float, default=8.0, help="mesh.receive of training; 0: everything at once"
    )
    args = parser.parse_args(argv)
    xla.check_compiler()
    xla.prepare()
    mesh = MeshConfig(data=1, node=args.nodes, local=args.local)
    cfg = layers_of_v3(args.vocab)
    drafting = dataclasses.replace(cfg, num_nextn_predict_layers=1)
    lowered = engine(drafting, mesh, args.sequences)
    training = overlap.layer_config(args.nodes, args.local, POLICY, args.receive, True, "deepseek")
    for name in PROGRAMS if "all" in args.programs else args.programs:
        compiled = lowered[name].compile() if name in lowered else overlap.compile_stack(training, 1024)
        print(f"{name}:\n{summary(host_waits(compiled.as_text() or '', args.local))}", flush=True)
    return 0
