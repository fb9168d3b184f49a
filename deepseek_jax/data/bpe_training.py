"""Training a tokenizer on the corpus: byte-level BPE with DeepSeek's special tokens (report §4.1).

The pre-tokenizer is the one that DeepSeek-V3's tokenizer.json declares: digits in groups of up to three, runs of
Chinese and Japanese, then words, punctuation with the line breaks that follow it, and white space.
"""

from collections.abc import Iterable

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from deepseek_jax.data import byte_level
from deepseek_jax.data.special_tokens import SPECIAL_TOKENS
from deepseek_jax.data.tokenizer import Tokenizer

MIN_VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Trains byte-level BPE; the same texts and size give the same tokenizer.

    Args:
        texts: the documents; a corpus too small for `vocab_size` merges gives fewer ids.
        vocab_size: ids in all; bos, eos and pad are 0, 1 and 2, as in DeepSeek's.

    Raises:
        ValueError: `vocab_size` leaves no room for the 256 bytes and the special tokens.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise ValueError(
            f"vocab_size {vocab_size} is too small: 256 bytes and {len(SPECIAL_TOKENS)} special tokens "
            f"need at least {MIN_VOCAB_SIZE}"
        )
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = byte_level.words()
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[
            AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS.values()
        ],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return Tokenizer(backend)
