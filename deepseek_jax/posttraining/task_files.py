"""Rows of generated tasks as files, for whoever reads files: "tasks:addition/2" becomes a path."""

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from deepseek_jax.posttraining.tasks import SCHEME, rows


def is_task(source: str) -> bool:
    return source.startswith(f"{SCHEME}:")


def task_file(sources: Sequence[str], folder: Path, held_out: bool = False, seed: int = 0) -> Path:
    """A file of JSON lines in `folder` with the rows of sources of tasks, one source after the other. Its name says what is in
    it: it is never changed, and the same for all processes. For the other arguments and errors see `tasks.rows`."""
    found = [row for source in sources for row in rows(source, held_out, seed)]
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
