"""Random conversations for a tiny model, packed and alone, and their loss and gradient by one program.

The program takes four windows at a time, with the totals of the batch that they are of: so packed windows, samples alone, and
any micro-batches of them run in it, and their sums are what is compared.
"""

import functools
from typing import Any

import jax
import numpy as np

from deepseek_jax.data.best_fit import PackedSamples
from deepseek_jax.data.conversations import Sample
from deepseek_jax.data.report import CorpusReport
from deepseek_jax.data.sample_cache import Samples
from deepseek_jax.model.layout import single_device
from deepseek_jax.training.gradients import value_of
from deepseek_jax.training.labels import Totals, targets
from deepseek_jax.training.objectives import pretraining
from tests.tiny_run import HYPER, tiny

ROWS = 4  # windows at a time
# float32 sums in another order: P11 asks for 1e-6 of the norm
REORDERED = 1e-6
# A MoE layer and an MTP module, with clear preferences of the router, so that rounding decides no selection; no sequence-wise
# loss, whose sequences are windows.
CFG = tiny(
    model={"initializer_range": 0.2, "num_hidden_layers": 1, "first_k_dense_replace": 0},
    balance={"mode": "none"},
    optimizer={"moment_dtype": "float32", "clip_norm": 1e9},
)


def conversations(rng: np.random.Generator, count: int, longest: int = CFG.data.seq_len + 1) -> list[Sample]:
    """Of 2 to `longest` tokens, with one or several answers."""
    found = []
    for length in rng.integers(2, longest + 1, count):
        learned = np.repeat(rng.random(length) < 0.5, 3)[:length]
        learned[0], learned[-1] = False, True
        found.append(Sample(rng.integers(0, CFG.model.vocab_size, length, np.int32), learned))
    return found


def as_samples(found: list[Sample]) -> Samples:
    starts = np.cumsum([0, *(len(one.ids) for one in found)])
    return Samples(
        ids=np.concatenate([one.ids for one in found]),
        learned=np.concatenate([one.learned for one in found]),
        starts=starts,
        labels=np.array([one.learned.sum() for one in found]),
        rows=np.zeros((len(found), 2), np.int64),
        shares=np.zeros(len(found)),
        files=("random",),
        fingerprint="",
        report=CorpusReport(),
    )


def _stacked(windows: list[dict[str, np.ndarray]], rows: int) -> dict[str, np.ndarray]:
    """Arrays [n, w], n the next multiple of `rows`: the last windows are nothing but padding."""
    width = len(windows[0]["tokens"])
    empty = {name: np.zeros(width, x.dtype) for name, x in windows[0].items()}
    empty["padding"] = np.ones(width, bool)
    whole = windows + [empty] * (-len(windows) % rows)
    return {name: np.stack([one[name] for one in whole]) for name in empty}


def packed(found: list[Sample], rows: int = ROWS) -> dict[str, np.ndarray]:
    """As fine-tuning has them: whole samples, best fit, several in a window."""
    samples = as_samples(found)
    windows = PackedSamples(samples, np.arange(len(samples)), CFG.data.seq_len, 0)
    return _stacked([windows[i] for i in range(len(windows))], rows)


def alone(found: list[Sample], rows: int = ROWS) -> dict[str, np.ndarray]:
    """Each sample in a window of its own."""
    samples = as_samples(found)
    windows = [PackedSamples(samples, np.array([i]), CFG.data.seq_len, 0)[0] for i in range(len(samples))]
    return _stacked(windows, rows)


def labels_of(batch: dict[str, np.ndarray]) -> np.ndarray:
    """int [depths]: labels that count, of the main model and of each MTP depth."""
    t, depths = CFG.data.seq_len, 1 + CFG.model.num_nextn_predict_layers
    return np.array([int(targets(batch, t, depth)[1].sum()) for depth in range(depths)])


@functools.cache
def _program():
    value = value_of(CFG, single_device(), pretraining(CFG))

    def run(params, bias, batch, labels, mtp_lambda):
        totals = Totals(float(ROWS), tuple(labels), 1, float(ROWS))
        return value(params, batch, bias, totals, HYPER._replace(mtp_lambda=mtp_lambda))

    return jax.jit(jax.grad(run, has_aux=True))


def loss_and_gradient(
    params: Any, bias: Any, batch: dict, labels: Any = None, mtp_lambda: Any = HYPER.mtp_lambda
):
    """({metric: float}, gradient) of a batch of any number of windows, four at a time. labels: what its sums are divided by;
    its own, if None."""
    labels = np.asarray(labels_of(batch) if labels is None else labels, np.float32)
    parts = []
    for first in range(0, len(batch["tokens"]), ROWS):
        part = {name: x[first : first + ROWS] for name, x in batch.items()}
        grads, found = _program()(params, bias, part, labels, np.float32(mtp_lambda))
        parts.append((found.metrics, found.counts_le, grads))
    metrics, counts, grads = jax.tree.map(lambda *x: sum(np.asarray(one, np.float64) for one in x), *parts)
    return metrics | {"counts": counts}, grads


def apart(got: Any, want: Any) -> float:
    """The largest distance of two arrays of a tree, as a share of the norm of the second."""
    return max(_share(x, y) for x, y in zip(*map(jax.tree.leaves, (got, want)), strict=True))


def apart_in_all(got: Any, want: Any) -> float:
    """The distance of two trees, as a share of the norm of the second."""
    x, y = (np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)]) for tree in (got, want))
    return _share(x, y)


def _share(x: Any, y: Any) -> float:
    return float(np.linalg.norm(x - y) / max(np.linalg.norm(y), 1e-30))
