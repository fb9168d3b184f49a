"""Start-up time and memory against the size of the corpus:

    python -m experiments.data_scale --gigabytes=0.02,2

Writes that much text as shards of JSON lines into a temporary folder, opens it as a training run does, in a process
of its own each time, and prints a table: the first start, which trains a tokenizer on a sample and encodes everything
once, and a later one, which should take as long and as much memory for any size.
"""

import json
import resource
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from absl import app, flags

_GIGABYTES = flags.DEFINE_list("gigabytes", ["0.02", "0.2", "2"], "Sizes of the corpora.")
_SHARD_BYTES = 64_000_000
_DOCUMENT_CHARS = 4000  # on average


def write_corpus(folder: Path, num_bytes: int) -> None:
    """Documents of log-normal length out of lines of the standard library, in an order of their own."""
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


def measure(folder: str, cache_dir: str) -> None:
    """Opens the corpus and takes a batch; prints seconds and MB as JSON."""
    start = time.perf_counter()
    from deepseek_jax import data
    from deepseek_jax.config import DataConfig

    imported = time.perf_counter()
    cfg = DataConfig(source=folder, cache_dir=cache_dir, vocab_size=4096, seq_len=1024)
    opened = data.load(cfg)
    loaded = time.perf_counter()
    opened.train.take(64)
    taken = time.perf_counter()
    (packer,) = opened.train._packers
    found = {
        "import_s": imported - start,
        "load_s": loaded - imported,
        "batch_s": taken - loaded,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000,
        "documents": opened.report.documents,
        "text_mb": opened.report.num_bytes / 1e6,
        "tokens": len(packer.documents.ids),
        "blocks": packer.num_blocks,
    }
    opened.train.close()
    print(json.dumps(found))


def _measured(folder: Path, cache: Path) -> dict[str, float]:
    command = [sys.executable, "-m", "experiments.data_scale", "--measure", str(folder), str(cache)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    print("| text MB | documents | tokens | start | import s | load s | first batch s | peak MB |")
    print("|---|---|---|---|---|---|---|---|")
    for gigabytes in map(float, _GIGABYTES.value):
        with tempfile.TemporaryDirectory() as scratch:
            corpus, cache = Path(scratch) / "corpus", Path(scratch) / "cache"
            corpus.mkdir()
            write_corpus(corpus, int(gigabytes * 1e9))
            for start in ("first", "second", "third"):
                m = _measured(corpus, cache)
                print(
                    f"| {m['text_mb']:,.0f} | {m['documents']:,} | {m['tokens']:,} | {start} | "
                    f"{m['import_s']:.1f} | {m['load_s']:.1f} | {m['batch_s']:.1f} | {m['peak_mb']:,.0f} |",
                    flush=True,
                )


if __name__ == "__main__":
    if "--measure" in sys.argv:
        measure(*sys.argv[2:])
    else:
        app.run(main)
