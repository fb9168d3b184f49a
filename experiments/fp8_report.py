"""Tables and the picture of `experiments.fp8_study`."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from deepseek_jax.config import PRECISIONS, Config
from deepseek_jax.model.transformer import model_params
from deepseek_jax.precision import PRESETS
from deepseek_jax.precision.errors import (
    GEMMS,
    KINDS,
    Errors,
    accumulation_errors,
    capture,
    gemm_errors,
    synthetic,
)
from deepseek_jax.precision.weights import attach, quantise_weights
from deepseek_jax.training.loop import Trainer
from deepseek_jax.training.metrics import read_records
from deepseek_jax.training.step import losses

DEPTHS = (512, 1024, 2048, 4096, 8192, 16384)
SHAPE = (256, 1024, 512)  # m, k, n of the synthetic GEMMs
WINDOWS = 16  # validation windows of the measurements on the trained model
SMOOTHING = 0.9  # of the loss curves, as in the report's appendix B.1
OTHER_SEED = "bf16 (other seed)"  # the run that shows the noise
COLOURS = dict(zip((*PRECISIONS, OTHER_SEED), (f"C{i}" for i in range(7)), strict=True))
GOAL = 0.25  # per cent, the report's bound on the relative loss error

# Layers whose tensors are looked at: path in the parameters, dims of the weight that are its input.
WATCHED: dict[str, tuple[tuple[str, ...], int]] = {
    "attention input": (("moe_layers", "attn", "wq_a_dq"), 1),
    "attention output": (("moe_layers", "attn", "wo_hvd"), 2),
    "FFN down": (("dense_layers", "ffn", "w_down_fd"), 1),
}
Table = dict[str, dict[str, dict[str, Errors]]]  # data -> preset -> GEMM


class Trained(NamedTuple):
    """The trained bf16 model and validation windows of its data, on one device."""

    cfg: Config
    params: Any
    bias: jax.Array
    batch: dict[str, jax.Array]


def load(cfg: Config) -> Trained:
    trainer = Trainer(cfg)
    try:
        trainer.resume()
        batch = {k: jnp.asarray(v) for k, v in trainer.data.validation.subset(WINDOWS).batch.items()}
        state = jax.tree.map(jnp.asarray, jax.device_get((trainer.state.params, trainer.state.balance_bias)))
        return Trained(cfg, *state, batch)
    finally:
        trainer.close()


def captured(trained: Trained) -> dict[str, Any]:
    """What the watched layers see on two windows."""
    cfg, b = trained.cfg, 2
    batch = {k: v[:b] for k, v in trained.batch.items()}

    def loss(params):
        return losses(params, cfg, batch, trained.bias, b).main * b * cfg.data.seq_len

    return capture(loss, trained.params, WATCHED, b * cfg.data.seq_len)


def same_weights(trained: Trained) -> dict[str, tuple[float, float]]:
    """Preset -> (relative error of the loss, relative L2 error of the whole gradient), on the trained bf16 weights."""
    cfg, declared = trained.cfg, model_params(trained.cfg.model)
    scale = float(WINDOWS * cfg.data.seq_len)

    def measured(preset: str) -> tuple[float, np.ndarray]:
        policy = PRESETS[preset]

        @jax.jit
        def run(params):
            quantised = quantise_weights(params, declared, policy)

            def loss(params):
                with_policy = attach(params, quantised, policy)
                return losses(with_policy, cfg, trained.batch, trained.bias, WINDOWS).main * scale

            return jax.value_and_grad(loss)(params)

        value, grads = run(trained.params)
        return float(value), np.concatenate(
            [np.asarray(g, np.float64).ravel() for g in jax.tree.leaves(grads)]
        )

    loss, gradient = measured("bf16")
    out = {}
    for preset in PRECISIONS[1:]:
        value, g = measured(preset)
        out[preset] = (value / loss - 1, float(np.linalg.norm(g - gradient) / np.linalg.norm(gradient)))
    return out


def errors(trained: Trained) -> Table:
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


def smoothed(losses: np.ndarray) -> np.ndarray:
    """Exponential moving average with its start corrected."""
    out, total, weight = [], 0.0, 0.0
    for x in losses:
        total, weight = SMOOTHING * total + x, SMOOTHING * weight + 1
        out.append(total / weight)
    return np.array(out)


def curves(configs: dict[str, Config]) -> dict[str, np.ndarray]:
    """Smoothed training loss of each run."""
    out = {}
    for name, cfg in configs.items():
        records = read_records(Path(cfg.train.out_dir) / "metrics.jsonl")
        out[name] = smoothed(np.array([r["loss"] for r in records if r["kind"] == "train"]))
    return out


def relative_errors(loss: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Signed difference from bf16, per cent."""
    return {name: 100 * (x / loss["bf16"] - 1) for name, x in loss.items() if name != "bf16"}


def _markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in lines)


def print_tables(
    table: Table,
    accumulation: dict[str, list[float]],
    loss: dict[str, np.ndarray],
    same: dict[str, tuple[float, float]],
    validation: dict[str, float],
) -> None:
    print("\nRelative L2 error of fprop / dgrad / wgrad, per cent\n")
    rows = [
        [preset, *(" / ".join(f"{100 * table[d][preset][g].relative_l2:.2f}" for g in GEMMS) for d in table)]
        for preset in PRECISIONS
    ]
    print(_markdown(["", *table], rows))
    print("\nfprop: calc_diff; elements that underflow, elements at 448, per million\n")
    rows = []
    for preset in PRECISIONS:
        e = [table[d][preset]["fprop"] for d in table]
        rows.append(
            [preset, *(f"{x.calc_diff:.1e}; {1e6 * x.underflow:.0f}, {1e6 * x.saturated:.0f}" for x in e)]
        )
    print(_markdown(["", *table], rows))
    print("\nSums of exact products in a tensor core, relative L2 error\n")
    rows = [[name, *(f"{x:.1e}" for x in values)] for name, values in accumulation.items()]
    print(_markdown(["K", *map(str, DEPTHS)], rows))
    print(
        f"\nTraining loss against bf16, per cent, smoothed ({SMOOTHING}): last step; mean size over the last half\n"
    )
    rows = []
    for name, error in relative_errors(loss).items():
        end = 100 * (validation[name] / validation["bf16"] - 1)
        rows.append(
            [name, f"{error[-1]:+.2f}", f"{np.abs(error[len(error) // 2 :]).mean():.2f}", f"{end:+.2f}"]
        )
    print(_markdown(["", "last", "mean", "validation"], rows))
    print("\nOn the trained bf16 weights, per cent: error of the loss; relative L2 error of the gradient\n")
    rows = [
        [name, f"{100 * value:+.3f}", f"{100 * gradient:.1f}"] for name, (value, gradient) in same.items()
    ]
    print(_markdown(["", "loss", "gradient"], rows), flush=True)


def draw(
    table: Table, accumulation: dict[str, list[float]], loss: dict[str, np.ndarray], path: Path, title: str
) -> None:
    figure = Figure(figsize=(13, 10), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    grid = figure.add_gridspec(3, 2, height_ratios=[1, 1, 1.1])
    for axis, what in ((grid[0, :], "relative_l2"), (grid[1, 0], "underflow")):
        ax = figure.add_subplot(axis)
        groups = (
            [(d, g) for d in table for g in GEMMS] if what == "relative_l2" else [(d, "fprop") for d in table]
        )
        width = 0.8 / len(PRECISIONS)
        for i, preset in enumerate(PRECISIONS):
            values = [getattr(table[d][preset][g], what) for d, g in groups]
            ax.bar(np.arange(len(groups)) + i * width, values, width, label=preset, color=COLOURS[preset])
        labels = [f"{g}\n{d}" if g == "dgrad" else g for d, g in groups]
        if what == "underflow":
            labels = [d.replace(" ", "\n") for d, _ in groups]
        ax.set_xticks(np.arange(len(groups)) + 0.4 - width / 2, labels, fontsize=8)
        ax.set_yscale("log")
        ax.set_title(
            "GEMM error, relative L2" if what == "relative_l2" else "share of activations that become zero"
        )
        if what == "relative_l2":
            ax.set_ylim(top=0.3)  # room for the legend
            ax.legend(fontsize=8, ncols=len(PRECISIONS), loc="upper center")
    ax = figure.add_subplot(grid[1, 1])
    for name, values in accumulation.items():
        ax.loglog(DEPTHS, values, "--" if "promoted" in name else "-", label=name)
    ax.set_title("error of a sum in a 14-bit accumulator")
    ax.set_xlabel("contraction K")
    ax.legend(fontsize=8)
    _draw_training(figure.add_subplot(grid[2, 0]), figure.add_subplot(grid[2, 1]), loss)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _draw_training(left: Any, right: Any, loss: dict[str, np.ndarray]) -> None:
    for name, values in loss.items():
        left.plot(
            np.arange(1, len(values) + 1),
            values,
            ":" if name == OTHER_SEED else "-",
            label=name,
            color=COLOURS[name],
        )
    left.set_title("training loss, nats per token")
    left.set_xlabel("step")
    left.legend(fontsize=8)
    for name, error in relative_errors(loss).items():
        right.plot(
            np.arange(1, len(error) + 1),
            error,
            ":" if name == OTHER_SEED else "-",
            label=name,
            color=COLOURS[name],
        )
    right.axhspan(-GOAL, GOAL, color="0.9", zorder=0, label=f"within {GOAL}%")
    right.set_title("relative to bf16, per cent")
    right.set_xlabel("step")
    right.legend(fontsize=8)


def write(configs: dict[str, Config], out: Path) -> None:
    """Everything that needs no training: errors, tables, `fp8_study.png`."""
    trained = load(configs["bf16"])
    table, same = errors(trained), same_weights(trained)
    accumulation = accumulation_errors(DEPTHS, np.random.default_rng(0))
    loss = curves(configs)
    results = {
        name: json.loads((Path(cfg.train.out_dir) / "result.json").read_text())
        for name, cfg in configs.items()
    }
    print_tables(table, accumulation, loss, same, {name: r["validation"] for name, r in results.items()})
    picture = out / "fp8_study.png"
    cfg = configs["bf16"]
    title = f"FP8 study: {cfg.model.num_params():,} parameters, {cfg.train.steps} steps"
    draw(table, accumulation, loss, picture, title)
    print(f"\npicture: {picture}", flush=True)
