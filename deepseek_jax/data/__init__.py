"""Text in, batches out (report §4.1): corpus, tokenizer, FIM, packing, loading.

data = load(config.data)
batch = data.train.take(64)          # {"tokens": int32[64, seq_len + 1]}
checkpoint = data.train.state()      # JSON; data.train.restore(checkpoint) goes on from there
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from deepseek_jax import now
from deepseek_jax.checks import named
from deepseek_jax.config import DataConfig
from deepseek_jax.data import packing
from deepseek_jax.data.bpe_training import train_tokenizer
from deepseek_jax.data.corpus import Corpus
from deepseek_jax.data.loader import BatchStream
from deepseek_jax.data.packing import EpochPacker, PackedStream
from deepseek_jax.data.report import CorpusReport
from deepseek_jax.data.streaming import StreamDecoder
from deepseek_jax.data.token_cache import TokenizedDocuments, encode_corpus
from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.data.tokenizer_cache import trained_tokenizer
from deepseek_jax.data.unigram import UnigramLoss, bits_per_byte, unigram_bits_per_byte
from deepseek_jax.data.validation import Validation, validation_windows

__all__ = [
    "BatchStream",
    "Corpus",
    "CorpusReport",
    "Data",
    "StreamDecoder",
    "Tokenizer",
    "UnigramLoss",
    "Validation",
    "bits_per_byte",
    "load",
    "train_tokenizer",
]

# What of a `DataConfig` decides the windows of a stream of documents.
_OF_STREAM = ("seq_len", "fim_rate", "split_punctuation_rate", "segments", "seed")


@dataclasses.dataclass(frozen=True)
class Data:
    """A corpus ready for training.

    Attributes:
        tokenizer: trained or loaded.
        train: the stream of training batches.
        validation: fixed windows.
        report: what was read, and what was skipped and why.
        train_counts_v: int64 [vocab_size], token counts of the plain training documents, sources weighted.
        fingerprint: what the stream's state is checked against.
    """

    tokenizer: Tokenizer
    train: BatchStream
    validation: Validation
    report: CorpusReport
    train_counts_v: np.ndarray
    fingerprint: dict[str, object]

    def unigram(self, validation: Validation | None = None) -> UnigramLoss:
        """Loss of the unigram model of the training documents on `validation`, by default all of it."""
        validation = self.validation if validation is None else validation
        targets = validation.targets[validation.counted]
        return unigram_bits_per_byte(self.train_counts_v, targets, validation.num_bytes)


def load(cfg: DataConfig, process_index: int = 0, process_count: int = 1) -> Data:
    """Opens the training stream of a corpus.

    The first call reads a sample, to train the tokenizer on, and then the corpus, once, and leaves tokenizer and ids
    in `cfg.cache_dir`. Later calls, in any process, compare the files' names, sizes and times and read nothing else,
    so that they take as long for a large corpus as for a small one.

    Args:
        cfg: see `DataConfig`. `vocab_size` is the size to train, or the most a loaded tokenizer may have.
        process_index, process_count: this host among all hosts; each reads only its rows.

    Raises:
        ValueError: nothing readable, a tokenizer that does not fit, too little text, or a bad setting.
    """
    sources, weights = zip(*cfg.weighted_sources(), strict=True)
    fraction = None if cfg.validation else cfg.validation_fraction
    with now.doing("looking through the files"):
        corpora = [Corpus(source, cfg.text_field, fraction, left_out=cfg.validation) for source in sources]
        held_out = [Corpus(cfg.validation, cfg.text_field, None)] if cfg.validation else []

    cache_dir = Path(cfg.cache_dir).expanduser()
    tokenizer = _tokenizer(cfg, corpora, weights, cache_dir)
    encoded = [encode_corpus(corpus, tokenizer, cache_dir) for corpus in (*corpora, *held_out)]
    train = [found.train for found in encoded[: len(corpora)]]
    validation = [encoded[-1].train] if held_out else [found.validation for found in encoded]

    packers = [_packer(cfg, source, part, tokenizer) for source, part in zip(sources, train, strict=True)]
    fingerprint = {
        "corpus": [found.fingerprint for found in encoded[: len(corpora)]],
        "weights": list(weights),
        "tokenizer": tokenizer.fingerprint,
        "block_tokens": packing.BLOCK_TOKENS,
        **{name: getattr(cfg, name) for name in _OF_STREAM},
    }
    report = CorpusReport()
    for found in encoded:
        report.add(found.report)
    return Data(
        tokenizer,
        BatchStream(packers, weights, fingerprint, process_index, process_count),
        _validation(cfg, validation, tokenizer),
        report,
        _mixed_counts(train, weights),
        fingerprint,
    )


def _tokenizer(
    cfg: DataConfig, corpora: Sequence[Corpus], weights: Sequence[float], cache_dir: Path
) -> Tokenizer:
    if cfg.tokenizer is None:
        return trained_tokenizer(corpora, weights, cfg.vocab_size, cache_dir)
    tokenizer = Tokenizer.load(cfg.tokenizer)
    if tokenizer.vocab_size > cfg.vocab_size:
        raise ValueError(
            f"the tokenizer {cfg.tokenizer} has {tokenizer.vocab_size} ids, vocab_size is "
            f"{cfg.vocab_size}: set vocab_size to {tokenizer.vocab_size} or more"
        )
    return tokenizer


def _packer(cfg: DataConfig, source: str, documents: TokenizedDocuments, tokenizer: Tokenizer) -> EpochPacker:
    with named(f"{source}: "):
        return EpochPacker(documents, tokenizer, **{name: getattr(cfg, name) for name in _OF_STREAM})


def _validation(cfg: DataConfig, documents: Sequence[TokenizedDocuments], tokenizer: Tokenizer) -> Validation:
    streams = [PackedStream(part, cfg.seq_len, cfg.segments) for part in documents]
    with named("validation: ", f", or raise validation_fraction ({cfg.validation_fraction})"):
        return validation_windows(streams, tokenizer, cfg.seq_len)


def _mixed_counts(documents: Sequence[TokenizedDocuments], weights: Sequence[float]) -> np.ndarray:
    """int64 [vocab_size]: the counts of as many tokens as the documents have, drawn by the weights."""
    frequencies = [part.counts_v / len(part.ids) for part in documents]
    tokens = sum(len(part.ids) for part in documents)
    return np.rint(tokens * np.average(frequencies, axis=0, weights=weights)).astype(np.int64)
