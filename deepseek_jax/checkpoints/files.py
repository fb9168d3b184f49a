"""What lies in the directory of a run's checkpoints; whatever is wrong becomes a `CheckpointError`.

The layout is that of `checkpoint.py`, which writes it.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from deepseek_jax.checkpoints import inventory
from deepseek_jax.checkpoints.changes import differing
from deepseek_jax.checks import listed, path_of, shown
from deepseek_jax.json_files import read_object
from deepseek_jax.parallel.processes.together import lowest

FORMAT = 2  # raise when the layout or the names in `TrainState` change
# Formats that can be read, with the arrays of the state that they have besides. 1: no digests, a key never used.
READABLE: Mapping[Any, frozenset[str]] = {1: frozenset({"rng"}), FORMAT: frozenset()}
META_KEYS = ("config", "data", "tokens")
TMP = ".orbax-checkpoint-tmp*"
ITEMS = ("state", "ema", "meta")
MAX_NAMED = 5  # differing arrays or settings listed in an error


class CheckpointError(ValueError):
    """A checkpoint that cannot be used. `older_step`: the one before it, or None."""

    def __init__(self, message: str, older_step: int | None = None):
        super().__init__(message)
        self.older_step = older_step


class MisfitError(CheckpointError):
    """A whole checkpoint, but of another model or mesh, or without what is asked for: so are those before it."""


# --- which step -------------------------------------------------------------------------------------------


def steps_in(directory: Path) -> list[int]:
    if not directory.is_dir():
        return []
    return sorted(int(p.name) for p in directory.iterdir() if p.name.isdecimal() and p.is_dir())


def choose(directory: Path, steps: list[int], step: int | None) -> int:
    if not steps:
        what = "holds no checkpoint (no folder named by a step)" if directory.exists() else "does not exist"
        raise CheckpointError(f"checkpoint directory {directory} {what}")
    if step is not None and step not in steps:
        raise CheckpointError(f"{directory} has no checkpoint of step {step}; it has {steps}")
    return max(steps) if step is None else step


def run_folder(path: str) -> str:
    """The folder of the run that `path`, by its name, is a checkpoint of, or holds the checkpoints of; else `path`."""
    above = Path(path).parent if Path(path).name.isdecimal() else Path(path)
    return str(above.parent) if above.name == "checkpoints" else path


def locate(path: str | Path, step: int | None = None) -> tuple[Path, Path]:
    """(folder of one step, folder of the run) for a run's folder, its checkpoints, or the folder of a step.

    step: which; None for the newest. Raises CheckpointError if there is none.
    """
    path = path_of(path, "path").absolute()
    if (path / "state").is_dir():
        if step is not None and path.name != str(step):
            raise CheckpointError(
                f"{path} is one checkpoint, and step={step} asks for another: name the run's folder"
            )
        return path, path.parent.parent
    directory = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    if not (steps := steps_in(directory)):
        what = "holds neither config.json nor checkpoints by step" if path.exists() else "does not exist"
        raise CheckpointError(f"{path} {what}")
    return directory / str(choose(directory, steps, step)), directory.parent


def offering_older(step: int, steps: list[int], read: Callable[[int], Any]) -> Any:
    """`read(step)`; where a step is damaged, the error also names the one before. That one is not looked into."""
    try:
        return read(step)
    except MisfitError:
        raise
    except CheckpointError as error:
        older = max((s for s in steps if s < step), default=None)
        offer = (
            "No older checkpoint is there" if older is None else f"Before it came step {older}: step={older}"
        )
        raise CheckpointError(f"{error}. {offer}", older) from error


def guarded(path: Path, read: Callable[[], Any]) -> Any:
    """`read()`, with whatever the storage libraries raise turned into one kind of error."""
    try:
        return read()
    except CheckpointError:
        raise
    except Exception as error:  # orbax, tensorstore and JSON each have errors of their own
        raise CheckpointError(f"checkpoint {path} is damaged: {first_line(error)}") from error


def first_line(error: Exception) -> str:
    """Kind and message, without the middle of a long one: tensorstore names the path first and the cause last."""
    line = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {line if len(line) <= 300 else f'{line[:120]} ... {line[-160:]}'}"


# --- one checkpoint ----------------------------------------------------------------------------------------


def verify(path: Path, items: Sequence[str] = ITEMS, together: bool = False) -> None:
    """Raises CheckpointError if files of the checkpoint's `items` are not as they were written.

    together: all processes call it, and each reads its share of the files.
    """
    missing = [item for item in ITEMS if not (path / item).is_dir()]
    if missing:
        raise CheckpointError(f"{path} is not a whole checkpoint of this project: it lacks {missing}")
    listed = guarded(path, lambda: inventory.read(path))
    files = {name: file for name, file in listed.items() if name.split("/")[0] in items}
    if any(file.sha256 is None for file in files.values()) and read_meta(path)["format"] != 1:
        raise CheckpointError(f"checkpoint {path} is damaged: its list of files has no digests")
    share = (jax.process_index(), jax.process_count()) if together else (0, 1)
    damaged = guarded(path, lambda: inventory.first_damaged(path, files, *share))
    damaged = lowest(damaged) if together else damaged
    if damaged < len(files):
        raise CheckpointError(
            f"checkpoint {path} is damaged: {inventory.describe_damage(path, files, damaged)}"
        )


def read_meta(path: Path) -> dict[str, Any]:
    """The metadata of the checkpoint at `path`, whose every value that this project relies on is what it can be."""
    meta = guarded(path, lambda: read_object(path / "meta" / "metadata"))
    if any(key not in meta for key in META_KEYS):
        raise CheckpointError(f"{path} is not a checkpoint of this project: its metadata lacks {META_KEYS}")
    if type(meta.get("format")) is not int or meta["format"] not in READABLE:
        raise CheckpointError(
            f"{path} has format {shown(meta.get('format'))}; this version reads {sorted(READABLE)}"
        )
    wrong = wrong_values(meta)
    if wrong is None and str(meta.get("step")) != path.name:
        wrong = f"step={shown(meta.get('step'))} in a folder named {path.name}"
    if wrong is not None:
        raise CheckpointError(f"checkpoint {path} is damaged: its metadata has {wrong}")
    return meta


def wrong_values(meta: Mapping[str, Any]) -> str | None:
    """What cannot be in metadata, or None. Types and ranges; what config and data mean is checked where they are used."""
    for path in (("config",), ("data",), ("config", "model"), ("huggingface",), ("huggingface", "config")):
        value: Any = meta
        for key in path:
            value = value.get(key, {})
        if not isinstance(value, Mapping):
            return f"{'.'.join(path)}={shown(value)}, which should be a dict"
    if type(meta["tokens"]) is not int or meta["tokens"] < 0:
        return f"tokens={shown(meta['tokens'])}, which should be an integer >= 0"
    loss = meta.get("validation_loss")
    if loss is not None and (type(loss) not in (int, float) or not math.isfinite(loss)):
        return f"validation_loss={shown(loss)}, which should be a finite number"
    return None


def check_model(path: Path, saved_config: Mapping[str, Any], model: Mapping[str, Any]) -> None:
    if other := differing(saved_config.get("model", {}), model, "model."):
        raise MisfitError(f"checkpoint {path} belongs to another model: {listed(other, MAX_NAMED)}")
