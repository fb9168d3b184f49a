"""Kills a conversion before every one of its file operations in turn, resumes it, and compares with an undisturbed one.

    python -m experiments.kill_conversion [--every=1] [--only=hf-orbax]

A tiny FP8 checkpoint of random weights goes from Hugging Face to orbax, back, and to another Hugging Face folder.
It counts operations that change files (open to write, mkdir, rename, remove, rmdir, truncate, each piece written) and
the opening of a source tensor, before which an array may have been laid out; a kill before any other leaves what a kill
before the next of these leaves. A conversion with n of them is killed (`os._exit`: nothing is flushed or cleaned up)
right before the k-th, for every k, and run again: it must come to the same files, byte for byte, with nothing else left
behind. The exit status is 0 if all do.
Each conversion runs in a forked process, so that imports are paid once.
"""

import multiprocessing
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from deepseek_jax import hf
from deepseek_jax.config import ModelConfig
from deepseek_jax.hf import convert
from deepseek_jax.hf.names import leaves, unflatten
from experiments import command_line

_KILLED = 9
_EVENTS = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate"}
_TO_WRITE = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_ENDS = 5  # operations at each end of a conversion before which it is killed in any case
MODEL = ModelConfig(
    vocab_size=11,
    hidden_size=8,
    num_hidden_layers=2,
    first_k_dense_replace=1,
    intermediate_size=6,
    num_attention_heads=2,
    q_lora_rank=None,
    kv_lora_rank=4,
    qk_nope_head_dim=2,
    qk_rope_head_dim=2,
    v_head_dim=2,
    max_position_embeddings=16,
    moe_intermediate_size=3,
    n_routed_experts=2,
    num_experts_per_tok=1,
    n_group=1,
    topk_group=1,
)

Conversion = Callable[[Path, convert.Progress], None]  # to a folder


class Operations:
    """Counts the file operations of this process under a folder; ends the process before number `deadline`."""

    def __init__(self, folder: Path, deadline: int | None):
        self._folder, self._deadline = str(folder), deadline
        self.count = 0
        sys.addaudithook(self._on_event)

    def _on_event(self, event: str, args: tuple[Any, ...]) -> None:
        paths = [os.fspath(a) for a in args if isinstance(a, str | os.PathLike)]
        if not any(str(path).startswith(self._folder) for path in paths):
            return
        if event in _EVENTS or (
            event == "open" and (args[2] & _TO_WRITE or paths[0].endswith(".safetensors"))
        ):
            self.add()

    def add(self, *_: int) -> None:
        """Counts one operation; a conversion calls it as its progress, once per piece."""
        self.count += 1
        if self.count == self._deadline:
            os._exit(_KILLED)


def random_weights(model: ModelConfig) -> tuple[Any, np.ndarray]:
    """Draws (parameters, balance bias) in float32."""
    rng = np.random.default_rng(0)
    flat = {path: rng.standard_normal(leaf.shape, np.float32) for path, leaf in leaves(model).items()}
    return unflatten(flat), rng.standard_normal(model.balance_bias_shape, np.float32)


def make_source(folder: Path) -> None:
    """Writes a Hugging Face folder in FP8 with MTP modules, in several files, with a tokenizer."""
    hf.save(folder, MODEL, *random_weights(MODEL), format="fp8", shard_bytes=1500)
    for name in ("tokenizer.json", "generation_config.json"):
        (folder / name).write_text("{}")


def conversions(folder: Path) -> dict[str, Conversion]:
    """Returns the conversions by name; the second reads what the first has written to `folder`/hf-orbax."""
    source, run = folder / "source", folder / "hf-orbax"
    return {
        "hf-orbax": lambda target, count: convert.to_orbax(source, target, progress=count),
        "orbax-hf": lambda target, count: convert.to_hf(run, target, progress=count, shard_bytes=1500),
        "hf-hf": lambda target, count: convert.to_hf(source, target, "bf16", count, shard_bytes=1500),
    }


def _count(
    conversion: Conversion, target: Path, watched: Path, deadline: int | None, pipe: Connection
) -> None:
    operations = Operations(watched, deadline)
    conversion(target, operations.add)
    pipe.send(operations.count)


def in_a_process(
    conversion: Conversion, target: Path, watched: Path, deadline: int | None = None
) -> int | None:
    """Runs to the end or up to the operation `deadline`; returns how many there were, or None if it was killed.

    Raises RuntimeError for any other end, whose traceback is on standard error.
    """
    fork = multiprocessing.get_context("fork")
    count, theirs = fork.Pipe(duplex=False)
    process = fork.Process(target=_count, args=(conversion, target, watched, deadline, theirs))
    process.start()
    process.join()
    if process.exitcode not in (0, _KILLED):
        raise RuntimeError(f"ended with {process.exitcode}; its error stands above")
    return count.recv() if process.exitcode == 0 else None


def files(folder: Path) -> dict[str, bytes]:
    """Reads every file below a folder by its path; an empty folder counts as an empty file."""
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() if p.is_file() else b""
        for p in sorted(folder.rglob("*"))
        if p.is_file() or not any(p.iterdir())
    }


def kill_everywhere(folder: Path, name: str, every: int) -> tuple[int, list[str]]:
    """Returns (kills, failures in words) of one conversion; its undisturbed result stays at `folder`/name."""
    conversion, want, wrong = conversions(folder)[name], folder / name, []
    operations = in_a_process(conversion, want, folder)
    assert operations is not None
    expected = files(want)
    everywhere = range(1, operations + 1)
    kills = sorted({*everywhere[::every], *everywhere[:_ENDS], *everywhere[-_ENDS:]})
    for k in kills:
        place = folder / "killed"
        target = place / name
        place.mkdir()
        try:
            if in_a_process(conversion, target, folder, k) is not None:
                wrong.append(f"{name}, kill {k}: it came to its end")
            in_a_process(conversion, target, folder)
            if files(place) != {f"{name}/{path}": content for path, content in expected.items()}:
                wrong.append(f"{name}, kill {k}: other files than undisturbed")
        except RuntimeError as error:
            wrong.append(f"{name}, kill {k}: {error}")
        shutil.rmtree(place)
    return len(kills), wrong


def main(argv: Sequence[str]) -> int:
    parser = command_line.Parser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--every", type=int, default=1, help="before every N-th, the first and the last")
    parser.add_argument(
        "--only", choices=tuple(conversions(Path())), help="this conversion alone, and what it needs"
    )
    args = parser.parse_args(argv)
    if args.every < 1:
        raise ValueError(f"--every={args.every} must be at least 1")
    found = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_source(folder / "source")
        for name, conversion in conversions(folder).items():
            if args.only in (None, name):
                kills, wrong = kill_everywhere(folder, name, args.every)
                print(f"{name}: {kills} kills, {kills - len(wrong)} resumed to the equal result", flush=True)
                found += wrong
            else:
                in_a_process(conversion, folder / name, folder)
    for line in found:
        print(line)
    return command_line.FAILURE if found else 0


if __name__ == "__main__":
    command_line.run(main)
