"""Measures start-up time and memory against the size of the corpus:

    python -m experiments.study.data_scale --gigabytes 0.02 2

Writes that much text as shards of JSON lines into a temporary folder, opens it as a training run does, in a process
of its own each time, and prints what each start took. The first one trains a tokenizer on a sample and encodes all
text once; a later one should take as long and as much memory for any size.
"""

import json
import multiprocessing
import resource
import sysconfig
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from experiments import command_line

_SHARD_BYTES = 64_000_000
_DOCUMENT_CHARS = 4000  # on average


def write_corpus(folder: Path, num_bytes: int) -> None:
    """Writes documents of log-normal length out of shuffled lines of the standard library."""
    rng = np.random.default_rng(0)
    paths = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    lines = [line for path in paths for line in path.read_text(encoding="utf-8").splitlines(keepends=True)]
    mean_line = sum(map(len, lines)) / len(lines)
    written = shard = 0
    while written < num_bytes:
        end = min(num_bytes, written + _SHARD_BYTES)
        with (folder / f"{shard:05d}.jsonl").open("w", encoding="utf-8") as file:
            while written < end:
                size = 1 + int(rng.lognormal(sigma=1.0) * _DOCUMENT_CHARS / mean_line / np.e**0.5)
                text = "".join(lines[i] for i in rng.integers(len(lines), size=size))
                written += file.write(json.dumps({"text": text}) + "\n")
        shard += 1


def measure(folder: Path, cache_dir: Path) -> dict[str, float]:
    """Opens the corpus and takes a batch, in a fresh process: its imports and memory are measured too."""
    start = time.perf_counter()
    from deepseek_jax import data
    from deepseek_jax.config import DataConfig

    imported = time.perf_counter()
    cfg = DataConfig(source=str(folder), cache_dir=str(cache_dir), vocab_size=4096, seq_len=1024)
    opened = data.load(cfg)
    loaded = time.perf_counter()
    opened.train.take(64)
    taken = time.perf_counter()
    (packer,) = opened.train._packers
    opened.train.close()
    return {
        "text MB": opened.report.num_bytes / 1e6,
        "documents": opened.report.documents,
        "tokens": len(packer.documents.ids),
        "import s": imported - start,
        "load s": loaded - imported,
        "first batch s": taken - loaded,
        "peak MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000,
    }


def main(argv: Sequence[str]) -> int:
    parser = command_line.Parser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gigabytes", type=float, nargs="+", default=[0.02, 0.2, 2], help="of the corpora")
    for gigabytes in parser.parse_args(argv).gigabytes:
        with tempfile.TemporaryDirectory() as scratch:
            corpus, cache = Path(scratch) / "corpus", Path(scratch) / "cache"
            corpus.mkdir()
            write_corpus(corpus, int(gigabytes * 1e9))
            for start in ("first", "second", "third"):
                with multiprocessing.get_context("spawn").Pool(1) as pool:
                    found = pool.apply(measure, (corpus, cache))
                figures = (f"{name} {x:,.{1 if name.endswith(' s') else 0}f}" for name, x in found.items())
                print(f"{start} start: {', '.join(figures)}", flush=True)
    return 0


if __name__ == "__main__":
    command_line.run(main)
