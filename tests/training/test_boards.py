"""What TensorBoard and Weights & Biases are given: read back from event files, and at the door of `wandb`."""

import sys
import types

import numpy as np
import pytest

from deepseek_jax.training.boards import TensorBoard, WeightsAndBiases, tagged

CONFIG = {"model": {"hidden_size": 32}, "precision": "bf16"}
VALUES = {
    "loss": np.float32(5.0),
    "max_vio": np.float32([0.5, np.nan]),
    "expert_counts": np.int32([[4, 4, 1], [0, 8, 4]]),
    "step_seconds": 0.25,
    "data_seconds": 0.01,
}
SAMPLE = {"continuation_1": "*once*>> upon\n  a time"}


def test_tags():
    found = dict(tagged("train", VALUES | {"grad_norm": float("inf"), "none": np.array([])}))
    loads = found.pop("train/expert_counts")
    assert found == {
        "train/loss": 5.0,
        "train/max_vio/0": 0.5,  # the NaN of the other layer is left out, and so is what is not finite
        "train/step_seconds": 0.25,
        "train/data_seconds": 0.01,
    }
    np.testing.assert_allclose(loads, np.array([4 / 3, 4 / 3, 1 / 3, 0, 2, 1]))
    assert dict(tagged("samples", SAMPLE)) == {"samples/continuation_1": SAMPLE["continuation_1"]}


def events(directory):
    """Tag -> summary value of all event files; the format's own protocol buffers."""
    from tensorboardX.proto.event_pb2 import Event

    tags = {}
    for path in sorted((directory / "tensorboard").iterdir()):
        data = path.read_bytes()
        while data:  # TFRecord: length, checksum, payload, checksum
            length = int.from_bytes(data[:8], "little")
            for value in Event.FromString(data[12 : 12 + length]).summary.value:
                tags[value.tag] = value
            data = data[16 + length :]
    return tags


def test_tensorboard_gets_values_config_and_samples(tmp_path):
    board = TensorBoard(tmp_path, CONFIG)
    board.write("train", 1, VALUES)
    board.write("samples", 1, SAMPLE)
    board.close()
    found = events(tmp_path)
    assert found["train/loss"].simple_value == 5.0
    assert found["train/step_seconds"].simple_value == 0.25
    assert found["train/data_seconds"].simple_value == np.float32(0.01)
    assert found["train/expert_counts"].histo.num == 6
    np.testing.assert_allclose(found["train/expert_counts"].histo.max, 2.0)  # 8 tokens at a mean of 4
    texts = {
        tag: value.tensor.string_val[0].decode() for tag, value in found.items() if value.tensor.string_val
    }
    assert texts["config/text_summary"].startswith('    {\n      "model": {\n')
    assert texts["samples/continuation_1/text_summary"] == "    *once*>> upon\n      a time"


class Wandb(types.ModuleType):
    """What of the package `wandb` is used, writing down what it is given."""

    Html = Histogram = staticmethod(lambda x: ("shown", x))

    def __init__(self):
        super().__init__("wandb")
        self.runs = []

    def init(self, **settings):
        run = types.SimpleNamespace(
            id=settings["id"] or f"id{len(self.runs)}", settings=settings, rows=[], axes=[]
        )
        run.define_metric = lambda name, step_metric: run.axes.append((name, step_metric))
        run.log = run.rows.append
        run.finish = lambda: run.rows.append("finished")
        self.runs.append(run)
        return run


def test_weights_and_biases_gets_values_config_and_samples(tmp_path, monkeypatch):
    wandb = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    first = WeightsAndBiases(tmp_path, CONFIG, "project")
    first.write("train", 7, VALUES)
    first.write("samples", 7, {"a": "<b>"})
    first.close()
    WeightsAndBiases(tmp_path, CONFIG, "project", resume=True)
    WeightsAndBiases(tmp_path, CONFIG, "project")  # begun anew
    run, resumed, anew = wandb.runs
    assert (run.settings["project"], run.settings["config"], run.axes) == ("project", CONFIG, [("*", "step")])
    assert run.settings["dir"] == str(tmp_path) and run.settings["id"] is None
    assert (resumed.settings["id"], resumed.settings["resume"]) == ("id0", "allow")
    assert anew.settings["id"] is None
    numbers, texts, end = run.rows
    assert numbers["step"] == 7 and numbers["train/loss"] == 5.0 and numbers["train/step_seconds"] == 0.25
    np.testing.assert_allclose(numbers["train/expert_counts"][1], np.array([4 / 3, 4 / 3, 1 / 3, 0, 2, 1]))
    assert texts == {"step": 7, "samples/a": ("shown", "<pre>&lt;b&gt;</pre>")} and end == "finished"


def test_weights_and_biases_for_real(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    for resume in (False, True):
        board = WeightsAndBiases(tmp_path, CONFIG, "project", resume)
        board.write("train", 7, VALUES)
        board.write("samples", 7, SAMPLE)
        board.close()
    runs = list(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))
    assert len(runs) == 2 and len({run.name for run in runs}) == 1  # two starts, one id


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(
        ValueError, match=r"train.wandb='x' needs the package wandb: pip install 'deepseek-jax\[wandb\]'"
    ):
        WeightsAndBiases(tmp_path, CONFIG, "x")
