"""Runs the golden config on given devices and returns its losses.

    python -m tests.golden.run             # compares
    python -m tests.golden.run --write     # writes tests/golden/losses.json anew

Write it anew only for a change that is meant to change the numbers, and say so in the commit.
"""

import argparse
import dataclasses
import io
import json
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from deepseek_jax.config import Config, from_config_dict
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.training.loop import Trainer
from deepseek_jax.training.metrics import METRICS_FILE, read_records
from tests.golden.config import HERE, get_config

LOSSES = HERE / "losses.json"
NAMES = ("loss", "mtp_loss", "grad_norm")


def golden_config(folder: Path, **train: Any) -> Config:
    """The golden config with its output and caches in `folder`."""
    cfg = from_config_dict(get_config())
    return dataclasses.replace(
        cfg,
        data=dataclasses.replace(cfg.data, cache_dir=str(folder / "cache")),
        train=dataclasses.replace(cfg.train, **{"out_dir": str(folder / "run")} | train),
    )


def trainer(cfg: Config, devices: Sequence[jax.Device] | None = None) -> Trainer:
    return Trainer(cfg, make_mesh(cfg.mesh, jax.devices()[:1] if devices is None else devices))


class StopAfter(threading.Event):
    """Set once it has been asked `steps` times; the loop asks before every step."""

    def __init__(self, steps: int):
        super().__init__()
        self._left = steps

    def is_set(self) -> bool:
        self._left -= 1
        return self._left < 0


def curves(out_dir: str | Path, names: Sequence[str] = NAMES) -> dict[str, list[float]]:
    """Per step: loss, MTP loss, norm of the gradient; and the validation losses."""
    records = read_records(Path(out_dir) / METRICS_FILE)
    steps = [record for record in records if record["kind"] == "train"]
    found = {name: [record[name] for record in steps] for name in names}
    return found | {"validation": [record["loss"] for record in records if record["kind"] == "eval"]}


def largest_difference(got: dict[str, list[float]], want: dict[str, list[float]]) -> dict[str, float]:
    """Relative, per curve."""
    assert {name: len(x) for name, x in got.items()} == {name: len(x) for name, x in want.items()}
    return {name: float(np.max(np.abs(np.divide(got[name], want[name]) - 1))) for name in want}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--write", action="store_true")
    write = parser.parse_args().write
    with tempfile.TemporaryDirectory() as folder:
        cfg = golden_config(Path(folder))
        run = trainer(cfg)
        run.run(progress_file=io.StringIO())
        run.close()
        found = curves(cfg.train.out_dir)
    if write:
        LOSSES.write_text(json.dumps(found, indent=1) + "\n")
        print(f"wrote {LOSSES}, jax {jax.__version__}")
    else:
        print(f"jax {jax.__version__}: {largest_difference(found, json.loads(LOSSES.read_text()))}")


if __name__ == "__main__":
    main()
