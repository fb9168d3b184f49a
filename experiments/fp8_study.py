"""What each precision preset costs: GEMM errors, training curves, one picture.

    python -m experiments.fp8_study [--out=runs/fp8_study] [--config=configs/fp8_study.py] [--config.train.steps=...]

(a) Errors of each preset's GEMM on synthetic data and on tensors captured from the trained model, and of a
    tensor core that accumulates 14 bits, with and without promotion to float32.
(b) Training curves of each preset against bf16: same data, same seed. A second bf16 run with another seed is the
    noise floor. Runs that are finished in --out are not run again.
(c) `fp8_study.png` and a Markdown table on standard output.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

from deepseek_jax.config import PRECISIONS, Config, from_config_dict, to_dict
from experiments import command_line, fp8_report
from experiments.fp8_report import OTHER_SEED

_CONFIG = config_flags.DEFINE_config_file("config", None, "The model and run of the study.")
_OUT = flags.DEFINE_string("out", "runs/fp8_study", "Folder of the runs and the picture.")
_RUN = flags.DEFINE_string(
    "run", None, "Only train this one of the study's runs (what the study starts itself)."
)

RUNS = (*PRECISIONS, OTHER_SEED)


def _run_config(config, name: str, out: Path) -> Config:
    config = config.copy_and_resolve_references()
    config.precision = "bf16" if name == OTHER_SEED else name
    config.train.seed += name == OTHER_SEED
    config.train.out_dir = str(out / name.replace(" ", "_").replace("(", "").replace(")", ""))
    return from_config_dict(config)


def _result(cfg: Config) -> Path:
    return Path(cfg.train.out_dir) / "result.json"


def _train(cfg: Config) -> None:
    from deepseek_jax.training.loop import Trainer
    from experiments.devices import one_device_per_core

    one_device_per_core(cfg.train.batch_size // cfg.train.grad_accumulation)
    trainer = Trainer(cfg)
    try:
        trainer.resume()
        evaluation = trainer.run().evaluation
        assert evaluation is not None
        result = {"validation": evaluation.loss, "config": to_dict(cfg)}
        _result(cfg).write_text(json.dumps(result, indent=1))
    finally:
        trainer.close()


def _train_all(configs: dict[str, Config]) -> None:
    """Each run in a process of its own: a compiled program's memory goes with it."""
    for name, cfg in configs.items():
        done = _result(cfg)
        if done.exists() and json.loads(done.read_text())["config"] == to_dict(cfg):
            print(f"{name}: already trained in {cfg.train.out_dir}", flush=True)
            continue
        print(f"{name}: training {cfg.train.steps} steps", flush=True)
        arguments = [a for a in sys.argv[1:] if not a.startswith("--run")]
        subprocess.run(
            [sys.executable, "-m", "experiments.fp8_study", *arguments, f"--run={name}"], check=True
        )


def main(argv: Sequence[str]) -> int:
    if len(argv) > 1:
        print(f"error: unexpected arguments {argv[1:]}; settings are --config.KEY=VALUE", file=sys.stderr)
        return 2
    logging.set_verbosity(logging.ERROR)
    try:
        configs = {name: _run_config(_CONFIG.value, name, Path(_OUT.value)) for name in RUNS}
        if _RUN.value is not None:
            if _RUN.value not in configs:
                raise ValueError(f"--run={_RUN.value!r} is not one of {', '.join(RUNS)}")
            _train(configs[_RUN.value])
            return 0
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    _train_all(configs)
    fp8_report.write(configs, Path(_OUT.value))
    return 0


if __name__ == "__main__":
    app.run(main, flags_parser=lambda argv: command_line.parse(argv, default="configs/fp8_study.py"))
