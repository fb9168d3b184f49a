"""Rows of generated tasks as files, for whoever reads files: "tasks:addition/2" becomes a path."""

import hashlib
import json
import os
import tempfile
from pathlib import Path

from deepseek_jax.posttraining.tasks import SCHEME, rows


def is_task(source: str) -> bool:
    return source.startswith(f"{SCHEME}:")


def task_file(source: str, folder: Path, held_out: bool = False, seed: int = 0) -> Path:
    """A file of JSON lines in `folder` with the rows of a source of tasks. Its name says what is in it: it is never changed,
    and the same for all processes. For the arguments and errors see `tasks.rows`."""
    text = "".join(f"{json.dumps(row)}\n" for row in rows(source, held_out, seed)).encode()
    path = folder / f"tasks-{hashlib.sha256(text).hexdigest()[:16]}.jsonl"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, suffix=".part") as file:
            file.write(text)
            file.flush()
            os.chmod(file.name, 0o644)
            try:
                os.link(file.name, path)  # not a rename: of several processes, the first one's stays
            except FileExistsError:
                pass
    return path
