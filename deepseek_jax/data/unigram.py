"""The bar any language model must clear: a unigram model that knows only how often each token occurs."""

import dataclasses
import math

import numpy as np


@dataclasses.dataclass(frozen=True)
class UnigramLoss:
    nats_per_token: float
    bits_per_byte: float


def bits_per_byte(total_nats: float, num_bytes: int) -> float:
    """Turns a summed negative log-likelihood into bits per UTF-8 byte of the text it predicts.

    Raises:
        ValueError: there is no text.
    """
    if num_bytes <= 0:
        raise ValueError(f"bits per byte need text: num_bytes is {num_bytes}")
    return total_nats / math.log(2) / num_bytes


def unigram_bits_per_byte(train_counts_v: np.ndarray, targets: np.ndarray, num_bytes: int) -> UnigramLoss:
    """Loss on `targets` of the unigram model of the training tokens, with add-one smoothing.

    Args:
        train_counts_v: int [vocab_size], how often each id occurs in training.
        targets: int, any shape, the ids to predict.
        num_bytes: UTF-8 bytes of the text of `targets`.
    """
    log_probability_v = np.log(train_counts_v + 1.0) - np.log(train_counts_v.sum() + len(train_counts_v))
    nats = -log_probability_v[targets]
    return UnigramLoss(float(nats.mean()), bits_per_byte(float(nats.sum()), num_bytes))
