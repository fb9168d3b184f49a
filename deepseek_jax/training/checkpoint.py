"""Checkpoints: written asynchronously by orbax, whole or absent, restored onto any sharding.

Layout: `<directory>/<step>/{state,ema,meta}`: the TrainState, the host-side average, and JSON with the config,
the state of the data stream, the token count and `format`. A step is written under a temporary name and renamed
when complete, so a kill at any moment leaves the previous steps and at most one temporary folder, which the next
`Checkpointer` on that directory removes. `<step>/files.json` lists every file with its size, so truncation is seen
before anything is read. No pickle anywhere.

Of several processes, each writes and reads its own shards, in a directory that all of them share; what is in it is
decided by the first, since file systems do not show the same thing to all hosts at the same time.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp

from deepseek_jax.parallel.together import from_first, is_first

PyTree = Any

FORMAT = 1  # raise when the layout or the names in `TrainState` change
_ITEMS = ("state", "ema", "meta")
_META_KEYS = ("config", "data", "tokens")
_INVENTORY = "files.json"
_TMP = ".orbax-checkpoint-tmp*"
_SLICE_BYTES = 1 << 22
_MAX_NAMED = 5  # differing arrays listed in an error


class CheckpointError(ValueError):
    """A checkpoint that cannot be used. `whole_step`: an older step that can, or None."""

    def __init__(self, message: str, whole_step: int | None = None):
        super().__init__(message)
        self.whole_step = whole_step


class Restored(NamedTuple):
    """What `Checkpointer.restore` gives back; `meta` as it was saved, `ema` in host memory or as asked for."""

    step: int
    state: PyTree
    ema: PyTree
    meta: dict[str, Any]


class Checkpointer:
    """The checkpoints of one run.

    Args:
        directory: created if missing. All processes of a run must see the same one.
        keep: how many of the newest checkpoints stay.
    """

    def __init__(self, directory: str | Path, keep: int = 3):
        self.directory = Path(directory).absolute()
        if is_first():
            for leftover in self.directory.glob(f"*{_TMP}"):  # of a killed run, as large as a checkpoint
                shutil.rmtree(leftover)
        self._saving = -1
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            enable_async_checkpointing=True,
            async_options=ocp.options.AsyncOptions(post_finalization_callback=self._write_inventory),
        )
        handlers = {"state": _array_handler(), "ema": _array_handler(), "meta": ocp.JsonCheckpointHandler()}
        self._manager = ocp.CheckpointManager(self.directory, options=options, item_handlers=handlers)

    def save(self, step: int, state: PyTree, ema: PyTree, meta: Mapping[str, Any]) -> bool:
        """Starts writing a checkpoint and returns once the arrays are copied, so `state` may be donated.

        Args:
            step: steps taken so far.
            state, ema: trees of arrays. NumPy arrays must not change until `wait`.
            meta: JSON-serialisable; has at least "config", "data" (stream state) and "tokens" (int).

        Returns:
            False if this step is there already (nothing is written).

        Raises:
            ValueError: keys missing in `meta`, or newer steps in the directory, which `restore(step=...)` of
                an older one would have removed. An earlier write that failed raises here or in `wait`.
        """
        missing = [key for key in _META_KEYS if key not in meta]
        if missing:
            raise ValueError(f"checkpoint metadata lacks {missing}; it needs {list(_META_KEYS)}")
        self.wait()
        latest = self.latest()
        if latest == step:
            return False
        if latest is not None and step < latest:
            raise ValueError(
                f"{self.directory} holds step {latest}, newer than step {step} to be saved: resume from it, "
                f"restore an older step explicitly, or use another directory"
            )
        self._saving = step
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.PyTreeSave(state),
                ema=ocp.args.PyTreeSave(ema),
                meta=ocp.args.JsonSave({**meta, "format": FORMAT, "step": step}),
            ),
        )
        return True

    def restore(
        self,
        abstract: PyTree,
        step: int | None = None,
        model: Mapping[str, Any] | None = None,
        ema: PyTree | None = None,
    ) -> Restored:
        """Reads one checkpoint whole.

        Args:
            abstract: tree like the saved state with shape, dtype and sharding (`jax.ShapeDtypeStruct`, arrays);
                the sharding need not be the saved one. Leaves without sharding go to the default device.
            step: which; None for the newest. An older step than the newest becomes the newest: the steps after
                it are removed, because the run goes another way from here.
            model: the run's model config as a dict, compared with the saved one.
            ema: tree like the saved average, of `jax.ShapeDtypeStruct`: leaves with a sharding are read onto it,
                the others into NumPy arrays. None: all into NumPy arrays.

        Raises:
            CheckpointError (a ValueError): no checkpoint, truncated, foreign, or of another model; names the
                path, the cause and, where there is one, an older step that can be read.
        """
        steps = self.steps()
        newest = self.latest()
        step = newest if step is None else step
        if step == newest and step is not None and step not in steps:
            raise CheckpointError(
                f"process {jax.process_index()} does not see step {step} in {self.directory}, which process 0 does: "
                f"put train.out_dir on a file system that all hosts share"
            )
        step = _choose(self.directory, steps, step)
        restored = self._read_or_offer(step, abstract, model, ema)
        newer = [s for s in steps if s > step]
        for other in newer:
            self._manager.delete(other)
        return restored

    def latest(self) -> int | None:
        """The newest checkpoint's step, or None; the same on all processes, which must all call it."""
        step = from_first(max(self.steps(), default=-1))
        return None if step < 0 else step

    def steps(self) -> list[int]:
        """Steps in the directory, ascending; one still being written is not among them.

        All but the oldest are whole: a kill while old steps are removed can leave one of these in part.
        """
        return _steps(self.directory)

    def wait(self) -> None:
        """Returns when everything is on disk; raises what a write raised."""
        self._manager.wait_until_finished()
        self._manager.check_for_errors()

    def close(self) -> None:
        """Waits, then releases the manager's threads."""
        self.wait()
        self._manager.close()

    def _write_inventory(self) -> None:
        """Called by orbax's thread when all files are written, before the step gets its final name."""
        if is_first():
            for path in self.directory.glob(f"{self._saving}{_TMP}"):
                (path / _INVENTORY).write_text(json.dumps(_file_sizes(path)))

    def _read_or_offer(
        self, step: int, abstract: PyTree, model: Mapping[str, Any] | None, ema: PyTree | None
    ) -> Restored:
        def read(step: int) -> Restored:
            path = self.directory / str(step)
            meta = _read_meta(path)
            if model is not None:
                _check_model(path, meta["config"], model)
            state = _guarded(path, lambda: _read_state(path / "state", abstract))
            return Restored(step, state, _guarded(path, lambda: _read_tree(path / "ema", like=ema)), meta)

        return _offering_older(step, self.steps(), read)


def load_params(
    directory: str | Path, step: int | None = None, ema: bool = False
) -> tuple[dict[str, Any], PyTree, np.ndarray, dict[str, Any]]:
    """Parameters of a run for generation, without optimizer state; a run may go on writing meanwhile.

    Args:
        directory: the run's checkpoints.
        step: which; None for the newest.
        ema: the average of the parameters instead of the last ones.

    Returns:
        (config of the run as a dict, params in host memory, balance_bias float32 [layer, expert], metadata).

    Raises:
        CheckpointError (a ValueError): as `Checkpointer.restore`.
    """
    directory = Path(directory).absolute()
    steps = _steps(directory)

    def read(step: int) -> tuple[dict[str, Any], PyTree, np.ndarray, dict[str, Any]]:
        path = directory / str(step)
        meta = _read_meta(path)
        names = ("balance_bias",) if ema else ("balance_bias", "params")
        tree = _guarded(path, lambda: _read_tree(path / "state", names))
        source = _guarded(path, lambda: _read_tree(path / "ema", ("params",))) if ema else tree
        return meta["config"], source["params"], tree["balance_bias"], meta

    return _offering_older(_choose(directory, steps, step), steps, read)


def _array_handler() -> ocp.PyTreeCheckpointHandler:
    """Devices that hold copies of an array write a slice each, but not of small arrays.

    Each slice is a program to compile; for the many small arrays of a layer that takes longer than writing them.
    """
    types = ocp.type_handlers
    arrays = types.ArrayHandler(min_slice_bytes_for_replica_parallel=_SLICE_BYTES)
    registry = types.create_type_handler_registry(
        (np.number, types.ScalarHandler()), (np.ndarray, types.NumpyHandler()), (jax.Array, arrays)
    )
    return ocp.PyTreeCheckpointHandler(type_handler_registry=registry)


# --- finding and reading ----------------------------------------------------------------------------------


def _steps(directory: Path) -> list[int]:
    if not directory.is_dir():
        return []
    return sorted(int(p.name) for p in directory.iterdir() if p.name.isdecimal() and p.is_dir())


def _choose(directory: Path, steps: list[int], step: int | None) -> int:
    if not steps:
        what = "holds no checkpoint (no folder named by a step)" if directory.exists() else "does not exist"
        raise CheckpointError(f"checkpoint directory {directory} {what}")
    if step is not None and step not in steps:
        raise CheckpointError(f"{directory} has no checkpoint of step {step}; it has {steps}")
    return max(steps) if step is None else step


def _offering_older(step: int, steps: list[int], read: Callable[[int], Any]) -> Any:
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


def _guarded(path: Path, read: Callable[[], Any]) -> Any:
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


def _file_sizes(path: Path) -> dict[str, int]:
    files = (f for item in _ITEMS for f in (path / item).rglob("*") if f.is_file())
    return {str(f.relative_to(path)): f.stat().st_size for f in sorted(files)}


def _read_meta(path: Path) -> dict[str, Any]:
    """The metadata of the checkpoint at `path`, once its files are as they were written."""
    missing = [item for item in _ITEMS if not (path / item).is_dir()]
    if missing:
        raise CheckpointError(f"{path} is not a whole checkpoint of this project: it lacks {missing}")
    found = _file_sizes(path)
    for name, size in _guarded(path, lambda: json.loads((path / _INVENTORY).read_text())).items():
        if found.get(name) != size:
            raise CheckpointError(
                f"checkpoint {path} is damaged: {name} has {found.get(name, 0)} of {size} bytes"
            )
    meta = _guarded(path, lambda: json.loads((path / "meta" / "metadata").read_text()))
    if not isinstance(meta, dict) or any(key not in meta for key in _META_KEYS):
        raise CheckpointError(f"{path} is not a checkpoint of this project: its metadata lacks {_META_KEYS}")
    if meta.get("format") != FORMAT:
        raise CheckpointError(f"{path} has format {meta.get('format')!r}; this version reads {FORMAT}")
    return meta


def _read_state(path: Path, abstract: PyTree) -> PyTree:
    """The tree at `path` in the structure and shardings of `abstract`, after comparing every shape and dtype."""
    saved = _described(ocp.PyTreeCheckpointHandler().metadata(path).tree)
    wanted = _described(abstract)
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
    target = jax.tree.map(_with_sharding, abstract)
    return ocp.StandardCheckpointHandler().restore(path, args=ocp.args.StandardRestore(target))


def _read_tree(path: Path, names: tuple[str, ...] | None = None, like: PyTree | None = None) -> PyTree:
    """The tree at `path`, or only the top-level entries `names` of it, as nested dicts.

    Leaves are NumPy arrays, or where `like` has a sharding, global arrays on it.
    """
    handler = ocp.PyTreeCheckpointHandler()
    tree = handler.metadata(path).tree
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


def _check_model(path: Path, saved_config: Mapping[str, Any], model: Mapping[str, Any]) -> None:
    saved, wanted = saved_config.get("model", {}), json.loads(json.dumps(dict(model)))
    differing = [
        f"model.{key} is {saved.get(key)!r} there, {wanted.get(key)!r} here"
        for key in sorted(saved.keys() | wanted.keys())
        if saved.get(key) != wanted.get(key)
    ]
    if differing:
        raise CheckpointError(f"checkpoint {path} belongs to another model: " + "; ".join(differing))
