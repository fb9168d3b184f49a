"""Conversations in, batches out: the data of supervised fine-tuning (report section 5.1).

    data = load(config.sft, tokenizer, seq_len=4096, cache_dir=Path(".cache"))
    batch = data.train.take(64)     # "tokens", "segments", "positions", "loss_mask", "padding", each [64, 4097]

Rows become samples (conversations.py), kept on disk (sample_cache.py), packed whole into windows (best_fit.py), and handed
out by the stream of pre-training (loader.py): several sources by weight, resumable, each process its own rows.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from deepseek_jax import data as data_lib
from deepseek_jax.checks import choice, ranges, require
from deepseek_jax.config import SEEDS
from deepseek_jax.data import packing
from deepseek_jax.data.best_fit import PackedSamples, SamplePacker
from deepseek_jax.data.conversations import LEARN
from deepseek_jax.data.held_out import FRACTION, those_held_out
from deepseek_jax.data.loader import BatchStream
from deepseek_jax.data.report import CorpusReport
from deepseek_jax.data.sample_cache import Samples, samples_of
from deepseek_jax.data.sources import weighted
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
    validation_fraction: float = FRACTION  # share of the questions held out, if `validation` is None
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


@dataclasses.dataclass
class SupervisedReport(CorpusReport):
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
    report, pad = SupervisedReport(), tokenizer.eos_id  # any id will do for padding: nothing sees it

    def read(source: str) -> _Source:
        samples = samples_of(source, tokenizer, cfg.learn, cache_dir)
        return _Source(samples, _fitting(samples, cfg.too_long, seq_len + 1, report))

    found = [read(source) for source in sources]
    if cfg.validation:
        held = [read(cfg.validation)]
        train = [_without_questions_of(held[0], source, report) for source in found]
    else:
        train, held = _split(found, cfg.validation_fraction)
    for source, one in zip(sources, train, strict=True):
        require(len(one.taken) > 0, f"{source}: no sample is left for training{report.reasons()}")
    require(any(len(one.taken) for one in held), f"validation: no sample is left{report.reasons()}")
    packers = [SamplePacker(*one, seq_len, pad, cfg.seed) for one in train]
    _describe(report, packers)
    fingerprint: dict[str, object] = {
        "samples": [one.samples.fingerprint for one in found],
        "validation": held[0].samples.fingerprint if cfg.validation else cfg.validation_fraction,
        "weights": list(weights),
        "tokenizer": tokenizer.fingerprint,
        "seq_len": seq_len,
        "block_tokens": packing.BLOCK_TOKENS,
        "too_long": cfg.too_long,
        "seed": cfg.seed,
    }
    windows = validation_windows([PackedSamples(*one, seq_len, pad) for one in held], tokenizer, seq_len)
    stream = BatchStream(packers, weights, fingerprint, process_index, process_count)
    counts_v = _counts(packers, weights, tokenizer.vocab_size)
    return data_lib.Data(tokenizer, stream, windows, report, counts_v, fingerprint)


class _Source(NamedTuple):
    """taken: int64 [n], which of the samples."""

    samples: Samples
    taken: np.ndarray

    @property
    def shares(self) -> np.ndarray:
        return self.samples.shares[self.taken]


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


def _split(found: Sequence[_Source], fraction: float) -> tuple[list[_Source], list[_Source]]:
    """For training and held out, all sources by one edge: a question that stands in two is on one side."""
    shares = np.concatenate([one.shares for one in found])
    require(len(shares) > 0, "no sample fits the window: raise data.seq_len, or set sft.too_long=cut")
    sides = np.split(those_held_out(shares, fraction), np.cumsum([len(one.taken) for one in found])[:-1])
    pairs = list(zip(found, sides, strict=True))
    return [one._replace(taken=one.taken[~out]) for one, out in pairs], [
        one._replace(taken=one.taken[out]) for one, out in pairs
    ]


def _without_questions_of(held: _Source, source: _Source, report: CorpusReport) -> _Source:
    """The samples whose question is not one of validation."""
    out = np.isin(source.shares, held.shares)
    for i in source.taken[out].tolist():
        report.skip(source.samples.name(i), "that ask what validation asks, left out")
    return source._replace(taken=source.taken[~out])


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
