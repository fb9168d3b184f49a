"""Kills a context extension by SIGKILL at random moments, resumes it, and compares it with one left alone, bit for bit.

    python -m tests.posttraining.extension [--kills=6] [--seed=0]

Two phases and the control of the smallest model with every part, on a snapshot of this project's sources. The moments are drawn
from the whole life of the command, so that each phase is hit, starts of phases and checkpoints being written too. Compared are
every array of the last checkpoint of each phase, where its weights came from, and its metrics; at last, that the phases and the
comparison do not change where nothing is left to do.
"""

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from deepseek_jax.checkpoints.files import read_meta
from experiments.kill_test import Run, differences

CONFIG = """
from tests.golden.config import get_config as golden


def get_config():
    config = golden()
    config.model.max_position_embeddings = 160
    config.model.rope_scaling = {"factor": 5.0, "original_max_position_embeddings": 32}
    config.phases = {"seq_len": (64, 128), "batch_size": (4, 4), "steps": (12, 8), "lr": (1e-3, 5e-4)}
    config.recall = {"share": 0.25, "steps": 6}
    config.control = True
    config.needle = {"lengths": (32, 128), "samples": 2}
    config.train.update({"checkpoint_every": 3, "eval_every": 6, "ema_every": 2, "sample_tokens": 0})
    return config
"""
_LONGEST = 20.0  # seconds after which it is killed, at most
STAGES = ("recall", "phase_1", "phase_2", "control_1", "control_2")


class Extension:
    """The command with its output in `folder`; `before` has the weights."""

    def __init__(self, folder: Path, before: Path):
        self.folder, cache = folder, folder.parent / "cache"
        self.runs = {name: Run(folder / name, []) for name in STAGES}
        self.environment = Run(folder, []).environment
        self.command = [
            *(sys.executable, "-m", "experiments.extend", f"--config={before.parent / 'config.py'}"),
            *(f"--config.train.init_from={before}", f"--config.train.out_dir={folder}"),
            f"--config.data.cache_dir={cache / 'data'}",
        ]

    def start(self) -> subprocess.Popen:
        output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen(self.command, env=self.environment, **output)

    def finish(self) -> str:
        process = self.start()
        printed, _ = process.communicate()
        if process.returncode:
            raise ValueError(f"{self.folder}: status {process.returncode}\n{printed}")
        return printed

    def disturbed(self, seconds: float | None) -> str | None:
        """Runs, and kills it after so many seconds; says where it was then, or None if it had ended."""
        process = self.start()
        try:
            printed, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.communicate()
            return self.where()
        if process.returncode:
            raise ValueError(f"{self.folder}: status {process.returncode}\n{printed}")
        return None

    def where(self) -> str:
        begun = [name for name, run in self.runs.items() if run.folder.exists()]
        return f"{begun[-1]} step {self.runs[begun[-1]].step()}" if begun else "before the first stage"

    def kept(self) -> dict[str, object]:
        """Where each stage's weights came from, inside the folder; and what was found at the end."""
        metas = {
            name: read_meta(run.folder / "checkpoints" / str(run.checkpoint()))
            for name, run in self.runs.items()
        }
        found: dict[str, object] = {name: meta["provenance"] for name, meta in metas.items()}
        found["needle"] = json.loads((self.folder / "needle.json").read_text())
        return json.loads(json.dumps(found).replace(str(self.folder), "FOLDER"))


def compared(one: Extension, other: Extension) -> list[str]:
    """Names what is not equal."""
    found = [
        f"{name}: {', '.join(differing)}"
        for name in STAGES
        if (differing := differences(one.runs[name], other.runs[name]))
    ]
    return found + ([] if one.kept() == other.kept() else ["provenance or needle.json"])


def main() -> int:
    parser = argparse.ArgumentParser(description="Kill and resume a context extension.")
    parser.add_argument("--kills", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as name:
        base = Path(name)
        (base / "config.py").write_text(CONFIG)
        before = Run(base / "before", ["--config=tests/golden/config.py", "--config.train.steps=10"])
        before.finish()
        alone = Extension(base / "alone", before.folder)
        alone.finish()
        began = time.monotonic()
        again = alone.finish()
        print(f"left alone; nothing left to do takes {time.monotonic() - began:.0f} s:\n{again}", flush=True)
        kills, equal, number = 0, True, 0
        while kills < args.kills:
            number += 1
            killed = Extension(base / f"killed{number}", before.folder)
            while (
                where := killed.disturbed(rng.uniform(0, _LONGEST) if kills < args.kills else None)
            ) is not None:
                kills += 1
                print(f"kill {kills}: {where}", flush=True)
            differing = compared(killed, alone)
            equal &= not differing
            print(f"extension {number}: {', '.join(differing) or 'bitwise equal'}", flush=True)
        return not equal


if __name__ == "__main__":
    sys.exit(main())
