"""Stages of a study: commands in folders of their own, each of which goes on from what its folder holds."""

import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags

from experiments import command_line

flags.disclaim_key_flags()  # those of `settings` are the study's own, whose --help shows them


class Settings(NamedTuple):
    """Flags of every study, in `values`: other commands have flags of these names."""

    values: flags.FlagValues
    base: flags.FlagHolder
    out: flags.FlagHolder
    seeds: flags.FlagHolder
    task: flags.FlagHolder
    questions: flags.FlagHolder
    learning_rate: flags.FlagHolder


def settings(out: str, seeds: int) -> Settings:
    """With the defaults of a study: its folder, and how often it is done."""
    own: Any = flags.FlagValues()
    here: dict[str, Any] = {"flag_values": own}
    return Settings(
        own,
        flags.DEFINE_string("base", "runs/tiny", "Folder of the run that all start from.", **here),
        flags.DEFINE_string("out", out, "Folder of the study.", **here),
        flags.DEFINE_integer("seeds", seeds, "How often all is done.", **here),
        flags.DEFINE_string(
            "task", "tasks:sort_digits/4", "Which questions (deepseek_jax/posttraining/tasks.py).", **here
        ),
        flags.DEFINE_integer("count", 1000, "Training questions; a tenth as many are held out.", **here),
        flags.DEFINE_float("learning_rate", 1e-3, "Of all fine-tuning.", **here),
    )


def run_command(name: str, config: str, **settings: Any) -> None:
    """Runs a command of this project to its end: `section__key=value` is --config.section.key=value.

    Raises ValueError, with the end of what it said, if it fails.
    """
    arguments = [f"--config.{key.replace('__', '.')}={value}" for key, value in settings.items()]
    command = [sys.executable, "-m", f"experiments.{name}", f"--config=configs/{config}.py", *arguments]
    print("$ " + " ".join(command[1:]), file=sys.stderr, flush=True)
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        raise ValueError(f"{name} ended with {done.returncode}: {command_line.one_line(done.stdout[-500:])}")


def fine_tune(
    source: str, folder: Path, steps: int, base: str | Path, seed: int, learning_rate: float
) -> Path:
    """Supervised fine-tuning of `base` on a source of rows, as "FILE=1"; returns the folder of the run."""
    run_command(
        "sft",
        "tiny_sft",
        sft__sources=source,
        sft__seed=seed,
        data__cache_dir=folder.parent / "cache",
        train__seed=seed,
        train__init_from=base,
        train__steps=steps,
        train__eval_every=steps,
        train__checkpoint_every=50,
        train__keep=1,
        train__sample_tokens=0,
        train__out_dir=folder,
        optimizer__peak_lr=learning_rate,
    )
    return folder
