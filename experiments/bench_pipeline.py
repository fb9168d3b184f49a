"""What the executor of a pipeline costs: `python -m experiments.bench pipeline`.

The training step of `configs/tiny.py` on 8 CPU devices as pipe 4 x node 2, with 1F1B and with DualPipe, beside the step
without a pipeline on the same devices as data 4 x node 2: the same global batch and the same micro-batches, of one
sequence. Virtual devices share the cores, so clocks say nothing of bubbles; CPU seconds of the whole process say what all
devices do together.
"""

import argparse
import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from configs import tiny
from deepseek_jax.config import Config, from_config_dict
from deepseek_jax.parallel.mesh import batch_sharding, make_mesh
from deepseek_jax.training.schedules import Schedules
from deepseek_jax.training.step import init_state, make_train_step
from experiments.bench_ours import peak
from experiments.bench_worker import PEAK_SIZE, Round

PEAK_PRODUCTS = 2  # in a row, on each device
SEQUENCES = 16  # of a batch: DualPipe's fewest
WAYS: Mapping[str, tuple[int, dict[str, Any]]] = {  # micro-batches of each device, mesh
    "no pipeline": (2, {"data": 4, "node": 2}),
    "1F1B": (8, {"pipe": 4, "data": 1, "node": 2, "schedule": "one_f_one_b"}),
    "DualPipe": (8, {"pipe": 4, "data": 1, "node": 2, "schedule": "dualpipe"}),
}


def config(way: str) -> Config:
    micro, mesh = WAYS[way]
    cfg = from_config_dict(tiny.get_config())
    return dataclasses.replace(
        cfg,
        mesh=dataclasses.replace(cfg.mesh, **mesh),
        train=dataclasses.replace(cfg.train, batch_size=SEQUENCES, grad_accumulation=micro),
    )


def stepper(cfg: Config) -> Callable[[int], Round]:
    """Takes so many steps, on batches that do not change; returns the seconds of one. Warmed up."""
    mesh = make_mesh(cfg.mesh)
    shape = (cfg.train.batch_size, cfg.data.seq_len + 1)
    tokens = np.random.default_rng(0).integers(0, cfg.model.vocab_size, shape, np.int32)
    batch = {"tokens": jax.device_put(tokens, batch_sharding(mesh))}
    step, state = make_train_step(cfg, mesh), init_state(cfg, mesh)
    hyper = Schedules.of_steps(cfg.optimizer, cfg.train, cfg.data.seq_len).hyper(0, 0)

    def run(steps: int) -> Round:
        nonlocal state
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(steps):
            state, metrics = step(state, batch, hyper)
            jax.block_until_ready((state, metrics))
        return Round((time.perf_counter() - wall) / steps, (time.process_time() - cpu) / steps)

    run(2)
    return run


def run(args: argparse.Namespace, alternate: Callable[..., dict[str, list[Round]]]) -> None:
    """Prints a line per way; `alternate` measures rounds by turns."""
    tasks = [(way, functools.partial(stepper(config(way)), args.steps)) for way in WAYS]
    multiply = peak(PEAK_SIZE, PEAK_PRODUCTS)
    rounds = alternate([*tasks, ("peak", lambda: Round(multiply(), 0.0))], args.rounds)
    fastest = statistics.median(r.seconds for r in rounds.pop("peak"))
    cfg = config("no pipeline")
    print(
        f"train step, 8 CPU devices, {SEQUENCES} sequences of {cfg.data.seq_len} tokens, one per micro-batch; "
        f"float32 matmul peak {2 * PEAK_SIZE**3 / fastest / 1e9:,.0f} GFLOP/s"
    )
    base = next(iter(WAYS))
    for way, found in rounds.items():
        ratios = [a.cpu / b.cpu for a, b in zip(found, rounds[base], strict=True)]
        print(
            f"  {way:<14}{statistics.median(r.cpu for r in found):>8.2f} CPU s"
            f"{statistics.median(r.seconds for r in found):>8.2f} s   ratio in CPU time "
            f"{statistics.median(ratios):.2f}x   (rounds {min(ratios):.2f} to {max(ratios):.2f})"
        )
    print("  goal: at most 1.25x")
