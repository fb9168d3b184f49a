"""Arrays out of a run's checkpoint: onto a mesh, into host memory, or the parameters alone, for generation."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from deepseek_jax.checkpoints.files import (
    FORMAT,
    ITEMS,
    MAX_NAMED,
    READABLE,
    MisfitError,
    choose,
    guarded,
    offering_older,
    read_meta,
    steps_in,
    verify,
)
from deepseek_jax.checks import listed, names_that_differ

PyTree = Any


def read_state(path: Path, abstract: PyTree, format: int = FORMAT) -> PyTree:
    """The tree at `path` in the structure and shardings of `abstract`, after comparing every shape and dtype."""
    _check_arrays(path, ocp.PyTreeCheckpointHandler().metadata(path).tree, abstract, READABLE[format])
    return read_onto(path, jax.tree.map(_with_sharding, abstract))


def read_onto(path: Path, target: PyTree) -> PyTree:
    """The arrays of `target` (`jax.ShapeDtypeStruct` with shardings) out of those at `path`, cast to its dtypes."""
    arguments = jax.tree.map(lambda x: ocp.ArrayRestoreArgs(sharding=x.sharding, dtype=x.dtype), target)
    return ocp.PyTreeCheckpointHandler().restore(
        path, args=ocp.args.PyTreeRestore(item=target, restore_args=arguments, partial_restore=True)
    )


def _check_arrays(path: Path, found: PyTree, expected: PyTree, besides: frozenset[str] = frozenset()) -> None:
    saved, wanted = _described(found), _described(expected)
    saved = {name: array for name, array in saved.items() if name not in besides}
    other = [
        f"{name} is {saved.get(name, 'absent')}, expected {wanted.get(name, 'absent')}"
        for name in names_that_differ(saved, wanted)
    ]
    if other:
        raise MisfitError(f"checkpoint {path.parent} holds other arrays: {listed(other, MAX_NAMED)}")


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


def array_shapes(path: Path, entry: str) -> dict[str, tuple[int, ...]]:
    """Path below the top-level `entry` -> shape, of the tree at `path`. Reads no array."""
    tree = guarded(path.parent, lambda: ocp.PyTreeCheckpointHandler().metadata(path).tree)
    return shapes_of(tree.get(entry, {}))


def shapes_of(tree: PyTree) -> dict[str, tuple[int, ...]]:
    """Path of every leaf -> shape."""
    return {_name(path): tuple(x.shape) for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def _described(tree: PyTree) -> dict[str, str]:
    """Path of every leaf -> "dtype[shape]"."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {_name(path): f"{np.dtype(x.dtype)}{list(x.shape)}" for path, x in leaves}


def _with_sharding(leaf: Any) -> jax.ShapeDtypeStruct:
    sharding = getattr(leaf, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


# --- parameters alone ----------------------------------------------------------------------------------------------


def _in_host_memory(item: Path) -> PyTree:
    return guarded(item.parent, lambda: read_tree(item, ("params",))["params"])


def load_params(
    directory: str | Path,
    step: int | None = None,
    ema: bool = False,
    read_params: Callable[[Path], PyTree] = _in_host_memory,
) -> tuple[dict[str, Any], PyTree, np.ndarray, dict[str, Any]]:
    """Parameters of a run for generation, without optimizer state; a run may go on writing meanwhile.

    Args:
        directory: the run's checkpoints.
        step: which; None for the newest.
        ema: the average of the parameters instead of the last ones.
        read_params: (`<step>/state` or `<step>/ema`, its files compared) -> params, by default in host memory.

    Returns:
        (config of the run as a dict, params, balance_bias float32 [layer, expert], metadata).

    Raises:
        CheckpointError (a ValueError): as `Checkpointer.restore`.
    """
    directory = Path(directory).absolute()
    steps = steps_in(directory)

    def read(step: int) -> tuple[dict[str, Any], PyTree, np.ndarray, dict[str, Any]]:
        path = directory / str(step)
        verify(path, ITEMS if ema else ("state", "meta"))
        meta = read_meta(path)
        if ema and not any((path / "ema").iterdir()):
            raise MisfitError(f"{path} was converted and has no averaged parameters: leave out ema (--ema)")
        bias = guarded(path, lambda: read_tree(path / "state", ("balance_bias",)))["balance_bias"]
        return meta["config"], read_params(path / ("ema" if ema else "state")), bias, meta

    return offering_older(choose(directory, steps, step), steps, read)
