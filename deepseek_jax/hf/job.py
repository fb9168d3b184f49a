"""`begin` and `finish` make a conversion that can be killed at any moment and called again with the same arguments.

The conversion writes to `<output>.partial`, which is renamed when it is complete. `conversion.json` in it names the
conversion: it is written first, and removed last, after the rename.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from deepseek_jax.checks import path_of, require
from deepseek_jax.data import text_files
from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.hf.write import require_free
from deepseek_jax.json_files import read_object

JOURNAL = "conversion.txt"  # which pieces of a partial output are finished
_JOB = "conversion.json"  # what it is a part of

# (bytes written so far, bytes in total)
Progress = Callable[[int, int], None]


class Counter:
    """Adds up bytes and reports them."""

    def __init__(self, total: int, progress: Progress | None):
        self._done, self._total, self._progress = 0, total, progress

    def __call__(self, nbytes: int) -> None:
        self._done += nbytes
        if self._progress is not None:
            self._progress(self._done, self._total)


def begin(source: Path, target: str | Path, options: str) -> tuple[Path | None, Path]:
    """Returns (partial output, output). The partial output may be that of a killed call; None: nothing is left to do."""
    target = path_of(target, "target").absolute()
    require(bool(target.name), f"{target} cannot be an output: name a folder that is not there yet")
    partial = target.with_name(target.name + ".partial")
    job = {"source": str(source), "options": options, "files": _stamps(source, (partial, target))}
    if _job_of(target) == job:  # cut off when only its traces were left to be removed
        _remove_traces(target)
        return None, target
    require_free(target)
    partial.mkdir(parents=True, exist_ok=True)
    found = _job_of(partial)
    if found is None and all(p.name == f"{_JOB}.partial" for p in partial.iterdir()):
        found = job
        (partial / f"{_JOB}.partial").write_text(json.dumps(job), encoding="utf-8")
        os.replace(partial / f"{_JOB}.partial", partial / _JOB)
    require(found == job, f"{partial} belongs to another conversion, or its source changed: remove it first")
    return partial, target


def _stamps(source: Path, outputs: tuple[Path, Path]) -> list[list[Any]]:
    """Name, size and time of each of the source's files; an output may lie among them."""
    files = sorted(p for p in source.rglob("*") if p.is_file() and not set(outputs) & {p, *p.parents})
    return [[str(p.relative_to(source)), p.stat().st_size, p.stat().st_mtime_ns] for p in files]


def _job_of(folder: Path) -> dict[str, Any] | None:
    return read_object(folder / _JOB) if (folder / _JOB).exists() else None


def finish(root: Path, partial: Path, target: Path, tokenizer: Tokenizer | None = None) -> None:
    """Adds the text files, those of `root` as they are or those of a run's tokenizer, and renames the output."""
    for left in partial.rglob("*.partial"):  # by an attempt that was killed here
        left.unlink()
    if tokenizer is None:
        text_files.write(partial, text_files.read(root))
    else:
        tokenizer.save(partial)
    if target.exists():
        target.rmdir()
    os.replace(partial, target)
    _remove_traces(target)


def _remove_traces(target: Path) -> None:
    (target / JOURNAL).unlink(missing_ok=True)
    (target / _JOB).unlink()
