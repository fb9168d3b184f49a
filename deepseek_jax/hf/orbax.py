"""Parameters are written to an orbax checkpoint, and read from one, piece by piece.

Orbax writes whole arrays from memory; a stack of experts may be larger than that. So orbax lays out the tree, and
each array is then written through tensorstore in chunks of one piece (one layer's matrix, or one expert's), in
the plain zarr format that orbax reads. The result is a step of a run's checkpoints, with `params` and
`balance_bias` but no optimizer state: what `checkpoints.arrays.load_params` reads.
"""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from etils import epath

from deepseek_jax.balancing.plan import Plan
from deepseek_jax.checkpoints.files import CheckpointError, MisfitError, first_line, read_meta, verify
from deepseek_jax.checks import require
from deepseek_jax.config import ModelConfig, build
from deepseek_jax.hf import fp8
from deepseek_jax.hf.arrays import on_devices
from deepseek_jax.hf.names import Index, Leaf, leaves, unflatten
from deepseek_jax.hf.source import SCALE, Q, Source, Stacked, require_fit, stacks, windowed
from deepseek_jax.hf.tensors import DTYPES
from deepseek_jax.json_files import read_object

BIAS = "balance_bias"


def arrays(source: Source, dtype: np.dtype | None) -> Iterator[Stacked]:
    """Lists the arrays of a source's checkpoint; `dtype` None stores each as it is (FP8 as values and scales)."""
    for stack in stacks(source, dtype, keep_fp8=dtype is None):
        yield stack._replace(name=f"params.{stack.name}")
    bias = source.bias()
    yield Stacked(BIAS, bias.shape, (), bias.dtype, windowed(lambda _: bias))


# --- writing ----------------------------------------------------------------------------------------------


def write_tree(directory: Path, stacks: list[Stacked], journal: Path, written: Callable[[int], None]) -> None:
    """Writes the arrays as the orbax tree at `directory`; goes on where an earlier call was cut off.

    `journal` is a file that remembers, from call to call, what is safely on disk: "<array> <layer>" per line. `written`
    is called with the number of bytes after each piece, the ones found finished included.
    """
    _lay_out(directory, [stack.name for stack in stacks])
    with open(journal, "a+", encoding="utf-8") as log:
        finished = _finished_lines(log)
        for stack in stacks:
            store = _store(directory / stack.name, stack)
            layers = stack.stack[0] if stack.stack else 1
            for layer in range(layers):
                line = f"{stack.name} {layer}"
                if line in finished:
                    written(stack.nbytes // layers)
                    continue
                for rest in np.ndindex(*stack.stack[1:]):
                    index = (layer, *rest)[: len(stack.stack)]
                    piece = stack.piece(index)
                    store[index].write(piece).result()
                    written(piece.nbytes)
                log.write(line + "\n")
                log.flush()


def _finished_lines(log: TextIO) -> set[str]:
    """Returns the whole lines of a journal, and removes a last line that a kill cut short."""
    log.seek(0)
    *lines, rest = log.read().split("\n")
    if rest:
        log.truncate(sum(len(line.encode()) + 1 for line in lines))
    return set(lines)


def _lay_out(directory: Path, names: list[str]) -> None:
    """Lets orbax describe the tree: it saves arrays of one number, which are then removed."""
    if (directory / "_METADATA").exists():
        return
    shutil.rmtree(directory, ignore_errors=True)
    scratch = directory.with_name(directory.name + ".layout")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    tree = unflatten({name: np.zeros(1, np.float32) for name in names})
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False)
    handler.save(epath.Path(scratch), args=ocp.args.PyTreeSave(tree))
    for name in names:
        shutil.rmtree(scratch / name)
    scratch.rename(directory)


def _store(path: Path, stack: Stacked) -> Any:
    """Opens the array of `stack` for writing, a chunk for each of its tensors; creates it if it is not there."""
    spec = {
        "driver": "zarr",
        "kvstore": {"driver": "file", "path": f"{path}/"},
        "metadata": {
            "chunks": [1] * len(stack.stack) + [max(1, n) for n in stack.shape[len(stack.stack) :]],
            "compressor": {"id": "zstd", "level": 1},
        },
        "store_data_equal_to_fill_value": True,  # orbax takes an absent chunk for damage
    }
    return ts.open(spec, create=True, open=True, dtype=stack.dtype, shape=stack.shape).result()


def write_meta(directory: Path, meta: dict[str, Any]) -> None:
    """Writes the JSON item next to the tree."""
    directory.mkdir(parents=True, exist_ok=True)
    ocp.JsonCheckpointHandler().save(epath.Path(directory), args=ocp.args.JsonSave(meta))


# --- reading ----------------------------------------------------------------------------------------------


class TreeSource(Source):
    """Leaf pieces of the parameters in one step of a run's checkpoints, `<step>/{state,ema,meta}`.

    ema: reads the averaged parameters. verified: the files have been compared with their inventory already. Memory holds
    one chunk per leaf. Raises ValueError naming the path: not such a folder, arrays that do not fit its own config,
    damaged data.
    """

    def __init__(self, step: Path, ema: bool = False, verified: bool = False):
        if not verified:
            verify(step, ("state", "ema", "meta") if ema else ("state", "meta"))
        self.meta = read_meta(step)
        model = self.meta["config"].get("model")
        require(model is not None, f"{step / 'meta'} names no model config: not a checkpoint of this project")
        self.cfg: ModelConfig = build(ModelConfig, model, "model.")
        self._step = step
        require(not ema or (step / "ema" / "_METADATA").exists(), f"{step} has no averaged parameters")
        state, params = _Tree(step / "state"), _Tree(step / ("ema" if ema else "state"))
        self._blocks: dict[str, tuple[tuple[int, ...], np.ndarray]] = {}
        self._stores: dict[str, Any] = {}
        self.dtypes: dict[str, np.dtype] = {}
        for path, leaf in leaves(self.cfg).items():
            self.dtypes[path] = self._open(params, f"params.{path}", leaf)
        self._stores[BIAS] = state.open(BIAS, self.cfg.balance_bias_shape, (DTYPES["F32"],))

    def _open(self, tree: "_Tree", name: str, leaf: Leaf) -> np.dtype:
        if f"{name}.{Q}" not in tree.names:
            self._stores[name] = tree.open(name, leaf.shape, (DTYPES["F32"], DTYPES["BF16"]))
            return self._stores[name].dtype.numpy_dtype
        scales = (*leaf.stack, *fp8.scale_shape(leaf.hf_shape))
        self._stores[f"{name}.{Q}"] = tree.open(f"{name}.{Q}", (*leaf.stack, *leaf.hf_shape), (fp8.E4M3,))
        self._stores[f"{name}.{SCALE}"] = tree.open(f"{name}.{SCALE}", scales, (DTYPES["F32"],))
        return fp8.E4M3

    def piece(self, leaf: Leaf, index: Index) -> np.ndarray:
        suffix = f".{Q}" if self.dtypes[leaf.path] == fp8.E4M3 else ""
        return self._read(f"params.{leaf.path}{suffix}", index)

    def scale(self, leaf: Leaf, index: Index) -> np.ndarray:
        name = f"params.{leaf.path}.{SCALE}"
        return fp8.checked_scales(self._read(name, index), f"{self._step}: array {name}{list(index)}")

    def bias(self) -> np.ndarray:
        return self._read(BIAS, ())

    def forget(self) -> None:
        self._blocks.clear()

    def _read(self, name: str, index: Index) -> np.ndarray:
        """Reads a piece through the chunk that contains it: a chunk of orbax may contain several pieces."""
        store = self._stores[name]
        chunk = store.chunk_layout.read_chunk.shape[: len(index)]
        start = tuple(i // c * c for i, c in zip(index, chunk, strict=True))
        if self._blocks.get(name, (None,))[0] != start:
            window = tuple(
                slice(s, min(s + c, n)) for s, c, n in zip(start, chunk, store.shape, strict=False)
            )
            try:
                self._blocks[name] = (start, store[window].read().result())
            except ValueError as error:
                raise ValueError(f"{self._step}: array {name} is damaged: {first_line(error)}") from error
        block = self._blocks[name][1]
        return block[tuple(i - s for i, s in zip(index, start, strict=True))]


class _Tree:
    """A tree that orbax wrote: it knows the names of its arrays, and opens each with tensorstore."""

    def __init__(self, directory: Path):
        self.directory = directory
        self.names, self._zarr3 = _tree_names(directory / "_METADATA")
        self._ocdbt = (directory / "manifest.ocdbt").exists()

    def open(self, name: str, shape: tuple[int, ...], allowed: tuple[np.dtype, ...]) -> Any:
        """Opens an array. Raises ValueError if it is missing, or has another shape or dtype."""
        require(name in self.names, f"{self.directory} lacks {name}")
        kvstore: dict[str, Any] = {"driver": "file", "path": f"{self.directory / name}/"}
        if self._ocdbt:
            kvstore = {"driver": "ocdbt", "base": f"file://{self.directory}/", "path": f"{name}/"}
        try:
            driver = "zarr3" if self._zarr3 else "zarr"
            spec = {"driver": driver, "kvstore": kvstore, "fill_missing_data_reads": False}
            store = ts.open(spec).result()
        except ValueError as error:
            raise ValueError(
                f"{self.directory}: array {name} cannot be opened: {first_line(error)}"
            ) from error
        found = store.dtype.numpy_dtype, tuple(store.shape)
        require_fit(f"{self.directory}: array {name}", found, allowed, shape)
        return store


def load_tree(
    item: Path,
    shardings: Callable[[ModelConfig], Any] = lambda cfg: None,
    plan: Callable[[ModelConfig], Plan | None] = lambda cfg: None,
) -> Any:
    """Reads parameters from `<step>/state` or `<step>/ema`, whose files have been compared with their inventory.

    Memory holds a layer at a time, if the chunks are no larger. `shardings` gives a tree of `jax.sharding.Sharding` for
    a config (None: the default device), `plan` the slots of experts (None: in their order). FP8 becomes bfloat16.

    Raises CheckpointError naming path and array.
    """
    try:
        source = TreeSource(item.parent, item.name == "ema", verified=True)
        where, slots = (_laid_out(of, source.cfg) for of in (shardings, plan))
        return on_devices(source, where, plan=slots)
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(str(error)) from error


def _laid_out(shardings: Callable[[Any], Any], cfg: Any) -> Any:
    try:
        return shardings(cfg)
    except ValueError as error:  # the mesh is wrong, not the checkpoint
        raise MisfitError(str(error)) from error


def _tree_names(file: Path) -> tuple[set[str], bool]:
    """Returns (names of the arrays, whether they are zarr 3) of a tree that orbax wrote."""
    tree = read_object(file)
    try:
        keys = [entry["key_metadata"] for entry in tree["tree_metadata"].values()]
        return {".".join(key["key"] for key in path) for path in keys}, bool(tree.get("use_zarr3"))
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{file} does not describe a tree of arrays: {first_line(error)}") from error
