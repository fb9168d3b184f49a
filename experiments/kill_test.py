"""Kills a training run by SIGKILL at random moments, resumes it each time, and compares it with an undisturbed one.

    python -m experiments.kill_test --config=tests/golden/config.py --kills=20
    python -m experiments.kill_test --command=sft --config=configs/tiny_sft.py --steps=60     # after make train

Half of the moments are drawn from the whole life of the process, start-up included, the other half from its
training, so that steps, evaluations and checkpoints being written are all hit. A run that reaches its end is
compared (every array of the last checkpoint and the metrics, bit for bit) and a new one is begun, until the kills
are used up; the last run is finished. Exit status 0 if all runs were equal to the undisturbed one.
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp

from deepseek_jax.checkpoints.files import steps_in
from deepseek_jax.training.metrics import METRICS_FILE, TIMINGS, read_records
from experiments import command_line


class Timing(NamedTuple):
    """The undisturbed run takes `start_up` seconds to its first step and `training` from there to its last record."""

    start_up: float
    training: float


class Run:
    """A training run in a folder, by `experiments.train` in a process of its own.

    Args:
        folder: holds its output; a compilation and a data cache beside it are shared between runs.
        arguments: those of `experiments.train`, config first.
        command: another one of `experiments` that trains.
    """

    def __init__(self, folder: Path, arguments: Sequence[str], command: str = "train"):
        self.folder = folder
        cache = folder.parent / "cache"
        self.command = [
            *(sys.executable, "-m", f"experiments.{command}", *arguments),
            *(f"--config.train.out_dir={folder}", f"--config.data.cache_dir={cache / 'data'}"),
        ]
        self.environment = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(cache / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }

    def start(self) -> subprocess.Popen:
        return subprocess.Popen(
            self.command, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def finish(self, process: subprocess.Popen | None = None) -> str:
        """Runs to the end; returns what was printed. Raises ValueError, with all of it, if the run fails."""
        process = process or self.start()
        printed, _ = process.communicate()
        if process.returncode:
            raise ValueError(f"the run in {self.folder} ended with {process.returncode}:\n{printed}")
        return printed

    def step(self) -> int:
        """Returns how many steps are recorded."""
        path = self.folder / METRICS_FILE
        records = read_records(path) if path.exists() else []
        return records[-1]["step"] if records else 0

    def checkpoints(self) -> list[int]:
        """Returns the steps of the complete checkpoints."""
        return steps_in(self.folder / "checkpoints")

    def checkpoint(self) -> int:
        """Returns the step of the newest complete checkpoint, 0 if there is none."""
        return max(self.checkpoints(), default=0)

    def wait_for_step(self, process: subprocess.Popen) -> None:
        """Returns when this process has recorded a step, or has ended."""
        path = self.folder / METRICS_FILE
        before = path.stat().st_mtime_ns if path.exists() else 0
        # Opening the file for a resumed run rewrites it at once; a step is what makes it grow after that.
        while process.poll() is None and (not path.exists() or path.stat().st_mtime_ns == before):
            time.sleep(0.005)
        size = path.stat().st_size if path.exists() else 0
        while process.poll() is None and path.stat().st_size <= size:
            time.sleep(0.005)

    def arrays(self) -> dict[str, np.ndarray]:
        """Reads every array of the newest checkpoint by its path."""
        folder = self.folder / "checkpoints" / str(self.checkpoint())
        found, handler = {}, ocp.PyTreeCheckpointHandler()
        for item in ("state", "ema"):
            as_numpy = jax.tree.map(
                lambda _: ocp.RestoreArgs(restore_type=np.ndarray), handler.metadata(folder / item).tree
            )
            tree = handler.restore(folder / item, args=ocp.args.PyTreeRestore(restore_args=as_numpy))
            for path, x in jax.tree_util.tree_leaves_with_path(tree):
                found[item + jax.tree_util.keystr(path)] = np.asarray(x)
        return found

    def records(self) -> list[dict]:
        """Reads the metrics without those measured in seconds."""
        return [
            {name: value for name, value in record.items() if name not in TIMINGS}
            for record in read_records(self.folder / METRICS_FILE)
        ]


def undisturbed(run: Run) -> Timing:
    """Runs from beginning to end, twice: the first time fills the caches, the second is timed."""
    run.finish()
    shutil.rmtree(run.folder)
    began = time.monotonic()
    process = run.start()
    run.wait_for_step(process)
    first = time.monotonic()
    run.finish(process)
    return Timing(first - began, time.monotonic() - first)


def kill_at_random(run: Run, timing: Timing, rng: random.Random, while_training: bool) -> str | None:
    """Starts the run and kills it at a random moment; describes that moment, or returns None if the run had ended."""
    process = run.start()
    began = time.monotonic()
    if while_training:
        run.wait_for_step(process)
    span = timing.training if while_training else timing.start_up + timing.training
    try:
        process.wait(rng.uniform(0, span))
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.communicate()
        writing = len(list((run.folder / "checkpoints").glob("*.orbax-checkpoint-tmp*")))
        return (
            f"{time.monotonic() - began:6.2f} s after its start, at step {run.step()}, "
            f"last checkpoint {run.checkpoint()}{', while a checkpoint was written' if writing else ''}"
        )
    run.finish(process)
    return None


def differences(run: Run, want: Run) -> list[str]:
    """Names what is not bitwise equal in two finished runs."""
    got, wanted = ({name: (x.dtype, x.tobytes()) for name, x in one.arrays().items()} for one in (run, want))
    found = [name for name in sorted(got.keys() | wanted.keys()) if got.get(name) != wanted.get(name)]
    return found + ([] if run.records() == want.records() else [METRICS_FILE])


def kill_test(folder: Path, arguments: Sequence[str], kills: int, seed: int, command: str = "train") -> bool:
    """Runs the whole test; prints the moments and the verdict; returns whether all runs were equal."""
    rng = random.Random(seed)
    reference = Run(folder / "undisturbed", arguments, command)
    timing = undisturbed(reference)
    print(
        f"undisturbed: {reference.step()} steps, start-up {timing.start_up:.1f} s, then {timing.training:.1f} s"
    )
    equal, done, runs = True, 0, 0
    while done < kills:
        runs += 1
        run, complete = Run(folder / f"killed{runs}", arguments, command), False
        while done < kills and not complete:
            moment = kill_at_random(run, timing, rng, while_training=done % 2 == 1)
            if moment is None:
                complete = True
            else:
                done += 1
                print(f"kill {done:2}: {moment}", flush=True)
        if not complete:
            run.finish()
        differing = differences(run, reference)
        equal &= not differing
        verdict = f"differs in {', '.join(differing)}" if differing else "bitwise equal"
        print(f"run {runs} ended at step {run.step()}: {len(run.arrays())} arrays, {verdict}", flush=True)
    print(f"{done} kills, {runs} runs: {'all equal to the undisturbed run' if equal else 'NOT EQUAL'}")
    return equal


def main(argv: Sequence[str]) -> int:
    parser = command_line.Parser(description="Kill and resume a training run; compare it bitwise.")
    parser.add_argument(
        "--command", choices=("train", "sft", "grpo"), default="train", help="which of experiments"
    )
    parser.add_argument("--config", default="tests/golden/config.py", help="of the command")
    parser.add_argument("--init_from", help="its weights to start from, if not those of the config")
    parser.add_argument("--steps", type=int, default=300, help="length of the run")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args = parser.parse_args(argv)
    if args.kills < 1 or args.steps < 1:
        parser.error(f"--kills={args.kills} and --steps={args.steps} must be at least 1")
    arguments = [
        f"--config={args.config}",
        f"--config.train.steps={args.steps}",
        f"--config.train.checkpoint_every={max(1, args.steps // 15)}",
    ]
    arguments += [f"--config.train.init_from={args.init_from}"] if args.init_from else []
    with tempfile.TemporaryDirectory() as folder:
        return 0 if kill_test(Path(folder), arguments, args.kills, args.seed, args.command) else 1


if __name__ == "__main__":
    command_line.run(main)
