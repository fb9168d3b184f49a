"""Speed of this project beside Hugging Face transformers, same dimensions, batch and sequence, in one run.

    python -m experiments.bench train      # forward, backward, clipping, AdamW; batch 8 x 256, float32
    python -m experiments.bench decode     # 128 prompt + 128 new tokens, greedy, batch 1 and 8
    python -m experiments.bench experts    # our step with 4 times the experts, same top-k and tokens
    python -m experiments.bench speculative --checkpoint=runs/tiny   # drafts from the MTP module against none
    python -m experiments.bench exchange   # experts over a mesh: ragged exchange beside padded and all-gather
    python -m experiments.bench pipeline   # CPU seconds of a step over pipeline stages beside one without them
    python -m experiments.bench serve      # the engine and the server beside vLLM and transformers (serve --help)
    python -m experiments.bench sft        # fine-tuning of packed conversations beside TRL
    python -m experiments.bench gpu        # steps and decoding on a GPU, losses beside the CPU's, kernels of a profile

Each side has a process of its own, idle while the other measures; the rounds alternate, and medians are compared.
Compilation and warm-up are not counted. Beside each stand its CPU seconds, which a busy neighbour disturbs least, and
the rate of float32 matrix products on the same cores in the same rounds, by the faster of both libraries. Where torch
or transformers are missing, ours is measured alone; --peer_python=PATH runs the peer in another interpreter.
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
from experiments.bench_worker import PEAK_PRODUCTS, PEAK_SIZE, Round, Worker
from experiments.devices import cores, force_devices

OURS, PEER = "deepseek_jax", "transformers"
PROMPT, NEW = 128, 128


def _config(experts: int = 1) -> Config:
    config = matched_cpu.get_config()
    config.model.n_routed_experts *= experts
    return from_config_dict(config)


def _spec(kind: str, cfg: Config, args: argparse.Namespace, batch: int) -> dict[str, Any]:
    """What a worker is told: the two configs hold the rest."""
    return {
        "kind": kind,
        "threads": args.threads,
        "steps": args.steps,
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


Task = tuple[str, Callable[[], Round]]  # name, what measures one round


def _alternate(tasks: Sequence[Task], rounds: int) -> dict[str, list[Round]]:
    """Every round of each task, the tasks by turns."""
    measured: dict[str, list[Round]] = {name: [] for name, _ in tasks}
    for _ in range(rounds):
        for name, measure in tasks:
            measured[name].append(measure())
    return measured


def _seconds(rounds: Sequence[Round]) -> float:
    return statistics.median(r.seconds for r in rounds)


def _report(title: str, rounds: dict[str, list[Round]], tokens: int, peak: float, flops: float) -> None:
    """Rates and CPU time of each side; flops, unless 0, per cent of the peak [FLOP/s]; ratios of the medians and of the
    single rounds."""
    print(f"{title}; float32 matmul peak {peak / 1e9:,.0f} GFLOP/s")
    for name, side in rounds.items():
        seconds = [r.seconds for r in side]
        rate, low, high = (tokens / f(seconds) for f in (statistics.median, max, min))
        share = f", {flops / _seconds(side) / peak:.0%} of the peak" if flops else ""
        print(
            f"  {name:<14}{rate:>10,.0f} tokens/s   ({low:,.0f} to {high:,.0f}; {_seconds(side) * 1e3:,.1f} ms, "
            f"{statistics.median(r.cpu for r in side):.3f} CPU s{share})"
        )
    if PEER in rounds:
        pairs = list(zip(rounds[PEER], rounds[OURS], strict=True))
        single, cpu = [p.seconds / o.seconds for p, o in pairs], [p.cpu / o.cpu for p, o in pairs]
        ratio = _seconds(rounds[PEER]) / _seconds(rounds[OURS])
        print(
            f"  ratio {ratio:.2f}x   (rounds {min(single):.2f} to {max(single):.2f}; "
            f"in CPU time {statistics.median(cpu):.2f}x)"
        )
    print(flush=True)


def _compare(
    workers: dict[str, Worker],
    case: str,
    title: str,
    spec: dict[str, Any],
    rounds: int,
    tokens: int,
    flops: float = 0,
) -> None:
    tasks: list[Task] = []
    for name, worker in workers.items():
        worker.setup(case, **spec)
        worker.setup("peak", kind="peak", size=PEAK_SIZE, products=PEAK_PRODUCTS, threads=spec["threads"])
        tasks += [(name, functools.partial(worker.measure, case))]
        tasks += [(f"peak {name}", functools.partial(worker.measure, "peak"))]
    measured = _alternate(tasks, rounds)
    fastest = min(_seconds(measured.pop(f"peak {name}")) for name in workers)
    _report(title, measured, tokens, 2 * PEAK_SIZE**3 / fastest, flops)


def _experts(worker: Worker, args: argparse.Namespace) -> None:
    tasks: list[Task] = []
    for factor in (1, 4):
        cfg = _config(factor)
        name = f"{cfg.model.n_routed_experts} experts"
        worker.setup(name, **_spec("train", cfg, args, cfg.train.batch_size))
        tasks.append((name, functools.partial(worker.measure, name)))
    medians = {name: _seconds(rounds) for name, rounds in _alternate(tasks, args.rounds).items()}
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

    def run(speculative: bool) -> Round:
        nonlocal drafted, accepted
        began, cpu = time.perf_counter(), time.process_time()
        for prompt in SPECULATIVE_PROMPTS:
            model.generate(prompt, NEW, stop_ids=[], speculative=speculative)
            if speculative and model.last_stats:
                drafted, accepted = drafted + model.last_stats.drafted, accepted + model.last_stats.accepted
        return Round(time.perf_counter() - began, time.process_time() - cpu)

    tasks: list[Task] = [
        (name, functools.partial(run, name == "speculative")) for name in ("plain", "speculative")
    ]
    for _, measure in tasks:
        measure()
    medians = {name: _seconds(rounds) for name, rounds in _alternate(tasks, args.rounds).items()}
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
    parser = command_line.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "command",
        choices=("train", "decode", "experts", "speculative", "exchange", "pipeline", "serve", "sft", "gpu"),
    )
    parser.add_argument("--checkpoint", default="runs/tiny", help="of `speculative`: a run or a checkpoint")
    parser.add_argument(
        "--peer_python", default=sys.executable, help="interpreter with torch and transformers"
    )
    parser.add_argument("--rounds", type=int, default=7, help="rounds of each side")
    parser.add_argument("--steps", type=int, default=4, help="training steps per round")
    parser.add_argument(
        "--threads", type=int, default=2, help="torch threads, and at most as many devices of ours"
    )
    parser.add_argument("--seconds", type=float, default=400, help="of `gpu`: from which on nothing is begun")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8], help="batch sizes of decode")
    args = parser.parse_args(argv)
    for name in ("rounds", "steps", "threads", "batch"):
        if min([getattr(args, name)] if name != "batch" else args.batch) < 1:
            parser.error(f"--{name}={getattr(args, name)} must be at least 1")
    return args


def main(argv: Sequence[str]) -> int:
    if argv and argv[0] == "serve":
        from experiments import bench_serve

        print(f"machine: {_machine()}")
        return bench_serve.main(argv[1:])
    args = _arguments(argv)
    print(f"machine: {_machine()}")
    if args.command == "gpu":
        from experiments import bench_gpu

        return bench_gpu.run(args.seconds)
    if args.command in ("exchange", "pipeline"):
        force_devices(8)
        from experiments import bench_exchange, bench_pipeline

        bench_exchange.run(args) if args.command == "exchange" else bench_pipeline.run(args, _alternate)
        return 0
    if args.command == "sft":
        from experiments import bench_sft

        return bench_sft.run(args, _config(), _alternate)
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
            flops = cfg.model.flops_per_token(length) * batch * length
            _compare(
                workers,
                "train",
                title,
                _spec("train", cfg, args, cfg.train.batch_size),
                args.rounds,
                batch * length,
                flops,
            )
        else:
            for batch in args.batch:
                title = f"decode, batch {batch}, {PROMPT} prompt + {NEW} new tokens, greedy"
                spec = _spec("decode", cfg, args, batch)
                _compare(workers, f"decode{batch}", title, spec, args.rounds, batch * NEW)
    finally:
        for worker in workers.values():
            worker.close()
    return 0


if __name__ == "__main__":
    command_line.run(main)
