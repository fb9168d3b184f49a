"""Measures what each precision preset costs: GEMM errors, training curves, one picture.

    python -m experiments.fp8_study [--out=runs/fp8_study] [--seeds=3] [--config=configs/fp8_study.py] [--config.KEY=...]

(a) Errors of each preset's GEMM on synthetic data and on tensors captured from the trained model, and of a
    tensor core that accumulates 14 bits, with and without promotion to float32.
(b) Training curves of each preset against bf16, from each of --seeds starts: same data, same initial weights. How
    far the bf16 runs of different seeds lie apart is the noise floor. Runs that are finished in --out are not run
    again.
(c) Loss and gradient of each preset on the same trained weights, where there is no such noise.
(d) `fp8_study.png` and Markdown tables on standard output.
"""

import contextlib
import dataclasses
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from deepseek_jax.config import PRECISIONS, Config, to_dict
from experiments import command_line, config_flag
from experiments.study import fp8_report
from experiments.study.fp8_measure import Runs, result_file

_OUT = flags.DEFINE_string("out", "runs/fp8_study", "Folder of the runs and the picture.")
_SEEDS = flags.DEFINE_integer("seeds", 3, "Runs of each preset.", lower_bound=2)
_PRESET = flags.DEFINE_enum(
    "preset", None, list(PRECISIONS), "Only train the runs of this one (what the study starts itself)."
)


def _configs(cfg: Config, out: Path, seeds: int) -> Runs:
    """Returns the config of each seed, by preset."""

    def one(preset: str, seed: int) -> Config:
        folder = str(out / preset / f"seed{seed}")
        train = dataclasses.replace(cfg.train, seed=cfg.train.seed + seed, out_dir=folder)
        return dataclasses.replace(cfg, precision=preset, train=train)

    return {preset: [one(preset, seed) for seed in range(seeds)] for preset in PRECISIONS}


def _finished(cfg: Config) -> bool:
    return result_file(cfg).exists() and json.loads(result_file(cfg).read_text())["config"] == to_dict(cfg)


def _train(configs: Sequence[Config]) -> None:
    from deepseek_jax.training.loop import Trainer
    from experiments.devices import devices_of_run

    devices_of_run(configs[0])
    for cfg in configs:
        if _finished(cfg):
            continue
        with contextlib.closing(Trainer(cfg)) as trainer:
            trainer.resume()
            evaluation = trainer.run().evaluation
            assert evaluation is not None
            result = {"validation": evaluation.loss, "config": to_dict(cfg)}
            result_file(cfg).write_text(json.dumps(result, indent=1))


def _train_all(runs: Runs) -> None:
    """Trains each preset in a process of its own, which frees the memory of its compiled programs."""
    for preset, configs in runs.items():
        left = sum(not _finished(cfg) for cfg in configs)
        print(
            f"{preset}: {left} of {len(configs)} runs of {configs[0].train.steps} steps to be done",
            flush=True,
        )
        if left:
            command = [sys.executable, "-m", "experiments.fp8_study", *sys.argv[1:], f"--preset={preset}"]
            if status := subprocess.run(command).returncode:
                sys.exit(status)  # it said why


def main(argv: Sequence[str]) -> int:
    cfg, out = config_flag.parse(argv, default="configs/fp8_study.py"), Path(_OUT.value)
    runs = _configs(cfg, out, _SEEDS.value)
    if _PRESET.value is not None:
        _train(runs[_PRESET.value])
        return 0
    _train_all(runs)
    fp8_report.write(runs, out)
    return 0


if __name__ == "__main__":
    command_line.run(main)
