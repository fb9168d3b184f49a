"""What lies in the directory of a run's checkpoints, and reading it; whatever is wrong becomes a `CheckpointError`.

The layout is that of `checkpoint.py`, which writes it.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

PyTree = Any

FORMAT = 1  # raise when the layout or the names in `TrainState` change
META_KEYS = ("config", "data", "tokens")
INVENTORY = "files.json"
TMP = ".orbax-checkpoint-tmp*"
_ITEMS = ("state", "ema", "meta")
_MAX_NAMED = 5  # differing arrays listed in an error


class CheckpointError(ValueError):
    """A checkpoint that cannot be used. `whole_step`: an older step that can, or None."""

    def __init__(self, message: str, whole_step: int | None = None):
        super().__init__(message)
        self.whole_step = whole_step


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


def offering_older(step: int, steps: list[int], read: Callable[[int], Any]) -> Any:
    """`read(step)`; where that fails, the error also names the newest older step that `read` can read."""
    try:
        return read(step)
    except CheckpointError as error:
        for older in sorted((s for s in steps if s < step), reverse=True):
            try:
                read(older)  # whole means: every byte of it was read
            except CheckpointError:
                continue
            raise CheckpointError(
                f"{error}. Step {older} is whole: restore with step={older}", older
            ) from error
        raise CheckpointError(f"{error}. No older checkpoint can be used instead") from error


def guarded(path: Path, read: Callable[[], Any]) -> Any:
    """`read()`, with whatever the storage libraries raise turned into one kind of error."""
    try:
        return read()
    except CheckpointError:
        raise
    except Exception as error:  # orbax, tensorstore and JSON each have errors of their own
        first_line = str(error).strip().splitlines()[0][:300] if str(error).strip() else ""
        raise CheckpointError(
            f"checkpoint {path} is damaged: {type(error).__name__}: {first_line}"
        ) from error


# --- reading ----------------------------------------------------------------------------------------------


def file_sizes(path: Path) -> dict[str, int]:
    files = (f for item in _ITEMS for f in (path / item).rglob("*") if f.is_file())
    return {str(f.relative_to(path)): f.stat().st_size for f in sorted(files)}


def read_meta(path: Path) -> dict[str, Any]:
    """The metadata of the checkpoint at `path`, once its files are as they were written."""
    missing = [item for item in _ITEMS if not (path / item).is_dir()]
    if missing:
        raise CheckpointError(f"{path} is not a whole checkpoint of this project: it lacks {missing}")
    found = file_sizes(path)
    for name, size in guarded(path, lambda: json.loads((path / INVENTORY).read_text())).items():
        if found.get(name) != size:
            raise CheckpointError(
                f"checkpoint {path} is damaged: {name} has {found.get(name, 0)} of {size} bytes"
            )
    meta = guarded(path, lambda: json.loads((path / "meta" / "metadata").read_text()))
    if not isinstance(meta, dict) or any(key not in meta for key in META_KEYS):
        raise CheckpointError(f"{path} is not a checkpoint of this project: its metadata lacks {META_KEYS}")
    if meta.get("format") != FORMAT:
        raise CheckpointError(f"{path} has format {meta.get('format')!r}; this version reads {FORMAT}")
    return meta


def read_state(path: Path, abstract: PyTree) -> PyTree:
    """The tree at `path` in the structure and shardings of `abstract`, after comparing every shape and dtype."""
    _check_arrays(path, ocp.PyTreeCheckpointHandler().metadata(path).tree, abstract)
    target = jax.tree.map(_with_sharding, abstract)
    return ocp.StandardCheckpointHandler().restore(path, args=ocp.args.StandardRestore(target))


def _check_arrays(path: Path, found: PyTree, expected: PyTree) -> None:
    saved, wanted = _described(found), _described(expected)
    differing = [
        f"{name} is {saved.get(name, 'absent')}, expected {wanted.get(name, 'absent')}"
        for name in sorted(saved.keys() | wanted.keys())
        if saved.get(name) != wanted.get(name)
    ]
    if differing:
        more = f" and {len(differing) - _MAX_NAMED} more" if len(differing) > _MAX_NAMED else ""
        raise CheckpointError(
            f"checkpoint {path.parent} holds other arrays: " + "; ".join(differing[:_MAX_NAMED]) + more
        )


def read_tree(path: Path, names: tuple[str, ...] | None = None, like: PyTree | None = None) -> PyTree:
    """The tree at `path`, or only the top-level entries `names` of it, as nested dicts.

    Leaves are NumPy arrays, or where `like` has a sharding, global arrays on it. With `like`, every shape and dtype is
    compared.
    """
    handler = ocp.PyTreeCheckpointHandler()
    tree = handler.metadata(path).tree
    if like is not None:
        _check_arrays(path, tree, like)
    tree = tree if names is None else {name: tree[name] for name in names}
    shardings = {} if like is None else _shardings(like)

    def argument(leaf_path: Any, _: Any) -> ocp.RestoreArgs:
        sharding = shardings.get(_name(leaf_path))
        if sharding is None:
            return ocp.RestoreArgs(restore_type=np.ndarray)
        return ocp.ArrayRestoreArgs(sharding=sharding)

    arguments = jax.tree_util.tree_map_with_path(argument, tree)
    return handler.restore(
        path,
        args=ocp.args.PyTreeRestore(item=tree, restore_args=arguments, partial_restore=names is not None),
    )


def _shardings(tree: PyTree) -> dict[str, Any]:
    """Path of every leaf -> its sharding or None."""
    return {_name(path): leaf.sharding for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def _described(tree: PyTree) -> dict[str, str]:
    """Path of every leaf -> "dtype[shape]"."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {_name(path): f"{np.dtype(x.dtype)}{list(x.shape)}" for path, x in leaves}


def _with_sharding(leaf: Any) -> jax.ShapeDtypeStruct:
    sharding = getattr(leaf, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def check_model(path: Path, saved_config: Mapping[str, Any], model: Mapping[str, Any]) -> None:
    saved, wanted = saved_config.get("model", {}), json.loads(json.dumps(dict(model)))
    differing = [
        f"model.{key} is {saved.get(key)!r} there, {wanted.get(key)!r} here"
        for key in sorted(saved.keys() | wanted.keys())
        if saved.get(key) != wanted.get(key)
    ]
    if differing:
        raise CheckpointError(f"checkpoint {path} belongs to another model: " + "; ".join(differing))
