"""Fill-in-the-middle (report §4.1): the Prefix-Suffix-Middle form, on whole documents, before packing.

    <|fim_begin|> prefix <|fim_hole|> suffix <|fim_end|> middle <|eos|>

The two cuts fall between any two characters, so that the model learns to continue from the middle of a word.
"""

import numpy as np

from deepseek_jax.data.tokenizer import Tokenizer

_CHOICE, _CUTS = 101, 102  # keep the random streams of one epoch apart


def choose_documents(num_documents: int, rate: float, seed: int, epoch: int, block: int = 0) -> np.ndarray:
    """Places int64 [n] in a block of an epoch whose documents take FIM form; each with probability `rate`."""
    rng = np.random.default_rng((_CHOICE, seed, epoch, block))
    return np.flatnonzero(rng.random(num_documents) < rate)


def split_document(text: str, seed: int, epoch: int, index: int) -> tuple[str, str, str]:
    """Cuts document `index` at two random characters into (prefix, middle, suffix); parts may be empty."""
    rng = np.random.default_rng((_CUTS, seed, epoch, index))
    first, second = np.sort(rng.integers(0, len(text), size=2, endpoint=True))
    return text[:first], text[first:second], text[second:]


def fim_documents(
    texts: list[str], indices: list[int], tokenizer: Tokenizer, seed: int, epoch: int
) -> list[np.ndarray]:
    """Ids, int32, of documents in PSM form.

    Args:
        texts: plain documents.
        indices: their numbers in the corpus, which with seed and epoch decide the cuts.

    Raises:
        ValueError: the tokenizer lacks a FIM token.
    """
    begin, hole, end = tokenizer.fim_begin_id, tokenizer.fim_hole_id, tokenizer.fim_end_id
    parts: list[str] = []
    for text, index in zip(texts, indices, strict=True):
        parts += split_document(text, seed, epoch, index)
    encoded = tokenizer.encode_batch(parts)
    return [
        np.array([begin, *prefix, hole, *suffix, end, *middle, tokenizer.eos_id], np.int32)
        for prefix, middle, suffix in zip(encoded[0::3], encoded[1::3], encoded[2::3], strict=True)
    ]


def fim_prompt(prefix: str, suffix: str, tokenizer: Tokenizer) -> list[int]:
    """Ids after which a model continues with the middle, then eos."""
    prefix_ids, suffix_ids = tokenizer.encode_batch([prefix, suffix])
    return [tokenizer.fim_begin_id, *prefix_ids, tokenizer.fim_hole_id, *suffix_ids, tokenizer.fim_end_id]
