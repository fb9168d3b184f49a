"""Reads in programs compiled for H100s what of an expert exchange is hidden where a unit serves; needs no GPU.

    python -m experiments.plan overlap decode      # 18 nodes of 8: EP144, 96 rows on each GPU
    python -m experiments.plan overlap prefill     # 4 nodes of 8: EP32, a chunk of 8,192 tokens on each GPU
    python -m experiments.plan overlap decode --rows=128 --nodes=8 --no-overlap

Compiles MoE layers of DeepSeek-V3's widths over pages, weights in FP8, in the layout that the engine takes (`serving/over_mesh.py`),
of a unit of `configs/serve_*.py`. Its redundant experts are further experts of the gate, too. All layers but the last are one
loop. Of each exchange it says what is issued between its start and its done, by halves and phases (`parallel/two_batches.py`):
the order of issue, not time.
"""

import argparse
import collections
import dataclasses
import functools
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from configs import serve_decode_ep144, serve_prefill_ep32
from deepseek_jax.model.cache import PAGE, empty_pages, paged_view
from deepseek_jax.model.decoding import UNROLL_LAYERS, decode
from deepseek_jax.model.platform import as_on_gpus
from deepseek_jax.parallel.compiler import compiler_options
from deepseek_jax.parallel.prepared import generation_mesh, parameter_specs, preparing, ready_specs
from deepseek_jax.precision import preset
from deepseek_jax.serving.deployment import POLICY, Deployment, from_config_dict
from deepseek_jax.serving.over_mesh import BY_LAYER, ROWS, layout_of, wire_of
from experiments import command_line
from experiments.planning import xla
from experiments.planning.hardware import GIB
from experiments.planning.serving_weights import stored_params
from experiments.study.hlo_schedule import Transfer, transfers
from experiments.study.host_waits import over_hosts

UNITS = {"decode": serve_decode_ep144, "prefill": serve_prefill_ep32}
VOCAB, CONTEXT = 1024, 8192  # ids, and tokens of a sequence at most: neither is looked at
_TRIP = re.compile(r"^(?:[ab]\.)?(plan|dispatch|combine|rounds)$")
_PHASE = re.compile(r"^[ab]\.(?:down|queries|attention|gate|shared|experts)$")


def compile_layers(unit: Deployment, kind: str, rows: int, tokens: int, overlap: bool) -> jax.stages.Compiled:
    """Layers for `rows` of `tokens` new tokens on each device; kind: of the program, "decode" or "prefill"."""
    cfg = dataclasses.replace(
        unit.model,
        num_hidden_layers=UNROLL_LAYERS + 1,
        first_k_dense_replace=0,
        num_nextn_predict_layers=0,
        n_routed_experts=unit.physical_experts,
        vocab_size=VOCAB,
        dtype="bfloat16",
    )
    per_node = unit.mesh.local * unit.mesh.tensor
    devices = tuple(xla.h100s(unit.devices, per_node))
    with as_on_gpus():
        mesh, policy = generation_mesh(cfg, unit.mesh, devices), preset(POLICY)
        ready = jax.eval_shape(preparing(cfg, unit.mesh, devices), stored_params(cfg))
        how = layout_of((kind, rows, tokens), cfg, unit.mesh, mesh, wire_of(policy), 1 if overlap else None)

        def layers(ready: Any, pages: Any, bias: Any, ids: Any, table: Any, lengths: Any) -> Any:
            h_btd, view, _ = decode(ready, cfg, ids, paged_view(pages, table, lengths, tokens), bias, how)
            return h_btd, view.pages_lpsw

        over = jax.shard_map(
            layers,
            mesh=mesh,
            in_specs=(
                ready_specs(cfg, parameter_specs(cfg, unit.mesh, mesh)),
                BY_LAYER,
                jax.P(),
                *[ROWS] * 3,
            ),
            out_specs=(ROWS, BY_LAYER),
            check_vma=False,
        )
        each = CONTEXT // PAGE
        pages = jax.eval_shape(
            functools.partial(empty_pages, cfg, cfg.num_hidden_layers, rows * each * unit.devices)
        )
        bias = jax.ShapeDtypeStruct((cfg.num_moe_layers, cfg.n_routed_experts), jnp.float32)
        ints = [
            jax.ShapeDtypeStruct((rows * unit.devices, *shape), jnp.int32)
            for shape in ((tokens,), (each,), ())
        ]
        jitted = jax.jit(over, donate_argnums=1, compiler_options=compiler_options(unit.mesh, mesh))
        return jitted.lower(ready, pages, bias, *ints).compile()


# --- the report ---------------------------------------------------------------------------------------------------


def _innermost(op_name: str, what: re.Pattern[str]) -> str:
    return next((part for part in reversed(op_name.split("/")) if what.match(part)), "")


def trip(t: Transfer) -> str:
    """Which half's dispatch or combine a collective belongs to, or "plan", or ""."""
    return _innermost(t.op_name, _TRIP)


def beside(t: Transfer) -> str:
    """What is computed while it travels: GEMMs and cores of attention, by half and phase."""
    found = collections.Counter(_innermost(name, _PHASE) or "other" for name in (*t.gemms, *t.attention))
    return ", ".join(f"{phase} {n}" for phase, n in sorted(found.items()))


def line(t: Transfer, per_node: int) -> str:
    where = "in the loop" if "/while/" in t.op_name else "last layer"
    link = "between nodes" if over_hosts(t.text, per_node) else "inside a node"
    what = beside(t)
    state = "hidden" if what and not t.is_sync else "EXPOSED"
    return f"  {where:<12}{trip(t) or 'other':<11}{t.opcode:<18}{link:<14}{'sync' if t.is_sync else 'async':<6}{state:<8} {what}"


def report(compiled: jax.stages.Compiled, per_node: int) -> None:
    found = transfers(compiled.as_text() or "")
    for t in found:
        print(line(t, per_node))
    memory = compiled.memory_analysis()
    assert memory is not None
    print(
        f"per device: arguments {memory.argument_size_in_bytes / GIB:.2f} GiB, "
        f"temporaries {memory.temp_size_in_bytes / GIB:.2f} GiB (the compiler's estimate)"
    )


def main(argv: Sequence[str]) -> int:
    parser = command_line.Parser(
        prog="plan overlap", description="What of the exchange is hidden where a unit serves."
    )
    parser.add_argument("kind", choices=UNITS)
    parser.add_argument("--nodes", type=int, help="of the unit; default: the config's")
    parser.add_argument("--rows", type=int, help="of a GPU; default: the config's, one of a prompt")
    parser.add_argument("--overlap", action=argparse.BooleanOptionalAction, default=True)
    args = parser.parse_args(argv)
    xla.check_compiler()
    xla.prepare()
    unit = from_config_dict(UNITS[args.kind].get_config())
    if args.nodes:
        unit = dataclasses.replace(unit, mesh=dataclasses.replace(unit.mesh, node=args.nodes))
    prompts = args.kind == "prefill"
    rows, tokens = args.rows or (1 if prompts else unit.rows), unit.chunk if prompts else 1
    print(
        f"{unit.devices} H100, {unit.physical_experts} experts, {rows} rows of {tokens} tokens per GPU, {unit.mesh}"
    )
    report(compile_layers(unit, args.kind, rows, tokens, args.overlap), unit.mesh.local * unit.mesh.tensor)
    return 0
