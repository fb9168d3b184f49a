"""The picture of a run: drawn from real metrics files, complete or sparse, and it shows what they hold."""

import numpy as np
import pytest
from matplotlib.image import imread

from deepseek_jax.training.metrics import MetricsWriter
from deepseek_jax.training.report import write_report


def make_metrics(directory, steps=60, layers=3, experts=16, moe=True):
    rng = np.random.default_rng(0)
    writer = MetricsWriter(directory)
    for step in range(1, steps + 1):
        record = {"loss": 2 + 6 * np.exp(-step / 15), "mtp_loss": 2.5 + 6 * np.exp(-step / 15)}
        if moe:
            counts = rng.poisson(64 * rng.gamma(2 + step, 1 / (2 + step), (layers, experts)))
            record |= {"expert_counts": counts, "max_vio": counts.max(-1) / counts.mean(-1) - 1}
        if step == 30:
            record["loss"] = float("nan")
        writer.write("train", step, record)
        if step % 20 == 0:
            writer.write("eval", step, {"loss": 2.2 + 6 * np.exp(-step / 15)})
    writer.close()
    return writer.path


def test_draws_every_panel(tmp_path):
    png = tmp_path / "out" / "report.png"
    write_report(make_metrics(tmp_path), png, unigram_loss=6.5, title="tiny")
    image = imread(png)
    height, width = image.shape[:2]
    assert width > 1000 and height > 700
    # each panel has ink: the loss across the top, the heat map at the lower left, MaxVio at the lower right
    panels = (image[: height // 2], image[height // 2 :, : width // 2], image[height // 2 :, width // 2 :])
    for panel in panels:
        colours = np.unique((panel[..., :3].reshape(-1, 3) * 255).astype(int), axis=0)
        assert len(colours) > 50


def test_a_changed_loss_changes_the_picture(tmp_path):
    """The picture is of the file: another unigram line gives another image, the same input the same image."""
    metrics = make_metrics(tmp_path, steps=10)
    for name, unigram in (("a", 6.5), ("b", 6.5), ("c", 5.0)):
        write_report(metrics, tmp_path / f"{name}.png", unigram_loss=unigram)
    a, b, c = (imread(tmp_path / f"{name}.png") for name in "abc")
    np.testing.assert_array_equal(a, b)
    assert not np.array_equal(a, c)


def test_a_dense_model_and_no_evaluation(tmp_path):
    write_report(make_metrics(tmp_path, steps=1, moe=False), tmp_path / "report.png")
    assert (tmp_path / "report.png").stat().st_size > 10_000


def test_nothing_to_draw(tmp_path):
    MetricsWriter(tmp_path).close()
    with pytest.raises(ValueError, match="no record of kind 'train'"):
        write_report(tmp_path / "metrics.jsonl", tmp_path / "report.png")
