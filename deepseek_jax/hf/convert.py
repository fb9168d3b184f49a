"""Conversion between Hugging Face folders and orbax checkpoints, streamed and resumable.

A conversion writes to `<output>.partial` and renames at the end (`job.py`). If it is killed and called again with the
same arguments, it goes on after the last finished layer of an array (to orbax) or file (to Hugging Face), and gives the
same result.
A Hugging Face folder becomes a run folder, `<output>/checkpoints/0` and the text files beside it (tokenizer, chat
template, stops). The metadata keep its config.json and which file held which tensor, so that the way back gives the same
files bit for bit. A training run's folder is converted with all files of its tokenizer, as `Tokenizer.save` writes them.
"""

import dataclasses
from pathlib import Path
from typing import Any

from deepseek_jax.checkpoints import inventory
from deepseek_jax.checkpoints.files import FORMAT, ITEMS, locate
from deepseek_jax.checks import choice, path_of, require
from deepseek_jax.config import Config, DataConfig
from deepseek_jax.data import text_files
from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.hf import original
from deepseek_jax.hf.files import plan_shards
from deepseek_jax.hf.job import JOURNAL, Counter, begin, finish
from deepseek_jax.hf.job import Progress as Progress
from deepseek_jax.hf.orbax import TreeSource, arrays, write_meta, write_tree
from deepseek_jax.hf.read import Checkpoint
from deepseek_jax.hf.source import Source
from deepseek_jax.hf.tensors import DTYPES
from deepseek_jax.hf.write import SHARD_BYTES, Producer, write_model


def to_orbax(
    source: str | Path,
    target: str | Path,
    format: str = "stored",
    progress: Progress | None = None,
    *,
    mtp: bool = True,
) -> None:
    """Converts a Hugging Face folder to a run folder with an orbax checkpoint of step 0.

    format: "stored" (FP8 stays FP8, and is dequantised by whoever loads it), "bf16" or "f32".
    mtp: False leaves the MTP modules out.
    Raises ValueError before anything is written: unreadable source, target in use, unknown format.
    """
    dtypes = {"stored": None, "bf16": DTYPES["BF16"], "f32": DTYPES["F32"]}
    choice("orbax format", format, tuple(dtypes))
    checkpoint = _checkpoint(source, mtp, format)
    stacks = list(arrays(checkpoint, dtypes[format]))
    partial, target = begin(checkpoint.path, target, f"{format}{'' if mtp else ' without MTP'}")
    if partial is None:
        return
    step = partial / "checkpoints" / "0"
    count = Counter(sum(stack.nbytes for stack in stacks), progress)
    write_tree(step / "state", stacks, partial / JOURNAL, count)
    (step / "ema").mkdir(exist_ok=True)  # there is no average to go with published weights
    write_meta(step / "meta", _meta(checkpoint))
    inventory.write(step, ITEMS)
    finish(checkpoint.path, partial, target)


def to_hf(
    source: str | Path,
    target: str | Path,
    format: str = "stored",
    progress: Progress | None = None,
    *,
    scale: str = "fp32",
    shard_bytes: int = SHARD_BYTES,
    mtp: bool = True,
    step: int | None = None,
    ema: bool = False,
) -> None:
    """Converts a run folder, a checkpoints folder, one step, or a Hugging Face folder to a Hugging Face folder.

    format, scale, shard_bytes: as in `hf.save`; a checkpoint that came from Hugging Face and is written as "stored"
    gets its own files back. mtp: False leaves the MTP modules of a Hugging Face folder out. step, ema: of a run, which
    checkpoint (None: the newest), and whether its averaged parameters.
    Raises ValueError before anything is written.
    """
    tree: Source
    kept: original.Kept | None = None
    if (path_of(source, "source") / "config.json").exists():
        require(
            step is None and not ema, f"{source} has one set of parameters: no step and no average to choose"
        )
        tree = checkpoint = _checkpoint(source, mtp, format)
        folder = root = checkpoint.path
        config: dict[str, Any] | None = checkpoint.hf
    else:
        folder, root = locate(source, step)
        tree = TreeSource(folder, ema)
        require(mtp, f"{source}: the MTP modules of a run cannot be left out (mtp=False)")
        kept = original.read(tree.meta, tree.cfg, folder)
        config = None if kept is None else kept.config
    producer = Producer(tree, format, scale)
    layout = plan_shards(producer.specs, shard_bytes)
    config, tokenizer = _said(config, producer.config(), format, root)
    if kept is not None and format == "stored":
        layout = original.restored(kept, producer)
    options = f"{format} {scale} {shard_bytes}{'' if mtp else ' without MTP'}{' average' if ema else ''}"
    partial, target = begin(folder, target, options)
    if partial is None:
        return
    total = sum(map(producer.nbytes, layout.files.values()))
    write_model(partial, config, layout, producer, Counter(total, progress))
    finish(root, partial, target, tokenizer)


# --- from Hugging Face ------------------------------------------------------------------------------------


def _checkpoint(path: str | Path, mtp: bool, format: str) -> Checkpoint:
    """Opens the folder at `path`. Raises ValueError for a leaf that stacked arrays cannot store as it is."""
    checkpoint = Checkpoint(path, mtp)
    if format == "stored" and checkpoint.mixed:
        leaf = checkpoint.leaves[checkpoint.mixed[0]]
        raise ValueError(f"{checkpoint.path}: {leaf.template} is FP8 in some layers only; use format 'bf16'")
    return checkpoint


def _meta(checkpoint: Checkpoint) -> dict[str, Any]:
    """Metadata of the orbax checkpoint: what a training run writes, and how the folder was laid out."""
    model = checkpoint.cfg
    data = DataConfig(
        tokenizer="tokenizer.json",
        vocab_size=model.vocab_size,
        seq_len=min(DataConfig.seq_len, model.max_position_embeddings),
    )
    return {
        "config": dataclasses.asdict(Config(model=model, data=data)),
        "data": {},
        "tokens": 0,
        "format": FORMAT,
        "step": 0,
        "huggingface": original.described(checkpoint),
    }


# --- to Hugging Face --------------------------------------------------------------------------------------


def _said(
    published: dict[str, Any] | None, config: dict[str, Any], format: str, root: Path
) -> tuple[dict[str, Any], Tokenizer | None]:
    """Returns (config.json, tokenizer). A training run has no `published` config; its tokenizer adds the ids."""
    if published is not None:
        return (published if format == "stored" else _merged(published, config)), None
    if not (root / text_files.TOKENIZER).is_file():
        return config, None
    tokenizer = Tokenizer.load(root)
    return config | tokenizer.generation_ids(), tokenizer


def _merged(published: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """The original config.json with the dtype and quantisation of another format."""
    merged = {k: v for k, v in published.items() if k not in ("quantization_config", "dtype")}
    changed = ("torch_dtype", "quantization_config")
    return merged | {k: config[k] for k in changed if k in config}
