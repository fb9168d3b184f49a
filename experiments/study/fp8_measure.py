"""The measurements of `experiments.fp8_study`: on its finished runs, and on the model that bf16 trained."""

import contextlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.config import PRECISIONS, Config
from deepseek_jax.model.layout import single_device
from deepseek_jax.model.transformer import model_params
from deepseek_jax.model.weights import attach, quantise_weights
from deepseek_jax.precision import PRESETS
from deepseek_jax.training.drawing import smoothed
from deepseek_jax.training.gradients import value_of
from deepseek_jax.training.labels import totals
from deepseek_jax.training.loop import Trainer
from deepseek_jax.training.metrics import read_records
from deepseek_jax.training.objectives import pretraining
from deepseek_jax.training.state import Hyper
from experiments.study.errors import KINDS, Errors, capture, gemm_errors, synthetic

SHAPE = (256, 1024, 512)  # m, k, n of the synthetic GEMMs
WINDOWS = 16  # validation windows of one measurement on the trained model
GROUPS = 12  # measurements of the loss, each on other windows
SMOOTHING = 0.9  # of the loss curves, as in the report's appendix B.1

# Layers whose tensors are looked at: path in the parameters, dims of the weight that are its input.
WATCHED: dict[str, tuple[tuple[str, ...], int]] = {
    "attention input": (("moe_layers", "attn", "wq_a_dq"), 1),
    "attention output": (("moe_layers", "attn", "wo_hvd"), 2),
    "FFN down": (("dense_layers", "ffn", "w_down_fd"), 1),
}
Table = dict[str, dict[str, dict[str, Errors]]]  # data -> preset -> GEMM
Runs = dict[str, list[Config]]  # preset -> config of each seed


class Mean(NamedTuple):
    """A mean and its standard error."""

    value: float
    error: float


def mean(samples: Any) -> Mean:
    x = np.asarray(samples, np.float64)
    return Mean(float(x.mean()), float(x.std(ddof=1) / np.sqrt(len(x))))


# --- training curves ----------------------------------------------------------------------------------------


class Curves(NamedTuple):
    """Curves of one preset. loss [seed, step] is the smoothed training loss, validation [seed] the loss at the end."""

    loss: np.ndarray
    validation: np.ndarray


def result_file(cfg: Config) -> Path:
    return Path(cfg.train.out_dir) / "result.json"


def _training_loss(cfg: Config) -> np.ndarray:
    records = read_records(Path(cfg.train.out_dir) / "metrics.jsonl")
    return smoothed(np.array([r["loss"] for r in records if r["kind"] == "train"]), SMOOTHING)


def curves(runs: Runs) -> dict[str, Curves]:
    found = {}
    for preset, configs in runs.items():
        validation = [json.loads(result_file(cfg).read_text())["validation"] for cfg in configs]
        found[preset] = Curves(np.stack([*map(_training_loss, configs)]), np.array(validation))
    return found


def relative(values: np.ndarray, of: np.ndarray) -> np.ndarray:
    """Returns the signed difference in per cent."""
    return 100 * (values / of - 1)


def noise(curves: dict[str, Curves]) -> np.ndarray:
    """Returns how far one bf16 run lies from another seed's, per cent [pair, step]."""
    loss = curves["bf16"].loss
    return np.stack([relative(loss[j], loss[i]) for i in range(len(loss)) for j in range(i + 1, len(loss))])


# --- on the trained model -----------------------------------------------------------------------------------


class Trained(NamedTuple):
    """A trained bf16 model and validation windows of its data, on one device."""

    cfg: Config
    params: Any
    bias: jax.Array
    batch: dict[str, jax.Array]


def load(cfg: Config) -> Trained:
    with contextlib.closing(Trainer(cfg)) as trainer:
        trainer.resume()
        windows = trainer.data.validation.subset(GROUPS * WINDOWS)
        batch = {k: jnp.asarray(v) for k, v in windows.batch.items()}
        state = jax.device_get((trainer.state.params, trainer.state.balance_bias))
        params, bias = jax.tree.map(jnp.asarray, state)
        return Trained(cfg, params, bias, batch)


def _windows(trained: Trained, first: int, count: int) -> dict[str, jax.Array]:
    return {k: v[first : first + count] for k, v in trained.batch.items()}


def _loss(params: Any, trained: Trained, windows: dict[str, jax.Array]) -> jax.Array:
    """The main model's, nats per token."""
    cfg, total = trained.cfg, totals(trained.cfg, windows, len(windows["tokens"]))
    value = value_of(cfg, single_device(cfg.train.remat), pretraining(cfg))
    _, parts = value(params, windows, trained.bias, total, Hyper(*jnp.zeros(3)))
    return parts.metrics["loss"]


def captured(trained: Trained) -> dict[str, Any]:
    """Returns what the watched layers see on two windows."""
    cfg, b = trained.cfg, 2

    def loss(params):
        windows = _windows(trained, 0, b)
        return _loss(params, trained, windows) * b * cfg.data.seq_len

    return capture(loss, trained.params, WATCHED, b * cfg.data.seq_len)


class SameWeights(NamedTuple):
    """Errors against bf16 in per cent: the signed one of the loss over groups of windows, relative L2 of the gradient."""

    loss: Mean
    gradient: float


def same_weights(trained: Trained) -> dict[str, SameWeights]:
    """Measures loss and gradient of each preset on the same weights."""
    cfg, declared = trained.cfg, model_params(trained.cfg.model)
    scale = float(WINDOWS * cfg.data.seq_len)  # of the backward pass, as in `training/gradients.py`
    groups = len(trained.batch["tokens"]) // WINDOWS

    def measured(preset: str) -> tuple[np.ndarray, np.ndarray]:
        policy = PRESETS[preset]

        @jax.jit
        def run(params, batch):
            quantised = quantise_weights(params, declared, policy)

            def loss(params):
                with_policy = attach(params, quantised, policy)
                return _loss(with_policy, trained, batch) * scale

            return jax.value_and_grad(loss)(params)

        runs = (run(trained.params, _windows(trained, i * WINDOWS, WINDOWS)) for i in range(groups))
        first, grads = next(runs)
        gradient = np.concatenate([np.asarray(g, np.float64).ravel() for g in jax.tree.leaves(grads)])
        return np.array([float(first), *(float(value) for value, _ in runs)]), gradient

    loss, gradient = measured("bf16")
    out = {}
    for preset in PRECISIONS[1:]:
        values, g = measured(preset)
        distance = float(np.linalg.norm(g - gradient) / np.linalg.norm(gradient))
        out[preset] = SameWeights(mean(relative(values, loss)), 100 * distance)
    return out


def errors(trained: Trained) -> Table:
    """Measures GEMM errors on synthetic and captured tensors."""
    m, k, n = SHAPE
    rng = np.random.default_rng(0)
    data = {
        kind: (
            synthetic(kind, rng, m, k),
            synthetic("gaussian", rng, k, n) / k**0.5,
            synthetic(kind, rng, m, n),
        )
        for kind in KINDS
    } | captured(trained)
    return {
        name: {preset: gemm_errors(PRESETS[preset], *tensors) for preset in PRECISIONS}
        for name, tensors in data.items()
    }
