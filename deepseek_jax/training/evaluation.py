"""The loss of a model on validation windows, over the mesh of a training run."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from deepseek_jax import now
from deepseek_jax.data.unigram import bits_per_byte
from deepseek_jax.data.validation import Validation
from deepseek_jax.parallel.processes.together import on_host
from deepseek_jax.training.feeding import Feed

_WINDOWS = 16  # at once, where the devices are not more


class Evaluation(NamedTuple):
    """On the validation windows: nats per token, bits per byte."""

    loss: float
    bits_per_byte: float


def evaluate(
    eval_fn: Callable[..., Any], params: Any, bias: jax.Array, windows: Validation, feed: Feed
) -> Evaluation:
    """Of parameters laid out for `eval_fn`, which `passes.make_eval_step` made. All processes call it."""
    size = feed.shards * max(1, _WINDOWS // feed.shards)
    found: list[list[np.ndarray]] = []  # nats and labels of each window
    with now.doing("evaluating"):
        for start in range(0, len(windows), size):
            batch = {name: x[start : start + size] for name, x in windows.batch.items()}
            have = len(batch["tokens"])
            batch = {name: np.pad(x, ((0, size - have), (0, 0)), "edge") for name, x in batch.items()}
            found.append([on_host(x)[:have] for x in eval_fn(params, bias, feed.put_whole(batch))])
    nats, labels = (float(np.concatenate(x).astype(np.float64).sum()) for x in zip(*found, strict=True))
    return Evaluation(nats / labels, bits_per_byte(nats, windows.num_bytes))
