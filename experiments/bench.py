"""Speed of this project beside Hugging Face transformers, same dimensions, batch and sequence, in one run.

    python -m experiments.bench train      # forward, backward, clipping, AdamW; batch 8 x 256, float32
    python -m experiments.bench decode     # 128 prompt + 128 new tokens, greedy, batch 1 and 8
    python -m experiments.bench experts    # our step with 4 times the experts, same top-k and tokens
    python -m experiments.bench speculative --checkpoint=runs/tiny   # drafts from the MTP module against none
    python -m experiments.bench exchange   # experts over a mesh: ragged exchange beside padded and all-gather

Each side has a process of its own, idle while the other measures; the rounds alternate, and medians are compared.
Compilation and warm-up are not counted. Where torch or transformers are missing, ours is measured alone;
--peer_python=PATH runs the peer in another interpreter.
"""

import argparse
import functools
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from configs import matched_cpu
from deepseek_jax.config import Config, from_config_dict, to_dict
from experiments import command_line
from experiments.bench_worker import Worker
from experiments.devices import cores, force_devices

OURS, PEER = "deepseek_jax", "transformers"
PROMPT, NEW = 128, 128


def _config(experts: int = 1) -> Config:
    config = matched_cpu.get_config()
    config.model.n_routed_experts *= experts
    return from_config_dict(config)


def _train_spec(cfg: Config, args: argparse.Namespace) -> dict[str, Any]:
    c = cfg.optimizer
    return {
        "kind": "train",
        "threads": args.threads,
        "steps": args.steps,
        "config": to_dict(cfg),
        "hf_config": cfg.model.to_hf(),
        "batch": cfg.train.batch_size,
        "seq_len": cfg.data.seq_len,
        "optimizer": {
            "lr": c.peak_lr,
            "betas": [c.b1, c.b2],
            "weight_decay": c.weight_decay,
            "clip_norm": c.clip_norm,
        },
    }


def _decode_spec(cfg: Config, args: argparse.Namespace, batch: int) -> dict[str, Any]:
    return {
        "kind": "decode",
        "threads": args.threads,
        "config": to_dict(cfg),
        "hf_config": cfg.model.to_hf(),
        "batch": batch,
        "prompt": PROMPT,
        "new": NEW,
    }


def _machine() -> str:
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as file:
            name = next((line.split(":")[1].strip() for line in file if line.startswith("model name")), name)
    except OSError:  # not Linux
        pass
    load = f", load average {os.getloadavg()[0]:.2f}" if hasattr(os, "getloadavg") else ""
    return f"{name}, {cores()} cores{load}"


def _workers(args: argparse.Namespace) -> dict[str, Worker]:
    """The workers that can run, ours first. Raises ValueError, none running, for a wrong --peer_python."""
    peer = None
    if args.command != "experts":
        # OpenMP's threads would otherwise spin on the cores for a while after the peer's last step.
        peer = Worker("experiments.bench_torch", args.peer_python, {"OMP_WAIT_POLICY": "PASSIVE"})
        if peer.missing is not None:
            print(f"no comparison: {args.peer_python}: {peer.missing}")
            print(
                "  (install torch and transformers, or name an interpreter that has them: --peer_python=PATH)"
            )
            peer.close()
            peer = None
    ours = Worker("experiments.bench_ours", environment={"JAX_PLATFORMS": "cpu"})
    return {OURS: ours} if peer is None else {OURS: ours, PEER: peer}


Task = tuple[str, Callable[[], float]]  # name, seconds of one round


def _alternate(tasks: Sequence[Task], rounds: int) -> dict[str, list[float]]:
    """Seconds of every round, the tasks by turns."""
    seconds: dict[str, list[float]] = {name: [] for name, _ in tasks}
    for _ in range(rounds):
        for name, measure in tasks:
            seconds[name].append(measure())
    return seconds


def _report(title: str, seconds: dict[str, list[float]], tokens: int) -> None:
    """Rates of each side, and the ratio of the medians and of the single rounds."""
    print(title)
    for name, rounds in seconds.items():
        rate, low, high = (tokens / f(rounds) for f in (statistics.median, max, min))
        print(
            f"  {name:<14}{rate:>10,.0f} tokens/s   ({low:,.0f} to {high:,.0f}; "
            f"{statistics.median(rounds) * 1e3:,.1f} ms)"
        )
    if PEER in seconds:
        ratios = [p / o for p, o in zip(seconds[PEER], seconds[OURS], strict=True)]
        ratio = statistics.median(seconds[PEER]) / statistics.median(seconds[OURS])
        print(f"  ratio {ratio:.2f}x   (rounds {min(ratios):.2f} to {max(ratios):.2f})")
    print(flush=True)


def _compare(
    workers: dict[str, Worker], case: str, title: str, spec: dict[str, Any], rounds: int, tokens: int
) -> None:
    for worker in workers.values():
        worker.setup(case, **spec)
    tasks = [(name, functools.partial(worker.measure, case)) for name, worker in workers.items()]
    _report(title, _alternate(tasks, rounds), tokens)


def _experts(worker: Worker, args: argparse.Namespace) -> None:
    tasks: list[Task] = []
    for factor in (1, 4):
        cfg = _config(factor)
        name = f"{cfg.model.n_routed_experts} experts"
        worker.setup(name, **_train_spec(cfg, args))
        tasks.append((name, functools.partial(worker.measure, name)))
    medians = {name: statistics.median(s) for name, s in _alternate(tasks, args.rounds).items()}
    few, many = medians.values()
    print("train step, same top-k and tokens")
    for name, seconds in medians.items():
        print(f"  {name:<14}{seconds * 1e3:>8,.1f} ms")
    print(f"  ratio {many / few:.2f}x (goal: at most 1.30)")


# Beginnings that the corpus of configs/tiny.py, Python sources, goes on from.
SPECULATIVE_PROMPTS = (
    "def read(self, size=-1):\n    ",
    "class Parser:\n    def __init__(self, ",
    "import os\nimport sys\n",
    "    if not isinstance(value, ",
)


def _speculative(args: argparse.Namespace) -> None:
    import deepseek_jax

    model = deepseek_jax.load(args.checkpoint)
    drafted = accepted = 0

    def run(speculative: bool) -> float:
        nonlocal drafted, accepted
        began = time.perf_counter()
        for prompt in SPECULATIVE_PROMPTS:
            model.generate(prompt, NEW, stop_ids=[], speculative=speculative)
            if speculative and model.last_stats:
                drafted, accepted = drafted + model.last_stats.drafted, accepted + model.last_stats.accepted
        return time.perf_counter() - began

    tasks: list[Task] = [
        (name, functools.partial(run, name == "speculative")) for name in ("plain", "speculative")
    ]
    for _, measure in tasks:
        measure()
    medians = {name: statistics.median(s) for name, s in _alternate(tasks, args.rounds).items()}
    tokens = NEW * len(SPECULATIVE_PROMPTS)
    print(
        f"decode of {args.checkpoint}, batch 1, {NEW} new tokens after each of {len(SPECULATIVE_PROMPTS)} prompts"
    )
    for name, seconds in medians.items():
        print(f"  {name:<14}{tokens / seconds:>10,.0f} tokens/s")
    share = accepted / max(1, drafted)
    print(f"  acceptance {share:.1%}, {1 + share:.2f} tokens per step")
    print(f"  ratio to plain {medians['plain'] / medians['speculative']:.2f}x")


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = command_line.Parser(description="Speed beside Hugging Face transformers, on CPU.")
    parser.add_argument("command", choices=("train", "decode", "experts", "speculative", "exchange"))
    parser.add_argument("--checkpoint", default="runs/tiny", help="of `speculative`: a run or a checkpoint")
    parser.add_argument(
        "--peer_python", default=sys.executable, help="interpreter with torch and transformers"
    )
    parser.add_argument("--rounds", type=int, default=7, help="rounds of each side")
    parser.add_argument("--steps", type=int, default=4, help="training steps per round")
    parser.add_argument(
        "--threads", type=int, default=2, help="torch threads, and at most as many devices of ours"
    )
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8], help="batch sizes of decode")
    args = parser.parse_args(argv)
    for name in ("rounds", "steps", "threads", "batch"):
        if min([getattr(args, name)] if name != "batch" else args.batch) < 1:
            parser.error(f"--{name}={getattr(args, name)} must be at least 1")
    return args


def main(argv: Sequence[str]) -> int:
    args = _arguments(argv)
    print(f"machine: {_machine()}")
    if args.command == "exchange":
        force_devices(8)
        from experiments import bench_exchange

        bench_exchange.run(args)
        return 0
    if args.command == "speculative":
        _speculative(args)
        return 0
    workers = _workers(args)
    for name, worker in workers.items():
        print(f"{name}: " + ", ".join(f"{k} {v}" for k, v in worker.versions.items()))
    print(flush=True)
    cfg = _config()
    try:
        if args.command == "experts":
            _experts(workers[OURS], args)
        elif args.command == "train":
            batch, length = cfg.train.batch_size, cfg.data.seq_len
            title = f"train, batch {batch} x {length}, {cfg.model.dtype}, {args.threads} threads"
            _compare(workers, "train", title, _train_spec(cfg, args), args.rounds, batch * length)
        else:
            for batch in args.batch:
                title = f"decode, batch {batch}, {PROMPT} prompt + {NEW} new tokens, greedy"
                spec = _decode_spec(cfg, args, batch)
                _compare(workers, f"decode{batch}", title, spec, args.rounds, batch * NEW)
    finally:
        for worker in workers.values():
            worker.close()
    return 0


if __name__ == "__main__":
    command_line.run(main)
