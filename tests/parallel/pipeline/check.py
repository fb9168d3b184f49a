"""Compares the pipelined step with the step of the same micro-batches on the mesh without a pipeline: the long form.

    python -m tests.parallel.pipeline.check [--only=NAME-OR-NUMBER ...] [--from=NUMBER] [--list]
    python -m tests.float64 tests.parallel.pipeline.check ...

Each case runs a few steps of a tiny model both ways on eight CPU devices and prints one line: the loss, the largest
relative difference (by the norm of an array) of all gradients and of all metrics in any step, and whether expert loads
and the router's bias are the same integers and bits. The exit status is the number of cases that do not hold.

Both take each step from the same state, that of the run without a pipeline: the bounds are of the rounding in one step.
From state to state it grows without one, since AdamW divides by the gradient's size: of an entry whose terms cancel down
to eps, 1e-8, rounding is as large as the gradient, and the weight moves by a part of the learning rate, either way.

Rounding to FP8 is not continuous (`tests/float64.py`), so its cases are compared in float64 alone.
"""

import argparse
import functools
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.config import Config, from_config_dict
from deepseek_jax.model.loss import token_logprobs
from deepseek_jax.parallel.mesh import batch_sharding, make_mesh, named_devices
from deepseek_jax.training.labels import Batch, Totals, targets
from deepseek_jax.training.objectives import Objective, Outputs, Scalars
from deepseek_jax.training.state import Hyper, TrainState, state_shardings
from deepseek_jax.training.step import Metrics, init_state, make_train_step
from tests.parallel.comparison import BOUND, difference
from tests.parallel.pipeline.runs import without
from tests.tiny_run import MODEL

STEPS = 4
# Of BF16: some 20 roundings of 2^-9 along a gradient's path, of random sign, on each side: sqrt(2 * 20) * 2^-9.
BOUNDS = {"float32": BOUND, "float64": BOUND * 2.0**-29, "bfloat16": 1.3e-2}

MODEL = MODEL | {"num_hidden_layers": 5, "initializer_range": 0.2}
SECTIONS: dict[str, dict[str, Any]] = {
    "model": MODEL,
    "data": {"vocab_size": 384, "seq_len": 8},
    "optimizer": {"moment_dtype": "float32"},  # the first moment shows the gradient itself
    "train": {"loss_chunk": 48, "grad_accumulation": 8},
    "mesh": {"data": 1},
}


class Case(NamedTuple):
    """keys: of the config, as "mesh.pipe". masks: packed documents and padding. ramp: micro-batches that are there in each
    step. policy: the objective is a clipped ratio of probabilities. rows: sequences of a micro-batch on each device."""

    keys: Mapping[str, Any]
    masks: bool = False
    ramp: tuple[int, ...] = ()
    policy: bool = False
    rows: int = 1


def _mesh(
    pipe: int, data: int = 1, node: int = 1, local: int = 1, tensor: int = 1, **more: Any
) -> dict[str, Any]:
    sizes = {"pipe": pipe, "data": data, "node": node, "local": local, "tensor": tensor} | more
    return {f"mesh.{name}": value for name, value in sizes.items()}


FOUR = _mesh(4, node=2, overlap=True, stage_layers=(2, 1, 1, 1))
EIGHT = (1, 1, 1, 0, 1, 0, 1, 0)
FP8 = {"precision": "deepseek_fp8"}
MTP = "model.num_nextn_predict_layers"
TIED = {"model.tie_word_embeddings": True, MTP: 0}

CASES = {
    "pipe 2, node 2, data 2, zero, overlap": Case(
        _mesh(2, 2, 2, zero=True, overlap=True, stage_layers=(3, 2)), True, (8, 4, 5, 8)
    ),
    "pipe 4, node 2, zero, overlap": Case(FOUR | {"mesh.zero": True}),
    "pipe 4, node 2, overlap off": Case(FOUR | {"mesh.overlap": False}),
    "pipe 8": Case(_mesh(8, stage_layers=EIGHT) | {"train.grad_accumulation": 16}),
    "two hops: pipe 2, node 2, local 2, zero, overlap": Case(
        _mesh(2, 1, 2, 2, zero=True, overlap=True, stage_layers=(3, 2))
    ),
    "experts replicated": Case(_mesh(4, node=2, experts="replicated")),
    "remat deepseek": Case(FOUR | {"train.remat": "deepseek"}),
    "remat full": Case(FOUR | {"train.remat": "full"}),
    "remat full, overlap off, zero": Case(
        FOUR | {"train.remat": "full", "mesh.overlap": False, "mesh.zero": True}
    ),
    "receive, masks": Case(FOUR | {"mesh.receive": 1.0}, True),
    "receive, remat full": Case(FOUR | {"mesh.receive": 1.0, "train.remat": "full"}),
    "fp8": Case(FOUR | FP8),
    "fp8, zero, remat deepseek, receive, queue": Case(
        FOUR
        | FP8
        | {"mesh.zero": True, "train.remat": "deepseek", "mesh.receive": 1.0, "mesh.weight_queue": 2}
    ),
    "fp8, zero bubble, two rows": Case(FOUR | FP8 | {"mesh.schedule": "zero_bubble"}, rows=2),
    "masks, ramp": Case(FOUR, True, (8, 3, 1, 8)),
    "ramp": Case(FOUR, False, (2, 8, 5, 8)),
    "queue of three": Case(FOUR | {"mesh.weight_queue": 3}),
    "dualpipe_v": Case(FOUR | {"mesh.schedule": "dualpipe_v", "mesh.stage_layers": EIGHT}),
    "dualpipe_v, queue, zero": Case(
        _mesh(
            2, 2, 2, schedule="dualpipe_v", weight_queue=1, zero=True, overlap=True, stage_layers=(2, 1, 1, 1)
        )
    ),
    "zero_bubble": Case(FOUR | {"mesh.schedule": "zero_bubble"}),
    "one_f_one_b": Case(FOUR | {"mesh.schedule": "one_f_one_b"}),
    "gpipe": Case(FOUR | {"mesh.schedule": "gpipe"}),
    "uneven stages, an empty one": Case(FOUR | {"mesh.stage_layers": (0, 3, 0, 2)}),
    "three ranks": Case(_mesh(3, node=2) | {"train.grad_accumulation": 5}),
    "tensor 2": Case(_mesh(2, 1, 2, tensor=2, zero=True, overlap=True, stage_layers=(3, 2)), True),
    "two MTP modules": Case(FOUR | {MTP: 2}, True),
    "no MTP": Case(FOUR | {MTP: 0}),
    "tied embeddings": Case(FOUR | TIED | {"mesh.zero": True}),
    "tied embeddings, MTP": Case(FOUR | TIED | {MTP: 1}),
    "classic balance, masks": Case(FOUR | {"balance.mode": "classic"}, True),
    "no balance": Case(FOUR | {"balance.mode": "none"}),
    "bfloat16": Case(FOUR | {"model.dtype": "bfloat16", "mesh.zero": True}),
    "frozen": Case(FOUR | {"train.frozen": "embed|moe.*gate"}),
    "a policy's objective": Case(FOUR | {MTP: 0}, True, policy=True),
    "dense layers only": Case(
        _mesh(4, 2) | {"model.n_routed_experts": 0, "model.first_k_dense_replace": 5, MTP: 0}
    ),
    "fp8, dualpipe_v, remat deepseek, no MTP": Case(
        _mesh(4, node=2, schedule="dualpipe_v", stage_layers=(1, 1, 1, 1, 1, 0, 0, 0))
        | FP8
        | {"train.remat": "deepseek", MTP: 0}
    ),
    "fp8, two layers": Case(
        _mesh(2, node=2, schedule="zero_bubble", stage_layers=(1, 1))
        | FP8
        | {
            "train.remat": "deepseek",
            "train.grad_accumulation": 2,
            MTP: 0,
            "model.num_hidden_layers": 2,
            "model.first_k_dense_replace": 0,
        }
    ),
}


# --- a run --------------------------------------------------------------------------------------------------------


def _config(case: Case) -> Config:
    sections: dict[str, Any] = {name: dict(values) for name, values in SECTIONS.items()}
    for key, value in case.keys.items():
        section, _, field = key.rpartition(".")
        (sections.setdefault(section, {}) if section else sections)[field] = value
    mesh, train = sections["mesh"], sections["train"]
    shards = mesh["data"] * mesh["node"] * mesh["local"]
    train["batch_size"] = shards * train["grad_accumulation"] * case.rows
    return from_config_dict(sections)


def _policy(cfg: Config) -> Objective:
    """A clipped ratio of probabilities, as reinforcement learning has it."""

    def objective(out: Outputs, batch: Batch, total: Totals, hyper: Hyper) -> tuple[jax.Array, Scalars]:
        labels, valid = map(out.sequence.own, targets(batch, cfg.data.seq_len, 0))
        h_nd = out.h_btd.reshape(-1, out.h_btd.shape[-1])
        logp = token_logprobs(h_nd, out.head_dv, labels.reshape(-1), cfg.train.loss_chunk).logp.reshape(
            labels.shape
        )
        ratio = jnp.exp(logp - jax.lax.stop_gradient(logp) + 0.1 * jnp.sin(labels.astype(jnp.float32)))
        worth = (labels % 7 - 3).astype(jnp.float32)
        gain = jnp.minimum(ratio * worth, jnp.clip(ratio, 0.95, 1.05) * worth)
        loss = -(gain * valid).sum() / total.labels[0]
        return loss, {"loss": loss, "entropy": -(logp * valid).sum() / total.labels[0]}

    return objective


def _batch(cfg: Config, case: Case, step: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(step)
    shape = (cfg.train.batch_size, cfg.data.seq_len + 1)
    batch = {"tokens": rng.integers(0, cfg.model.vocab_size, shape, np.int32)}
    if case.masks:
        at, cut = np.arange(shape[1])[None], rng.integers(1, shape[1], (shape[0], 1))
        batch["segments"] = (at >= cut).astype(np.int32)
        batch["positions"] = np.where(at >= cut, at - cut, at).astype(np.int32)
        batch["padding"] = at >= rng.integers(2, shape[1] + 1, (shape[0], 1))
    return batch


class Run(NamedTuple):
    """Of each step: a host copy of the state after it, and its metrics."""

    states: list[TrainState]
    metrics: list[Metrics]


def _run(cfg: Config, case: Case, first: TrainState, before: Sequence[TrainState] = ()) -> Run:
    """before: states from which the steps after the first begin, instead of where the run has come to."""
    mesh = make_mesh(cfg.mesh, jax.devices()[: named_devices(cfg.mesh)])
    run, shardings = Run([], []), state_shardings(cfg, mesh)
    step = make_train_step(cfg, mesh, _policy(cfg) if case.policy else None)
    state = jax.device_put(first, shardings)
    for i in range(STEPS):
        hyper = Hyper(*map(jnp.float32, (3e-3, 0.01, 0.3)))
        if case.ramp:
            hyper = hyper._replace(micro_batches=np.int32(case.ramp[i]))
        if i and before:
            state = jax.device_put(before[i - 1], shardings)
        state, metrics = step(state, jax.device_put(_batch(cfg, case, i), batch_sharding(mesh)), hyper)
        run.states.append(jax.device_get(state))
        run.metrics.append(jax.device_get(metrics))
    return run


# --- the comparison -----------------------------------------------------------------------------------------------


def check(case: Case) -> tuple[bool, str]:
    """(whether it holds, the line)"""
    cfg, began = _config(case), time.process_time()
    if cfg.precision != "bf16" and cfg.model.dtype == "float32":
        return True, "not compared: FP8 is in float64 alone"
    # Where arithmetic is quantised, recomputation rounds otherwise.
    plain = without(cfg, "none" if cfg.precision == "bf16" else cfg.train.remat)
    first = jax.device_get(
        init_state(plain, make_mesh(plain.mesh, jax.devices()[: named_devices(plain.mesh)]))
    )
    want = _run(plain, case, first)
    got = _run(cfg, case, first, want.states)
    worst, path = max(map(_worst_moment, got.states, want.states), key=lambda found: found[0])
    steps = list(zip(got.metrics, want.metrics, strict=True))
    of_metrics, metric = max(
        (difference(a.scalars[name], x), name) for a, b in steps for name, x in b.scalars.items()
    )
    counts = all(np.array_equal(a.counts_le, b.counts_le) for a, b in steps)
    bias = all(
        np.array_equal(a.balance_bias, b.balance_bias) for a, b in zip(got.states, want.states, strict=True)
    )
    finite = all(m.finite for m in want.metrics)
    bound = BOUNDS[cfg.model.dtype]
    holds = worst < bound and of_metrics < bound and finite and ((counts and bias) or bound > 1e-3)
    same = "equal" if counts and bias else "differ"
    line = (
        f"{cfg.model.dtype}, {STEPS} steps: gradients {worst:.1e} ({path}), metrics {of_metrics:.1e} ({metric}), loads and "
        f"bias {same}; loss {want.metrics[0].scalars['loss']:.5f}; {time.process_time() - began:.0f} s of CPU"
    )
    return holds, line


def _worst_moment(got: TrainState, want: TrainState) -> tuple[float, str]:
    """Of two states after a step from the same one, whose first moments then differ by its gradients alone."""
    moments = jax.tree_util.tree_leaves_with_path(got.opt_state.mu)
    pairs = zip(moments, jax.tree.leaves(want.opt_state.mu), strict=True)
    return max((difference(x, y), jax.tree_util.keystr(path)) for (path, x), y in pairs)


def _chosen(args: argparse.Namespace) -> list[tuple[int, str]]:
    numbered = list(enumerate(CASES, 1))
    if args.only:
        return [(n, name) for n, name in numbered if str(n) in args.only or name in args.only]
    return [(n, name) for n, name in numbered if n >= args.start]


def _guarded(run: Callable[[], tuple[bool, str]]) -> tuple[bool, str]:
    """A case that raises does not end the others."""
    try:
        return run()
    except Exception as error:
        return False, f"{type(error).__name__}: {str(error).splitlines()[0]}"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--only", action="append", help="a case, by number or name; may be given again")
    parser.add_argument("--from", dest="start", type=int, default=1, help="the number of the first case")
    parser.add_argument("--list", action="store_true", help="print the cases, run none")
    args = parser.parse_args()
    # The step is checked, not the compiler, which takes most of the time. In a fusion it would keep the float32 value of
    # what the program rounds to BF16, and the two programs are not fused alike.
    flags = "--xla_backend_optimization_level=0 --xla_allow_excess_precision=false"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()
    jax.config.update("jax_num_cpu_devices", 8)
    jax.config.update("jax_platforms", "cpu")
    failed = 0
    for number, name in _chosen(args):
        if args.list:
            print(f"{number:2d}  {name}")
            continue
        holds, line = _guarded(functools.partial(check, CASES[name]))
        failed += not holds
        print(f"{number:2d}  {'holds' if holds else 'FAILS'}  {name}: {line}", flush=True)
        jax.clear_caches()
    return failed


if __name__ == "__main__":
    sys.exit(main())
