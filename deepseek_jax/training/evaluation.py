"""The loss of a model on validation windows, over the mesh of a training run."""

from collections.abc import Callable, Mapping
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


EvalFn = Callable[..., Any]  # what `passes.make_eval_step` makes


def evaluate(eval_fn: EvalFn, params: Any, bias: jax.Array, windows: Validation, feed: Feed) -> Evaluation:
    """Of parameters laid out for `eval_fn`. All processes call it."""
    with now.doing("evaluating"):
        found = nats_and_labels(eval_fn, params, bias, windows.batch, feed)
    nats, labels = (float(x.astype(np.float64).sum()) for x in found)
    return Evaluation(nats / labels, bits_per_byte(nats, windows.num_bytes))


def nats_and_labels(
    eval_fn: EvalFn, params: Any, bias: jax.Array, windows: Mapping[str, np.ndarray], feed: Feed
) -> tuple[np.ndarray, np.ndarray]:
    """Of each window [n, ...], float32 [n]: nats of its labels that count, and how many these are. All processes call it."""
    size = feed.shards * max(1, _WINDOWS // feed.shards)
    found: list[list[np.ndarray]] = []
    for start in range(0, len(windows["tokens"]), size):
        batch = {name: x[start : start + size] for name, x in windows.items()}
        have = len(batch["tokens"])
        batch = {name: np.pad(x, ((0, size - have), (0, 0)), "edge") for name, x in batch.items()}
        found.append([on_host(x)[:have] for x in eval_fn(params, bias, feed.put_whole(batch))])
    nats, labels = (np.concatenate(x) for x in zip(*found, strict=True))
    return nats, labels
