"""Extend a model's context by YaRN in phases: `python -m experiments.extend --config=configs/tiny_extend.py`.

Each phase is a run of its own in `train.out_dir` (`phase_1`, `phase_2`), with records, checkpoints and a picture, which
starts from the weights of the one before, the first from `train.init_from`. The same command goes on where it was cut off,
in whichever phase. At the end it prints the loss on windows of the length trained with before, beside that of the weights it
began with, and, with `needle.lengths`, which needles in how long haystacks the models find (`needle.png`).
"""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from deepseek_jax import now
from deepseek_jax.checks import require
from deepseek_jax.config import Config
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.parallel.processes.together import is_first
from deepseek_jax.posttraining.extend import SAID_ELSEWHERE, ExtendConfig, Stage, check_source, stages
from deepseek_jax.posttraining.extended import Comparison, Found
from deepseek_jax.posttraining.recall import write_recall
from deepseek_jax.training.start import Start
from experiments import command_line, config_flag, dry_run, train
from experiments.devices import devices_of_run

DEFAULT_CONFIG = "configs/tiny_extend.py"


def run(cfg: ExtendConfig, stopped_status: int = 0) -> int:
    """All phases, and what they gave; returns the process's exit status."""
    require(bool(cfg.train.init_from), "a context extension starts from weights: set train.init_from=DIR")
    runs = stages(cfg)
    begun = runs[0]
    check_source(Start(begun.cfg, make_mesh(begun.cfg.mesh)), cfg)
    write_recall(cfg, runs)
    for one in runs:
        if one.done():
            continue
        if is_first():
            print(f"\n=== {one.name}: sequences of {one.cfg.data.seq_len:,} tokens ===", flush=True)
        if status := train.run(one.cfg):
            return status
        if not one.done():  # it was told to stop
            return stopped_status
    _compare(cfg)
    return 0


def _compare(cfg: ExtendConfig) -> None:
    """Prints and draws what the phases gave."""
    from deepseek_jax.evaluation.needle_picture import draw

    found: dict[str, Found] = {}
    lines = []
    for name, one in Comparison(cfg, make_mesh(cfg.mesh)):
        found[name] = one
        lines.append(f"{name}: {_line(cfg, one, next(iter(found.values())))}")
        if is_first():
            print(lines[-1], flush=True)
    grids = {name: one.grid for name, one in found.items() if one.grid is not None}
    if grids and is_first():
        path = Path(cfg.train.out_dir) / "needle.png"
        with now.doing("drawing the picture"):
            draw(grids, path, lines)
        print(f"picture: {path}", flush=True)


def _line(cfg: ExtendConfig, one: Found, first: Found) -> str:
    change, short = one.short_loss / first.short_loss - 1, cfg.data.seq_len
    text = f"loss on windows of {short} tokens {one.short_loss:.4f} ({change:+.2%})"
    if one.grid is None:
        return text
    up_to, beyond = one.grid.mean_of(0, short), one.grid.mean_of(short + 1, max(one.grid.lengths))
    return f"{text}; needles: {up_to:.2f} up to there, {beyond:.2f} beyond"


def _devices(cfg: ExtendConfig, runs: Sequence[Stage]) -> Config:
    """A config whose devices divide the micro-batches of all runs."""
    sizes = [run.cfg.train.batch_size // run.cfg.train.grad_accumulation for run in runs]
    return dataclasses.replace(
        cfg, train=dataclasses.replace(cfg.train, batch_size=math.gcd(*sizes), grad_accumulation=1)
    )


def _dry_run(cfg: ExtendConfig, runs: Sequence[Stage]) -> str:
    """What each run would be. Those before it are not there yet: all are checked with the weights at hand, if there are any."""
    given = cfg.train.init_from if Path(cfg.train.init_from).exists() else ""

    def report(one: Stage) -> str:
        weights = dataclasses.replace(one.cfg.train, init_from=given)
        return f"--- {one.name}\n{dry_run.report(dataclasses.replace(one.cfg, train=weights))}"

    return "\n".join(map(report, runs))


def main(argv: Sequence[str]) -> int:
    values = flags.FlagValues()
    flags.DEFINE_bool(
        "dry_run", False, "Check the config, say what each run would be, and end.", flag_values=values
    )
    flags.DEFINE_integer("stopped_status", 0, "Exit status after SIGTERM or Ctrl-C.", flag_values=values)
    for key in config_flag.take(argv, ExtendConfig)[0].values:
        require(key not in SAID_ELSEWHERE, f"--config.{key}: that is said by {SAID_ELSEWHERE.get(key)}")
    cfg = config_flag.parse(argv, DEFAULT_CONFIG, values, ExtendConfig)
    runs = stages(cfg)
    if values.dry_run:
        devices_of_run(_devices(cfg, runs))
        print(_dry_run(cfg, runs))
        return 0
    return train.joined(_devices(cfg, runs), lambda: run(cfg, values.stopped_status))


if __name__ == "__main__":
    command_line.run(main)
