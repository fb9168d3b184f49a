"""XLA's own bytes of a step: the training step of a run, compiled for H100s on a machine without a GPU.

Needs the packages jax-cuda13-plugin and jax-cuda13-pjrt (`pip install --no-deps`) and ptxas. The compiler knows an H100 of
80 GB only, so H200 and H800 are refused.
"""

import os
import time
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh

from deepseek_jax.config import Config
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.parallel.pipeline.pair import PAIR
from deepseek_jax.training.preflight import abstract_batch
from deepseek_jax.training.state import Hyper
from deepseek_jax.training.step import abstract_state, make_train_step
from experiments.planning.memory import UNITS
from experiments.planning.prediction import Prediction
from experiments.planning.run import Run
from experiments.planning.tables import table, unit_of
from experiments.study.hlo_schedule import transfers
from pallas_kernels.testing.aot import TARGET, why_unavailable


def check_compiler() -> None:
    """Raises ValueError if nothing can be compiled for an H100 here."""
    if (missing := why_unavailable()) is not None:
        raise ValueError(f"cannot compile for H100: {missing}")


def prepare() -> None:
    """Before JAX is used: no GPU is looked for, and what is compiled for one is not kept, as it could not be read back."""
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"  # of a GPU: the plugin is here for its compiler
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)


def h100s(count: int, per_node: int = 8) -> Any:
    """So many H100s, in nodes, which need not exist."""
    inside = per_node if count % per_node == 0 else count
    topology = f"1x{count // inside}x{inside}"
    return topologies.get_topology_desc(
        platform="cuda", target_config=TARGET.read_text(), topology=topology
    ).devices


def check(run: Run) -> None:
    """Raises ValueError for a run that cannot be compiled here; to be called before anything is computed."""
    if run.hardware.name != "h100":
        raise ValueError(f"--compile: the compiler knows H100s, not --hardware={run.hardware.name}")
    check_compiler()
    prepare()


def compile_step(cfg: Config, mesh: Mesh) -> jax.stages.Compiled:
    """The step for a whole batch. Raises ValueError for a mesh that training does not support."""
    scalar: Any = jax.ShapeDtypeStruct((), jnp.float32)
    count: Any = jax.ShapeDtypeStruct((), jnp.int32)
    hyper = Hyper(scalar, scalar, scalar, count if cfg.train.grad_accumulation > 1 else None)
    step: Any = make_train_step(cfg, mesh)
    return step.trace(abstract_state(cfg, mesh), abstract_batch(cfg, mesh), hyper).lower().compile()


def report(prediction: Prediction) -> str:
    """XLA's arguments, outputs and temporaries beside the predicted bytes; and which exchanges GEMMs hide."""
    run, began = prediction.run, time.perf_counter()
    compiled = compile_step(run.cfg, make_mesh(run.cfg.mesh, h100s(run.devices)))
    took, stats = time.perf_counter() - began, compiled.memory_analysis()
    assert stats is not None
    kept = prediction.memory["master weights"] + prediction.memory["moments"]
    rows: list[tuple[str, float, float]] = [
        ("arguments: state and batch", stats.argument_size_in_bytes, kept),
        ("outputs, not in the arguments' place", stats.output_size_in_bytes - stats.alias_size_in_bytes, 0.0),
        ("temporaries", stats.temp_size_in_bytes, prediction.bytes - kept),
    ]
    rows.append(("all", sum(row[1] for row in rows), sum(row[2] for row in rows)))
    unit = unit_of(prediction.bytes)
    lines = [(name, [f"{a / UNITS[unit]:.2f}", f"{b / UNITS[unit]:.2f}"]) for name, a, b in rows]
    title = f"compiled for H100, in {took:.0f} s"
    return table(title, [f"XLA {unit}", "predicted"], lines) + "\n" + exchanges(compiled.as_text() or "")


def exchanges(program: str) -> str:
    """How many of a compiled step's collectives travel while matrices are multiplied, in pairs of layers and in all."""
    found = transfers(program)
    in_pairs = [t for t in found if f"/{PAIR}/" in t.op_name and t.within("dispatch", "combine")]
    lines = [f"{sum(not t.is_sync for t in found)} of {len(found)} collectives are asynchronous"]
    if in_pairs:
        hidden = sum(t.hidden for t in in_pairs)
        lines.append(
            f"in pairs of layers, {hidden} of {len(in_pairs)} dispatches and combines travel beside GEMMs"
        )
    return "\n".join(f"  {line}" for line in lines)
