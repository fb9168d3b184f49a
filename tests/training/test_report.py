"""The picture of a run: drawn from real metrics files, complete or sparse, and it shows what they hold."""

import numpy as np
import pytest
from matplotlib.image import imread

from deepseek_jax.training.drawing import columns, smoothed, trend
from deepseek_jax.training.metrics import MetricsFile, max_vio, read_records
from deepseek_jax.training.report import write_report


def make_records(directory, steps=60, layers=3, experts=16, moe=True):
    rng = np.random.default_rng(0)
    writer = MetricsFile(directory)
    for step in range(1, steps + 1):
        record = {"loss": 2 + 6 * np.exp(-step / 15), "mtp_loss": 2.5 + 6 * np.exp(-step / 15)}
        if moe:
            counts = rng.poisson(64 * rng.gamma(2 + step, 1 / (2 + step), (layers, experts)))
            record |= {"expert_counts": counts, "max_vio": max_vio(counts)}
            record |= {"tokens": 512 * step, "batch_size": 2, "lr": 1e-3, "grad_norm": 1.0 + 1 / step}
            record |= {"tokens_per_s": 1e3, "mfu": 0.4, "step_seconds": 0.5, "data_seconds": 0.1}
        if step == 30:
            record["loss"] = float("nan")
        writer.write("train", step, record)
        if step % 20 == 0:
            writer.write("eval", step, {"loss": 2.2 + 6 * np.exp(-step / 15)})
    writer.close()
    return read_records(writer.path)


def ink(image):
    """Colours of a part of a picture: few where there is only a background."""
    return len(np.unique((image[..., :3].reshape(-1, 3) * 255).astype(int), axis=0))


def test_draws_every_panel(tmp_path):
    png = tmp_path / "out" / "report.png"
    write_report(make_records(tmp_path), png, unigram_loss=6.5, title="tiny")
    image = imread(png)
    height, width = image.shape[:2]
    assert width > 1000 and height > 1000
    # loss; learning rate, gradient, speed; heat map, MaxVio
    top, middle, low = image[: height // 2], image[height // 2 : 7 * height // 10], image[7 * height // 10 :]
    thirds = [middle[:, i * width // 3 : (i + 1) * width // 3] for i in range(3)]
    for panel in (top, *thirds, low[:, : width // 2], low[:, width // 2 :]):
        assert ink(panel) > 50


def test_what_is_in_the_records_changes_the_picture(tmp_path):
    """The same input gives the same image; another unigram line, a warning, an idle expert give another one."""
    records = make_records(tmp_path, steps=10)
    idle = [dict(r) for r in records]
    for record in idle:
        record["expert_counts"] = [[0, *layer[1:]] for layer in record["expert_counts"]]
    pictures = []
    for given, unigram, warnings in (
        (records, 6.5, ()),
        (records, 6.5, ()),
        (records, 5.0, ()),
        (idle, 6.5, ()),
    ):
        write_report(given, tmp_path / "picture.png", unigram, "", warnings)
        pictures.append(imread(tmp_path / "picture.png"))
    a, b, *others = pictures
    np.testing.assert_array_equal(a, b)
    assert not any(np.array_equal(a, other) for other in others)


def test_warnings_stand_above(tmp_path):
    records = make_records(tmp_path, steps=10)
    write_report(records, tmp_path / "well.png")
    write_report(records, tmp_path / "ill.png", warnings=["expert 3 is idle: raise optimizer.gamma " * 9])
    well, ill = imread(tmp_path / "well.png"), imread(tmp_path / "ill.png")
    assert len(ill) > len(well) and ill.shape[1] == well.shape[1]
    amber = np.array([0xFF, 0xF3, 0xCD]) / 255

    def share(image):
        return np.isclose(image[: len(image) // 10, :, :3], amber, atol=1e-3).all(-1).mean()

    assert share(ill) > 0.3 and share(well) == 0


def test_a_dense_model_without_evaluation_and_what_it_writes(tmp_path):
    """Texts stand below, cut where they are long; nothing of them is taken for mathematics, or warned of."""
    said = {
        "kind": "samples",
        "step": 1,
        "conversation_1": "2 + $2$ ｜ 汉>>\\boxed{4}\n" * 20,
        "of_a_text": "x" * 90,
    }
    left, right = columns(said)
    assert left[0] == "CONVERSATION 1" and left[12] == "..." and len(left) == 14
    assert right == ["OF A TEXT", "x" * 84, "x" * 6, ""] and columns({"kind": "samples"}) == ([], [])
    write_report([*make_records(tmp_path, steps=1, moe=False), said], tmp_path / "report.png")
    image = imread(tmp_path / "report.png")
    assert len(image) > 110 * (11.5 + 0.155 * 14) and ink(image[-110:, : image.shape[1] // 2]) > 20


def test_nothing_to_draw(tmp_path):
    with pytest.raises(ValueError, match="no record of kind 'train'"):
        write_report([], tmp_path / "report.png")


def test_smoothing():
    """Against the definition: weights decay^age of what is there, normalised."""
    values = np.array([[4.0, 1.0], [np.nan, 2.0], [1.0, 3.0]])
    weights = 0.5 ** np.arange(2, -1, -1.0)
    got = smoothed(values, 0.5)
    np.testing.assert_allclose(got[2, 1], (weights * values[:, 1]).sum() / weights.sum())
    np.testing.assert_allclose(got[:, 0], [4.0, 4.0, (0.5 * 4 + 1) / 1.5])  # the gap is no value
    np.testing.assert_array_equal(smoothed(values[:, 1], 0.0), values[:, 1])
    np.testing.assert_allclose(smoothed(np.full(30, 5.0), 0.9), 5.0)  # no memory of a start at zero


def test_a_trend_does_not_lag():
    """Of a straight line it is the line, away from the ends; its last value is the forward average's."""
    line = np.arange(1000.0)
    got = trend(line)
    np.testing.assert_allclose(got[300:700], line[300:700], atol=0.01)
    assert got[-1] == smoothed(line, 1 - 1 / 20)[-1] < 985
    assert trend(np.array([3.0])) == [3.0]
