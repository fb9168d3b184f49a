"""Rows of generated tasks as files, for whoever reads files: "tasks:addition/2" becomes a path."""

import contextlib
import dataclasses
import hashlib
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from deepseek_jax.data.held_out import is_held_out
from deepseek_jax.data.row_fields import question_of
from deepseek_jax.data.sources import weighted
from deepseek_jax.posttraining.tasks import SCHEME, Row, parsed, rows


def is_task(source: str) -> bool:
    return source.startswith(f"{SCHEME}:")


def check_tasks(sources: Sequence[str], validation: str | None, name: str) -> None:
    """Raises ValueError for generated tasks that there are none of, before anything is read. name: of the sources."""
    named = [source for source, _ in weighted(sources, name)] + ([validation] if validation else [])
    for source in filter(is_task, named):
        parsed(source)


def task_file(sources: Sequence[str], folder: Path, held_out: bool = False, seed: int = 0) -> Path:
    """A file of JSON lines in `folder` with the rows of sources of tasks, one source after the other, as `_written`. For the other
    arguments and errors see `tasks.rows`."""
    return _written([row for source in sources for row in rows(source, held_out, seed)], folder)


def _written(found: Sequence[Row], folder: Path) -> Path:
    """A file with these rows. Its name says what is in it: it is never changed, and the same for all processes."""
    text = "".join(f"{json.dumps(row)}\n" for row in found).encode()
    path = folder / f"tasks-{hashlib.sha256(text).hexdigest()[:16]}.jsonl"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, suffix=".part") as file:
            file.write(text)
            file.flush()
            os.chmod(file.name, 0o644)
            with contextlib.suppress(FileExistsError):
                os.link(file.name, path)  # no rename: of several processes, the first one's stays
    return path


C = TypeVar("C", bound=Any)


def in_files(cfg: C, folder: Path, name: str) -> C:
    """A config with "sources", "validation", "validation_fraction" and "seed", generated tasks as files in `folder`. Where all
    sources are tasks, their held-out questions are for validation, unless the config names others. Beside files, of which
    `validation_fraction` of the questions is held out, they stand in the tasks' files, for the same split to find. name: of the
    config's sources, for errors."""
    entries = weighted(cfg.sources, name)
    tasks = [source for source, _ in entries if is_task(source)]
    named = [cfg.validation] if cfg.validation is not None and is_task(cfg.validation) else []
    held = named or (tasks if cfg.validation is None and len(tasks) == len(entries) else [])

    def file(source: str) -> str:
        if not is_task(source):
            return source
        fraction = 0.0 if held or cfg.validation is not None else cfg.validation_fraction
        others = rows(source, True, cfg.seed) if fraction else []
        split = [row for row in others if is_held_out(question_of(row), fraction)]
        return str(_written([*rows(source, False, cfg.seed), *split], folder))

    return dataclasses.replace(
        cfg,
        sources=tuple(f"{file(source)}={weight}" for source, weight in entries),
        validation=str(task_file(held, folder, True, cfg.seed)) if held else cfg.validation,
    )
