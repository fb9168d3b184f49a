"""Text in, batches out (report §4.1): corpus, tokenizer, FIM, packing, loading.

data = load(config.data, mtp_depth=1)
batch = data.train.take(64)          # {"tokens": int32[64, seq_len + 1 + mtp_depth]}
checkpoint = data.train.state()      # JSON; data.train.restore(checkpoint) goes on from there
"""

import dataclasses
from pathlib import Path

import numpy as np

from deepseek_jax.config import DataConfig
from deepseek_jax.data.bpe_training import train_tokenizer
from deepseek_jax.data.corpus import TRAIN, VALIDATION, Corpus
from deepseek_jax.data.loader import BatchStream
from deepseek_jax.data.packing import EpochPacker, PackedStream
from deepseek_jax.data.readers import CorpusReport
from deepseek_jax.data.streaming import StreamDecoder
from deepseek_jax.data.token_cache import TokenizedDocuments, split_text, tokenize
from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.data.unigram import UnigramLoss, bits_per_byte, unigram_bits_per_byte

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


# Validation windows are held in memory; of a larger split, windows spread evenly over it.
MAX_VALIDATION_TOKENS = 1 << 23


@dataclasses.dataclass(frozen=True)
class Validation:
    """Fixed windows of the validation documents: plain text in order, no FIM, nothing random.

    All windows of a split up to `MAX_VALIDATION_TOKENS`, else that many tokens, spread evenly over it.

    Attributes:
        batch: "tokens" int32 [n, seq_len + 1 + mtp_depth]; with segments also "segments" and "positions".
        bytes_n: int64 [n], UTF-8 bytes of the seq_len tokens that the main model predicts in each window,
            `tokens[:, 1 : seq_len + 1]`; special tokens count none.
        seq_len: inputs of a window.
    """

    batch: dict[str, np.ndarray]
    bytes_n: np.ndarray
    seq_len: int

    def __len__(self) -> int:
        return len(self.bytes_n)

    @property
    def tokens(self) -> np.ndarray:
        return self.batch["tokens"]

    @property
    def targets(self) -> np.ndarray:
        """int32 [n, seq_len]: what the main model predicts."""
        return self.tokens[:, 1 : self.seq_len + 1]

    @property
    def num_bytes(self) -> int:
        return int(self.bytes_n.sum())

    def subset(self, max_windows: int) -> "Validation":
        """At most `max_windows` windows, spread evenly over all: the same ones every time."""
        if max_windows >= len(self):
            return self
        if max_windows < 1:
            raise ValueError(f"max_windows must be at least 1, got {max_windows}")
        chosen = np.arange(max_windows) * len(self) // max_windows
        batch = {name: array[chosen] for name, array in self.batch.items()}
        return Validation(batch, self.bytes_n[chosen], self.seq_len)


@dataclasses.dataclass(frozen=True)
class Data:
    """A corpus ready for training.

    Attributes:
        tokenizer: trained or loaded.
        train: the stream of training batches.
        validation: fixed windows.
        report: what was read, and what was skipped and why.
        train_counts_v: int64 [vocab_size], token counts of the plain training documents.
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
        return unigram_bits_per_byte(self.train_counts_v, validation.targets, validation.num_bytes)


def load(cfg: DataConfig, mtp_depth: int, process_index: int = 0, process_count: int = 1) -> Data:
    """Reads the corpus, trains or loads the tokenizer, and opens the training stream.

    The first call on a corpus trains and encodes, and leaves both results in `cfg.cache_dir`; later calls
    only read the corpus through once, to know that it is the same.

    Args:
        cfg: see `DataConfig`. `vocab_size` is the size to train, or the most a loaded tokenizer may have.
        mtp_depth: number of MTP modules; each needs one more target per position.
        process_index, process_count: this host among all hosts; each reads only its rows.

    Raises:
        ValueError: nothing readable, a tokenizer that does not fit, too little text, or a bad setting.
    """
    corpus = Corpus(cfg.source, cfg.validation, cfg.text_field, cfg.validation_fraction)
    cache_dir = Path(cfg.cache_dir).expanduser()
    tokenizer = _tokenizer(cfg, corpus, cache_dir)
    train = _documents(corpus, TRAIN, tokenizer, cache_dir)
    packer = EpochPacker(
        train,
        tokenizer,
        seq_len=cfg.seq_len,
        mtp_depth=mtp_depth,
        fim_rate=cfg.fim_rate,
        split_punctuation_rate=cfg.split_punctuation_rate,
        segments=cfg.segments,
        seed=cfg.seed,
    )
    packer.in_order()  # too little text is an error now, not at the first batch
    held_out = dataclasses.replace(packer, documents=_documents(corpus, VALIDATION, tokenizer, cache_dir))
    try:
        validation = _validation(held_out.in_order(), tokenizer, cfg.seq_len)
    except ValueError as error:
        raise ValueError(
            f"validation: {error}, or raise validation_fraction ({cfg.validation_fraction})"
        ) from error
    fingerprint = {
        "corpus": corpus.fingerprint(TRAIN),
        "tokenizer": tokenizer.fingerprint,
        "seq_len": cfg.seq_len,
        "mtp_depth": mtp_depth,
        "fim_rate": cfg.fim_rate,
        "split_punctuation_rate": cfg.split_punctuation_rate,
        "segments": cfg.segments,
        "seed": cfg.seed,
    }
    stream = BatchStream(packer, fingerprint, process_index, process_count)
    counts_v = train.counts(tokenizer.vocab_size)
    return Data(tokenizer, stream, validation, corpus.report, counts_v, fingerprint)


def _tokenizer(cfg: DataConfig, corpus: Corpus, cache_dir: Path) -> Tokenizer:
    if cfg.tokenizer is not None:
        tokenizer = Tokenizer.load(cfg.tokenizer)
        if tokenizer.vocab_size > cfg.vocab_size:
            raise ValueError(
                f"the tokenizer {cfg.tokenizer} has {tokenizer.vocab_size} ids, vocab_size is "
                f"{cfg.vocab_size}: set vocab_size to {tokenizer.vocab_size} or more"
            )
        return tokenizer
    cached = cache_dir / f"tokenizer-{corpus.fingerprint(TRAIN)}-{cfg.vocab_size}.json"
    if cached.exists():
        try:
            return Tokenizer.load(cached)
        except ValueError:
            pass  # damaged: train it again
    texts = (piece for document in corpus.documents(TRAIN) for piece in split_text(document.text))
    tokenizer = train_tokenizer(texts, cfg.vocab_size)
    tokenizer.save(cached)
    return tokenizer


def _documents(corpus: Corpus, split: str, tokenizer: Tokenizer, cache_dir: Path) -> TokenizedDocuments:
    texts = (document.text for document in corpus.documents(split))
    return tokenize(texts, tokenizer, cache_dir, corpus.fingerprint(split))


def _validation(stream: PackedStream, tokenizer: Tokenizer, seq_len: int) -> Validation:
    num_windows = min(len(stream), max(1, MAX_VALIDATION_TOKENS // seq_len))
    windows = [stream[i * len(stream) // num_windows] for i in range(num_windows)]
    batch = {name: np.stack([window[name] for window in windows]) for name in windows[0]}
    bytes_n = tokenizer.byte_lengths()[batch["tokens"][:, 1 : seq_len + 1]].sum(axis=1, dtype=np.int64)
    return Validation(batch, bytes_n, seq_len)
