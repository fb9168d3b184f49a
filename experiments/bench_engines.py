"""Engines of `experiments.bench serve`, each in a worker's process: closed loops by turns, and a look at their tokens."""

import argparse
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from experiments.bench_vllm import environment
from experiments.bench_worker import PEAK_PRODUCTS, PEAK_SIZE, Worker
from experiments.serving_load import Answer, Bounds, Wanted, figures
from experiments.serving_report import OURS, TRANSFORMERS, Rounds, check_gap, table, vllm_name

LONGEST = 384  # tokens of a sequence: 256 + 128
COMPARED = 8  # requests whose tokens transformers makes one by one


def subset(wanted: Sequence[Wanted], limit: int) -> Sequence[Wanted]:
    """Fewer requests where fewer run at once, so that each case takes a like time."""
    return wanted[: max(COMPARED, 4 * limit)]


def _workers(args: argparse.Namespace) -> dict[str, Worker]:
    asked: list[tuple[str, str, str, dict[str, str]]] = [
        (OURS, "experiments.bench_ours", sys.executable, {"JAX_PLATFORMS": "cpu"}),
        (TRANSFORMERS, "experiments.bench_torch", args.peer_python, {"OMP_WAIT_POLICY": "PASSIVE"}),
    ]
    for threads in args.vllm_threads if args.vllm_python else ():
        asked.append((vllm_name(threads), "experiments.bench_vllm", args.vllm_python, environment(threads)))
    workers = {}
    for name, module, python, changes in asked:
        worker = Worker(module, python, changes)
        print(f"{name}: {worker.missing or ', '.join(f'{k} {v}' for k, v in worker.versions.items())}")
        if worker.missing is None:
            workers[name] = worker
        else:
            worker.close()
    print(flush=True)
    return workers


class Engines:
    """The workers, each with every case set up; what their last rounds answered lies in files."""

    def __init__(
        self,
        args: argparse.Namespace,
        folder: Path,
        checkpoint: Path,
        wanted: Sequence[Wanted],
        bounds: Bounds,
    ):
        self.args, self.folder, self.wanted, self.bounds = args, folder, wanted, bounds
        self.workers = _workers(args)
        self.common = {
            "checkpoint": str(checkpoint),
            "longest": LONGEST,
            "rows": max(args.limits),
            "threads": args.threads,
        }
        self.peaks = [name for name in (OURS, TRANSFORMERS) if name in self.workers]
        for name in self.peaks:
            self.workers[name].setup(
                "peak", kind="peak", size=PEAK_SIZE, products=PEAK_PRODUCTS, threads=args.threads
            )

    def case(self, name: str, limit: int, wanted: Sequence[Wanted], label: str = "loop") -> str:
        """Sets a case up, warm; returns its name."""
        case = f"{label}{limit}"
        kind = "static" if name == TRANSFORMERS else "engine"
        out = str(self._out(name, case))
        self.workers[name].setup(case, kind=kind, limit=limit, trace=wanted, out=out, **self.common)
        return case

    def answers(self, name: str, case: str) -> list[Answer]:
        return [Answer(*answer) for answer in json.loads(self._out(name, case).read_text())]

    def _out(self, name: str, case: str) -> Path:
        return self.folder / f"{name} {case}.json"

    def compare(self, limit: int) -> None:
        wanted = subset(self.wanted, limit)
        cases = {name: self.case(name, limit, wanted) for name in self.workers}
        rounds: Rounds = {name: [] for name in self.workers}
        peaks: dict[str, list[float]] = {name: [] for name in self.peaks}
        for _ in range(self.args.rounds):
            for name, seconds in peaks.items():
                seconds.append(self.workers[name].measure("peak").seconds)
            for name, worker in self.workers.items():
                measured = worker.measure(cases[name])
                answers = self.answers(name, cases[name])
                rounds[name].append(figures(answers, measured.seconds, measured.cpu, self.bounds))
        tokens = sum(w.max_tokens for w in wanted)
        peak = 2 * PEAK_SIZE**3 / min(map(statistics.median, peaks.values())) / 1e9
        title = f"engines, {limit} at a time: {len(wanted)} requests, {tokens:,} tokens; float32 matmul peak {peak:,.0f} GFLOP/s"
        print("\n".join(table(title, rounds)))
        self._check(cases, wanted)

    def _check(self, cases: Mapping[str, str], wanted: Sequence[Wanted]) -> None:
        """Prints how many answers are transformers' own; raises ValueError where one is worse."""
        if TRANSFORMERS not in self.workers:
            print("  tokens: not compared, transformers is missing\n", flush=True)
            return
        alone = self._alone()
        for name, case in cases.items():
            rows = [answer.tokens for answer in self.answers(name, case)]
            same = sum(row == other for row, other in zip(rows, alone, strict=False))
            print(
                f"  tokens of {name}: {same} of {len(alone)} answers are what transformers gives alone; "
                f"{check_gap(name, self.gap(self._out(name, case), wanted))}"
            )
        print(flush=True)

    def _alone(self) -> list[list[int]]:
        out, case = self._out(TRANSFORMERS, "alone1"), "alone1"
        if not out.exists():
            self.case(TRANSFORMERS, 1, self.wanted[:COMPARED], "alone")
            self.workers[TRANSFORMERS].measure(case)
        return [answer.tokens for answer in self.answers(TRANSFORMERS, case)]

    def gap(self, answers: Path, wanted: Sequence[Wanted]) -> float:
        """How far below transformers' best logit a token of the answers lies at most."""
        worker, out = self.workers[TRANSFORMERS], self.folder / "gaps.json"
        worker.setup("gaps", kind="gaps", trace=wanted, answers=str(answers), out=str(out), **self.common)
        worker.measure("gaps")
        return max(json.loads(out.read_text()))

    def close(self) -> None:
        for worker in self.workers.values():
            worker.close()
