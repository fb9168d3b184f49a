"""Conversion between Hugging Face folders and orbax checkpoints, streamed and resumable.

A conversion writes to `<output>.partial` and renames at the end. Cut off at any moment and called again with the
same arguments, it goes on, after the last finished layer of an array (to orbax) or file (to Hugging Face), and comes
to the same result. `conversion.json` in the folder says whose it is: the first file there and the last to go.
A Hugging Face folder becomes a run folder, `<output>/checkpoints/0` and the text files beside it (tokenizer, chat
template, stops); its config.json and the spread of tensors over files are kept in the metadata, so that the way back
gives the same files bit for bit. The folder of a training run brings its tokenizer whole, as `Tokenizer.save` does.
"""

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from deepseek_jax import inventory
from deepseek_jax.config import Config, DataConfig
from deepseek_jax.data import text_files
from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.hf import fp8
from deepseek_jax.hf.files import Layout, plan_shards, write_index
from deepseek_jax.hf.names import Index, Leaf
from deepseek_jax.hf.orbax import TreeSource, arrays, write_meta, write_tree
from deepseek_jax.hf.read import Checkpoint
from deepseek_jax.hf.tensors import DTYPES, write_shard
from deepseek_jax.hf.write import SHARD_BYTES, Producer, Source, require_free
from deepseek_jax.json_files import read_object
from deepseek_jax.training.checkpoint_files import FORMAT, ITEMS

_JOB = "conversion.json"  # what a partial output is a part of
_JOURNAL = "conversion.txt"  # which pieces of it are finished

# (bytes written so far, bytes in total)
Progress = Callable[[int, int], None]


def to_orbax(
    source: str | Path,
    target: str | Path,
    format: str = "stored",
    progress: Progress | None = None,
    *,
    mtp: bool = True,
) -> None:
    """Hugging Face folder -> run folder with an orbax checkpoint of step 0.

    format: "stored" (FP8 stays FP8, and is dequantised by whoever loads it), "bf16" or "f32".
    mtp: False leaves the MTP modules out.
    Raises ValueError before anything is written: unreadable source, target in use, unknown format.
    """
    if format not in ("stored", "bf16", "f32"):
        raise ValueError(f"format={format!r} is not one of ['stored', 'bf16', 'f32'] for orbax")
    checkpoint = Checkpoint(source, mtp)
    folder = _FolderSource(checkpoint, format == "stored")
    dtype = {"stored": None, "bf16": DTYPES["BF16"], "f32": DTYPES["F32"]}[format]
    stacks = list(arrays(checkpoint.cfg, folder, dtype))
    partial, target = _begin(checkpoint.path, target, f"{format}{'' if mtp else ' without MTP'}")
    if partial is None:
        return
    step = partial / "checkpoints" / "0"
    count = _Counter(sum(stack.nbytes for stack in stacks), progress)
    write_tree(step / "state", stacks, partial / _JOURNAL, count)
    (step / "ema").mkdir(exist_ok=True)  # there is no average to go with published weights
    write_meta(step / "meta", _meta(checkpoint))
    inventory.write(step, ITEMS)
    _finish(checkpoint.path, partial, target)


def to_hf(
    source: str | Path,
    target: str | Path,
    format: str = "stored",
    progress: Progress | None = None,
    *,
    scale: str = "fp32",
    shard_bytes: int = SHARD_BYTES,
    mtp: bool = True,
) -> None:
    """Run folder (its newest step), checkpoints folder, one step, or a Hugging Face folder -> Hugging Face folder.

    format, scale, shard_bytes: as in `hf.save`; a checkpoint that came from Hugging Face and is written as "stored"
    gets its own files back. mtp: False leaves the MTP modules of a Hugging Face folder out.
    Raises ValueError before anything is written.
    """
    tree: Source
    kept: dict[str, Any] | None = None
    if (Path(source) / "config.json").exists():
        checkpoint = Checkpoint(source, mtp)
        step = root = checkpoint.path
        cfg, tree = checkpoint.cfg, _FolderSource(checkpoint, format == "stored")
        original: dict[str, Any] | None = checkpoint.hf
    else:
        step, root = _newest_step(Path(source).absolute())
        tree = TreeSource(step)
        cfg, kept = tree.cfg, tree.meta.get("huggingface")
        original = None if kept is None else kept["config"]
    producer = Producer(cfg, tree, format, scale)
    layout = plan_shards(producer.specs, shard_bytes)
    config, tokenizer = _said(original, producer.config(), format, root)
    if kept is not None and format == "stored":
        layout = _restored_layout(kept, producer)
    options = f"{format} {scale} {shard_bytes}{'' if mtp else ' without MTP'}"
    partial, target = _begin(step, target, options)
    if partial is None:
        return
    (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    names = [name for group in layout.files.values() for name in group]
    count = _Counter(sum(_nbytes(producer, [name]) for name in names), progress)
    for file, group in layout.files.items():
        if (partial / file).exists():
            count(_nbytes(producer, group))
        else:
            write_shard(partial / file, group, producer.specs, layout.metadata[file], producer, count)
    write_index(partial, layout)
    _finish(root, partial, target, tokenizer)


# --- from Hugging Face ------------------------------------------------------------------------------------


class _FolderSource(Source):
    """Leaf pieces of a Hugging Face folder, FP8 as it is.

    A leaf that is FP8 in some layers only becomes float32 on the way, unless it is to be `stored` as it is, which
    stacked arrays cannot do.
    """

    def __init__(self, checkpoint: Checkpoint, stored: bool):
        self._checkpoint = checkpoint
        self.dtypes = {}
        for path, leaf in checkpoint.leaves.items():
            whole, some = checkpoint.is_fp8(leaf), checkpoint.has_fp8(leaf)
            if stored and some and not whole:
                raise ValueError(
                    f"{checkpoint.path}: {leaf.template} is FP8 in some layers only; use format 'bf16'"
                )
            mixed = DTYPES["F32"] if some else checkpoint.float_dtype(leaf)
            self.dtypes[path] = fp8.E4M3 if whole else mixed

    def piece(self, leaf: Leaf, index: Index) -> np.ndarray:
        if self.dtypes[leaf.path] == fp8.E4M3:
            return np.asarray(self._checkpoint.tensors[leaf.name(index)].read())
        out = np.empty(leaf.piece_shape, self.dtypes[leaf.path])
        self._checkpoint.read(leaf, index, (slice(None),) * out.ndim, out)
        return out

    def scale(self, leaf: Leaf, index: Index) -> np.ndarray:
        return self._checkpoint.scales(leaf.name(index))

    def bias(self) -> np.ndarray:
        return self._checkpoint.balance_bias()


def _meta(checkpoint: Checkpoint) -> dict[str, Any]:
    """Metadata of the orbax checkpoint: what a training run writes, and how the folder was laid out."""
    model, layout = checkpoint.cfg, checkpoint.layout
    data = DataConfig(
        tokenizer="tokenizer.json",
        vocab_size=model.vocab_size,
        seq_len=min(DataConfig.seq_len, model.max_position_embeddings),
    )
    files = {
        file: {name: checkpoint.tensors[name].dtype for name in names if name in checkpoint.tensors}
        for file, names in layout.files.items()
    }
    return {
        "config": dataclasses.asdict(Config(model=model, data=data)),
        "data": {},
        "tokens": 0,
        "format": FORMAT,
        "step": 0,
        "huggingface": {
            "config": checkpoint.hf,
            "files": files,
            "metadata": layout.metadata,
            "index_file": layout.index_file,
        },
    }


# --- to Hugging Face --------------------------------------------------------------------------------------


def _newest_step(path: Path) -> tuple[Path, Path]:
    """(folder of the step, folder with the tokenizer) for a run folder, its checkpoints, or a step."""
    if (path / "state").is_dir():
        return path, path.parent.parent
    root = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    steps = [int(p.name) for p in root.iterdir() if p.name.isdecimal()] if root.is_dir() else []
    if not steps:
        raise ValueError(f"{path} holds neither config.json nor checkpoints by step")
    return root / str(max(steps)), root.parent


def _restored_layout(kept: dict[str, Any], producer: Producer) -> Layout:
    """The files that the checkpoint came in; tensors come back in the dtype they had there."""
    files = {}
    for file, dtypes in kept["files"].items():
        names = [name for name in dtypes if name in producer.specs]
        if names:
            files[file] = names
        for name in names:
            producer.specs[name] = (DTYPES[dtypes[name]], producer.specs[name][1])
    return Layout(files, kept["metadata"], kept["index_file"])


def _said(
    original: dict[str, Any] | None, config: dict[str, Any], format: str, root: Path
) -> tuple[dict[str, Any], Tokenizer | None]:
    """(config.json, tokenizer): of a training run, which has no `original`, the tokenizer says the ids in it."""
    if original is not None:
        return (original if format == "stored" else _merged(original, config)), None
    if not (root / text_files.TOKENIZER).is_file():
        return config, None
    tokenizer = Tokenizer.load(root)
    return config | tokenizer.generation_ids(), tokenizer


def _merged(original: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """The original config.json with the dtype and quantisation of another format."""
    merged = {k: v for k, v in original.items() if k not in ("quantization_config", "dtype")}
    changed = ("torch_dtype", "quantization_config")
    return merged | {k: config[k] for k in changed if k in config}


def _nbytes(producer: Producer, names: list[str]) -> int:
    return sum(int(np.prod(shape)) * dtype.itemsize for dtype, shape in (producer.specs[n] for n in names))


# --- a job that can be cut off ----------------------------------------------------------------------------


class _Counter:
    """Adds up bytes and reports them."""

    def __init__(self, total: int, progress: Progress | None):
        self._done, self._total, self._progress = 0, total, progress

    def __call__(self, nbytes: int) -> None:
        self._done += nbytes
        if self._progress is not None:
            self._progress(self._done, self._total)


def _begin(source: Path, target: str | Path, options: str) -> tuple[Path | None, Path]:
    """(partial output, output): a new one, or one that the same conversion was cut off from; None: all is done."""
    target = Path(target).absolute()
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
    if found != job:
        raise ValueError(f"{partial} belongs to another conversion, or its source changed: remove it first")
    return partial, target


def _stamps(source: Path, outputs: tuple[Path, Path]) -> list[list[Any]]:
    """Name, size and time of each of the source's files; an output may lie among them."""
    files = sorted(p for p in source.rglob("*") if p.is_file() and not set(outputs) & {p, *p.parents})
    return [[str(p.relative_to(source)), p.stat().st_size, p.stat().st_mtime_ns] for p in files]


def _job_of(folder: Path) -> dict[str, Any] | None:
    return read_object(folder / _JOB) if (folder / _JOB).exists() else None


def _finish(root: Path, partial: Path, target: Path, tokenizer: Tokenizer | None = None) -> None:
    """Completes an output with the text files: those of `root` as they are, or all that a run's tokenizer says."""
    if tokenizer is None:
        text_files.write(partial, text_files.read(root))
    else:
        tokenizer.save(partial)
    if target.exists():
        target.rmdir()
    os.replace(partial, target)
    _remove_traces(target)


def _remove_traces(target: Path) -> None:
    (target / _JOURNAL).unlink(missing_ok=True)
    (target / _JOB).unlink()
