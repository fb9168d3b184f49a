"""Two processes that share the prompts of a GRPO run make it as one process does:

    python -m experiments.train --config=tests/golden/config.py
    python -m tests.posttraining.grpo_processes --init_from=runs/golden

Both have two devices. What is sampled is the same, token by token; sums over devices are added in another order.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from deepseek_jax.training.metrics import METRICS_FILE, TIMINGS, read_records

# Of what is sampled, which is the same; the rest are sums of float32 in another order.
SAMPLED = ("reward", "answer_tokens", "cut_off", "silent_groups", "replaced", "pass_at_1", "pass_at_k")
REORDERED = 2e-4  # of a gradient's norm, after some updates


def run(folder: Path, processes: int, init_from: str, steps: int) -> list[dict]:
    """The records of a run by so many processes, with two devices in all."""
    arguments = [
        *("--config=tests/golden/grpo_config.py", f"--config.train.init_from={init_from}"),
        *(f"--config.train.out_dir={folder}", f"--config.data.cache_dir={folder}_cache"),
        *(f"--config.train.steps={steps}", "--config.mesh.data=2"),
    ]
    launch = (
        ["-m", "experiments.launch", f"--processes={processes}", "--", sys.executable]
        if processes > 1
        else []
    )
    devices = {"JAX_NUM_CPU_DEVICES": str(2 // processes), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, *launch, "-m", "experiments.grpo", *arguments]
    done = subprocess.run(command, env=os.environ | devices, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"{processes} process(es) ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return read_records(folder / METRICS_FILE)


def differences(one: list[dict], two: list[dict]) -> dict[str, float]:
    """The largest relative difference of each number that training records and evaluations have."""
    found: dict[str, float] = {}
    assert [(r["kind"], r["step"]) for r in one] == [(r["kind"], r["step"]) for r in two]
    for a, b in zip(one, two, strict=True):
        for name in a.keys() - TIMINGS - {"kind", "step", "expert_counts"}:
            if isinstance(a[name], int | float):
                apart = abs(a[name] - b[name]) / max(1e-3, abs(a[name]))
                found[name] = max(found.get(name, 0.0), float(np.nan_to_num(apart)))
    return found


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--init_from", default="runs/golden")
    parser.add_argument("--steps", type=int, default=8)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        one, two = (run(Path(folder) / str(n), n, args.init_from, args.steps) for n in (1, 2))
    found = differences(one, two)
    for name, apart in sorted(found.items()):
        print(f"{name:<24}{apart:.2e}")
    same = all(found[name] == 0 for name in SAMPLED if name in found)
    near = found["grad_norm"] < REORDERED
    print("two processes equal one" if same and near else "NOT EQUAL")
    return 0 if same and near else 1


if __name__ == "__main__":
    sys.exit(main())
