"""A tokenizer trained on the corpus, kept in the cache."""

import functools
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from deepseek_jax.data import cache
from deepseek_jax.data.bpe_training import train_tokenizer
from deepseek_jax.data.corpus import Corpus
from deepseek_jax.data.encoding import split_text
from deepseek_jax.data.token_cache import corpus_key
from deepseek_jax.data.tokenizer import Tokenizer

SAMPLE_CHARS = 1 << 28  # about so many characters are trained on


def trained_tokenizer(
    corpora: Sequence[Corpus], weights: Sequence[float], vocab_size: int, cache_dir: Path
) -> Tokenizer:
    """The tokenizer of a bounded sample of the corpora, each by its weight; trained where `cache_dir` has none."""
    texts = functools.partial(_sample, corpora, [weight / sum(weights) for weight in weights])

    def make(folder: Path) -> cache.Meta:
        digest = hashlib.sha256()
        train_tokenizer(texts(digest), vocab_size).save(folder / "tokenizer.json")
        return {"sample": digest.hexdigest()}

    def renewed(_files: cache.Files, meta: cache.Meta) -> cache.Meta | None:
        digest = hashlib.sha256()
        for _ in texts(digest):
            pass
        return meta if digest.hexdigest() == meta["sample"] else None

    keys = "".join(corpus_key(corpus, weight) for corpus, weight in zip(corpora, weights, strict=True))
    name = hashlib.sha256(keys.encode()).hexdigest()[:16]
    return cache.open_entry(
        cache_dir / f"tokenizer-{name}-{vocab_size}",
        [file for corpus in corpora for file in corpus.files],
        what=f"training a tokenizer on {', '.join(corpus.source for corpus in corpora)}",
        files_now=lambda: [file for corpus in corpora for file in corpus.files_now()],
        load=lambda folder, _: Tokenizer.load(folder / "tokenizer.json"),
        renewed=renewed,
        make=make,
    )


def _sample(corpora: Sequence[Corpus], shares: Sequence[float], digest: Any) -> Iterator[str]:
    """Pieces of the sampled texts; `digest`, of hashlib, takes in each text."""
    for corpus, share in zip(corpora, shares, strict=True):
        for text in corpus.sample(int(SAMPLE_CHARS * share)):
            digest.update(hashlib.sha256(text.encode()).digest())
            yield from split_text(text)
