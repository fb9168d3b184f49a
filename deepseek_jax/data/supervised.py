"""Conversations in, batches out: the data of supervised fine-tuning (report section 5.1).

    data = load(config.sft, tokenizer, seq_len=4096, cache_dir=Path(".cache"))
    batch = data.train.take(64)     # "tokens", "segments", "positions", "loss_mask", "padding", each [64, 4097]

Rows become samples (conversations.py), kept on disk (sample_cache.py), packed whole into windows (best_fit.py), and handed
out by the stream of pre-training (loader.py): several sources by weight, resumable, each process its own rows.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from deepseek_jax import data as data_lib
from deepseek_jax.checks import choice, named, ranges, require, shown
from deepseek_jax.config import SEEDS
from deepseek_jax.data import packing
from deepseek_jax.data.best_fit import PackedSamples, SamplePacker
from deepseek_jax.data.conversations import LEARN
from deepseek_jax.data.loader import BatchStream
from deepseek_jax.data.rows import held_out
from deepseek_jax.data.sample_cache import Samples, samples_of
from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.data.validation import validation_windows

TOO_LONG = ("refuse", "cut")
_COUNTED_TOKENS = 1 << 22  # of a source, by which the unigram model is made


@dataclasses.dataclass(frozen=True)
class SupervisedConfig:
    """What is learned (section 5.1): files of rows (conversations.py), JSON lines or Parquet."""

    # a glob, a folder or a file; several by weight, their shares of the windows: ("maths/*.jsonl=0.7", "chat.jsonl=0.3")
    sources: tuple[str, ...] = ()
    validation: str | None = (
        None  # such files; None: hold out the rows of `validation_fraction` of the questions
    )
    validation_fraction: float = 0.05  # share of the questions held out, if `validation` is None
    learn: str = "all"  # which answers of a conversation are learned: "all", or the "last"
    # samples of more than data.seq_len + 1 tokens: "refuse" leaves them out, "cut" takes their beginning; all are counted, the
    # first ones named
    too_long: str = "refuse"
    seed: int = 0  # decides the order

    def __post_init__(self):
        choice("sft.learn", self.learn, LEARN)
        choice("sft.too_long", self.too_long, TOO_LONG)
        ranges("sft", self, "seed", 0, SEEDS - 1)
        ranges("sft", self, "validation_fraction", 0, 1)
        weighted(self.sources, "sft.sources")


def weighted(sources: Sequence[str], name: str) -> list[tuple[str, float]]:
    """(files, weight) of each "FILES=WEIGHT"; one alone needs no weight. Raises ValueError, with the setting's `name`."""
    found = []
    for entry in sources:
        files, _, weight = entry.rpartition("=")
        number = bool(files) and weight.replace(".", "", 1).isdecimal()
        require(number or len(sources) == 1, f'{name} entry {shown(entry)} should be "FILES=WEIGHT"')
        files, share = (files, float(weight)) if number else (entry, 1.0)
        require(bool(files) and share > 0, f"{name} entry {shown(entry)} needs files and a positive weight")
        found.append((files, share))
    return found


@dataclasses.dataclass
class SupervisedReport(data_lib.CorpusReport):
    """Counts of what was read, refused and cut. `documents` are samples.

    Attributes:
        tokens, learned: of the samples for training, how many tokens, and how many of those are labels.
        windows: of the first epoch, about; fill: the share of their tokens that is no padding.
    """

    tokens: int = 0
    learned: int = 0
    windows: int = 0
    fill: float = 0.0

    def summary(self) -> str:
        head = (
            f"{self.documents:,} samples of {self.tokens:,} tokens, {self.learned:,} of them learned, from {self.files} "
            f"files; an epoch is about {self.windows:,} windows, {self.fill:.1%} full"
        )
        return "\n".join([head, *(self._line(kind, count) for kind, count in sorted(self.skipped.items()))])


def load(
    cfg: SupervisedConfig,
    tokenizer: Tokenizer,
    seq_len: int,
    cache_dir: Path,
    process_index: int = 0,
    process_count: int = 1,
) -> data_lib.Data:
    """Opens the training stream of conversations. The first call renders and encodes; later ones map the ids.

    Args:
        process_index, process_count: this host among all hosts; each reads only its rows.

    Raises:
        ValueError: no source, nothing readable, a row with nothing to learn (by its file and line), or no sample that fits.
    """
    require(bool(cfg.sources), "sft.sources is empty: name the files of conversations to learn from")
    sources, weights = zip(*weighted(cfg.sources, "sft.sources"), strict=True)
    found = [samples_of(source, tokenizer, cfg.learn, cache_dir) for source in sources]
    report, pad = SupervisedReport(), _pad_id(tokenizer)
    fitting = [_fitting(samples, cfg.too_long, seq_len + 1, report) for samples in found]
    if cfg.validation:
        beside = samples_of(cfg.validation, tokenizer, cfg.learn, cache_dir)
        held = [PackedSamples(beside, _fitting(beside, cfg.too_long, seq_len + 1, report), seq_len, pad)]
        train = fitting
    else:
        sides = _split(found, fitting, cfg.validation_fraction)
        train = [index[~out] for index, out in zip(fitting, sides, strict=True)]
        held = [
            PackedSamples(samples, index[out], seq_len, pad)
            for samples, index, out in zip(found, fitting, sides, strict=True)
        ]
    for source, index in zip(sources, train, strict=True):
        require(len(index) > 0, f"{source}: no sample is left for training{report.reasons()}")
    packers = [
        SamplePacker(samples, index, seq_len, pad, cfg.seed)
        for samples, index in zip(found, train, strict=True)
    ]
    _describe(report, packers)
    fingerprint = {
        "samples": [samples.fingerprint for samples in found],
        "weights": list(weights),
        "tokenizer": tokenizer.fingerprint,
        "seq_len": seq_len,
        "block_tokens": packing.BLOCK_TOKENS,
        "validation": cfg.validation or cfg.validation_fraction,
        "too_long": cfg.too_long,
        "seed": cfg.seed,
    }
    with named("validation: "):
        windows = validation_windows(held, tokenizer, seq_len)
    return data_lib.Data(
        tokenizer,
        BatchStream(packers, weights, fingerprint, process_index, process_count),
        windows,
        report,
        _counts(packers, weights, tokenizer.vocab_size),
        fingerprint,
    )


def _pad_id(tokenizer: Tokenizer) -> int:
    """Any id will do: nothing sees it."""
    return tokenizer.generation_ids()["pad_token_id"] or tokenizer.eos_id


def _fitting(samples: Samples, too_long: str, room: int, report: SupervisedReport) -> np.ndarray:
    """Which samples are taken, int64 [n]; what is too long for `room` tokens goes to the report."""
    taken = np.ones(len(samples), bool)
    for i in np.flatnonzero(samples.lengths > room).tolist():
        said = f"{samples.lengths[i]} tokens"
        if too_long == "refuse":
            taken[i] = False
            report.skip(samples.name(i), f"longer than {room} tokens, refused", said)
        elif not samples[i].learned[1:room].any():
            taken[i] = False
            report.skip(samples.name(i), f"with nothing to learn in the first {room} tokens, refused", said)
        else:
            report.skip(samples.name(i), f"longer than {room} tokens, cut", said)
    report.add(samples.report)
    return np.flatnonzero(taken)


def _split(found: Sequence[Samples], fitting: Sequence[np.ndarray], fraction: float) -> list[np.ndarray]:
    """Of each source, which of the fitting samples are held out: all sources by one edge, so that a question that stands in
    two is on one side."""
    shares = [samples.shares[index] for samples, index in zip(found, fitting, strict=True)]
    if not sum(map(len, shares)):
        raise ValueError("no sample fits the window: raise data.seq_len, or set sft.too_long=cut")
    out = held_out(np.concatenate(shares), fraction)
    return np.split(out, np.cumsum([len(x) for x in shares])[:-1])


def _describe(report: SupervisedReport, packers: Sequence[SamplePacker]) -> None:
    """Fills in what an epoch has; how full windows are, by the first block of each source."""
    tokens_in_windows = 0.0
    for packer in packers:
        block = packer.block(0, 0)
        full = block.num_tokens / (len(block) * (packer.seq_len + 1))
        report.documents += len(packer.index)
        report.tokens += packer.num_tokens
        report.learned += packer.num_learned
        tokens_in_windows += packer.num_tokens / full
        report.windows += round(packer.num_tokens / full / (packer.seq_len + 1))
    report.fill = report.tokens / tokens_in_windows


def _counts(packers: Sequence[SamplePacker], weights: Sequence[float], vocab_size: int) -> np.ndarray:
    """int64 [vocab_size]: how often each id is learned, sources by weight, of the first few million tokens of each."""
    frequencies, total = [], 0
    for packer in packers:
        ids = np.concatenate(list(_labels(packer)))
        frequencies.append(np.bincount(ids, minlength=vocab_size) / len(ids))
        total += len(ids)
    return np.rint(total * np.average(frequencies, axis=0, weights=weights)).astype(np.int64)


def _labels(packer: SamplePacker) -> Iterator[np.ndarray]:
    tokens = 0
    for ids, said in packer:
        yield ids[said]
        tokens += len(ids)
        if tokens > _COUNTED_TOKENS:
            return
