"""`open_entry` opens a folder of the cache, which one process makes once from a list of files.

An entry appears whole or not at all. It is valid as long as its files have the same names, sizes and times; if those
differ, their content decides. A process that needs an entry while another makes it waits.
"""

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from deepseek_jax import now
from deepseek_jax.data.files import SourceFile
from deepseek_jax.data.text_files import write_file

T = TypeVar("T")
Meta = dict[str, Any]
Files = list[SourceFile]


def open_entry(
    folder: Path,
    files: Files,
    *,
    what: str,
    files_now: Callable[[], Files],
    load: Callable[[Path, Meta], T | None],
    renewed: Callable[[Files, Meta], Meta | None],
    make: Callable[[Path], Meta],
) -> T:
    """Returns the result of `load` for the entry `folder`, after `make` if the entry is absent, damaged or outdated.

    Args:
        files: what the entry is made of.
        files_now: lists them anew, to see whether one of them changed while the entry was made.
        what: what making it means, for whoever shows it: "tokenizing data/*.jsonl".
        load: from the folder and its meta; None where it is damaged.
        renewed: of an entry of these other files, what its meta is with `files`; None: it is outdated.
        make: fills an empty folder; what it returns is in the meta, which takes JSON.

    Raises:
        ValueError: a file changed meanwhile, or the cache lies where files cannot be locked.
        OSError: the entry does not read back.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    found = _open(folder, load)
    if found is not None and found[1] == files:
        return found[0]
    with _alone(folder, what):
        found = _open(folder, load)
        meta = renewed(*found[1:]) if found and found[1] != files else None
        if meta is not None:
            _write_meta(folder, files, meta)
        elif found is None or found[1] != files:
            with now.doing(what):
                _make(folder, files, files_now, make)
        found = _open(folder, load)
    if found is None:
        raise OSError(f"{folder} was written but does not read back: is the disk full or failing?")
    return found[0]


def _open(folder: Path, load: Callable[[Path, Meta], T | None]) -> tuple[T, Files, Meta] | None:
    try:
        stored = json.loads((folder / "meta.json").read_text())
        files, meta = [SourceFile(*file) for file in stored["files"]], stored["meta"]
        loaded = load(folder, meta)
    except (OSError, ValueError, KeyError, TypeError, EOFError, RecursionError):
        return None
    return None if loaded is None else (loaded, files, meta)


def _make(folder: Path, files: Files, files_now: Callable[[], Files], make: Callable[[Path], Meta]) -> None:
    building = folder.with_name(folder.name + ".building")
    shutil.rmtree(building, ignore_errors=True)  # a killed process left it
    building.mkdir()
    try:
        meta = make(building)
        if changed := set(files) - set(files_now()):
            raise ValueError(f"{min(changed).path} changed while the corpus was being read: start again")
        _write_meta(building, files, meta)
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(building, folder)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _write_meta(folder: Path, files: Files, meta: Meta) -> None:
    write_file(folder / "meta.json", json.dumps({"files": files, "meta": meta}).encode())


@contextlib.contextmanager
def _alone(folder: Path, what: str) -> Iterator[None]:
    """Holds the entry's lock, which ends with the process at the latest; says so if it must wait."""
    with folder.with_name(folder.name + ".lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with now.doing(f"waiting for another process that is {what}"):
                fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            raise ValueError(
                f"cache_dir: files in {folder.parent} cannot be locked ({error.strerror}); give a folder on a disk "
                "of this machine"
            ) from error
        yield
