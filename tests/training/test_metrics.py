"""Records across a resume, MaxVio, throughput, peak rates and the progress line."""

import io
import itertools
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.training.metrics import (
    TIMINGS,
    MetricsWriter,
    Progress,
    Throughput,
    max_vio,
    peak_flops,
    progress_text,
    read_records,
)


def values(step: int, seconds: float = 0.1):
    return {
        "loss": np.float32(5.0 / step),
        "tokens": 14 * 10**12 + step,
        "max_vio": np.float32([0.5, 1.0 / step]),
        "expert_counts": np.int32([[4, 4, step], [0, 8, 4]]),
        "tokens_per_s": 1000.0 / seconds,
    }


def write(directory, steps, resume_step=None, seconds=0.1):
    writer = MetricsWriter(directory, resume_step)
    for step in steps:
        writer.write("train", step, values(step, seconds))
        if step % 2 == 0:
            writer.write("eval", step, {"loss": 4.0 / step})
    writer.close()


def without_timings(path):
    return [{k: v for k, v in record.items() if k not in TIMINGS} for record in read_records(path)]


def test_a_resumed_file_equals_the_uninterrupted_one(tmp_path):
    write(tmp_path / "whole", range(1, 9))
    write(tmp_path / "cut", range(1, 7))  # killed after step 6, in the middle of a line; checkpoint of step 4
    with (tmp_path / "cut" / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 7, "lo')
    write(tmp_path / "cut", range(5, 9), resume_step=4, seconds=0.2)
    whole, cut = tmp_path / "whole" / "metrics.jsonl", tmp_path / "cut" / "metrics.jsonl"
    assert without_timings(cut) == without_timings(whole)
    assert [r["step"] for r in read_records(cut) if r["kind"] == "train"] == list(range(1, 9))
    assert read_records(cut) != read_records(whole)  # the speeds of the second part


def test_values_survive_exactly_and_a_new_run_starts_anew(tmp_path):
    write(tmp_path, range(1, 4))
    write(tmp_path, [3])
    (record,) = read_records(tmp_path / "metrics.jsonl")
    assert record["tokens"] == 14 * 10**12 + 3 and record["expert_counts"] == [[4, 4, 3], [0, 8, 4]]
    assert np.float32(record["loss"]) == np.float32(5.0 / 3)
    assert list((tmp_path / "tensorboard").iterdir())


def test_what_is_not_finite_is_null_and_the_file_stays_json(tmp_path):
    writer = MetricsWriter(tmp_path)
    writer.write("train", 1, {"loss": float("nan"), "max_vio": np.array([1.0, np.inf]), "note": "skipped"})
    writer.close()
    line = (tmp_path / "metrics.jsonl").read_text()
    strict = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert strict == {"kind": "train", "step": 1, "loss": None, "max_vio": [1.0, None], "note": "skipped"}


def test_a_damaged_line_in_the_middle_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "train", "step": 1}\nnonsense\n{"kind": "train", "step": 2}\n')
    with pytest.raises(ValueError, match="line 2 is not a metrics record: 'nonsense'"):
        read_records(path)


def test_tensorboard_gets_the_values(tmp_path):
    from tensorboardX.event_file_writer import (
        EventsWriter,  # noqa: F401  (the format's own writer, for its proto)
    )
    from tensorboardX.proto.event_pb2 import Event

    write(tmp_path, [1])
    (path,) = (tmp_path / "tensorboard").iterdir()
    data, tags = path.read_bytes(), {}
    while data:  # TFRecord: length, checksum, payload, checksum
        length = int.from_bytes(data[:8], "little")
        for value in Event.FromString(data[12 : 12 + length]).summary.value:
            tags[value.tag] = value
        data = data[16 + length :]
    assert tags["train/loss"].simple_value == 5.0
    assert tags["train/max_vio/0"].simple_value == 0.5
    assert tags["train/expert_counts"].histo.num == 6
    np.testing.assert_allclose(tags["train/expert_counts"].histo.max, 2.0)  # 8 tokens at a mean of 4


def test_max_vio():
    counts = np.array([[2, 2, 2, 2], [8, 0, 0, 0], [3, 1, 2, 2], [0, 0, 0, 0]])
    got = jax.jit(max_vio)(jnp.asarray(counts))
    np.testing.assert_allclose(got, [0.0, 3.0, 0.5, 0.0], rtol=1e-6)
    assert got.dtype == jnp.float32


def test_throughput_leaves_out_compilation_and_old_steps():
    now = iter([100.0, 101.0, 103.0, 104.0])  # 100: the first step ended, compilation included
    speed = Throughput(flops_per_token=2e6, peak=1e9, window=2, clock=lambda: next(now))
    assert speed.update(500) == {}
    assert speed.update(600) == {"tokens_per_s": 100.0, "mfu": pytest.approx(0.2)}
    assert speed.update(900)["tokens_per_s"] == pytest.approx(400 / 3)
    assert speed.update(1100)["tokens_per_s"] == pytest.approx(500 / 3)  # the window has moved on


def test_throughput_starts_afresh_after_a_pause():
    now = itertools.count(0.0, 1.0)
    speed = Throughput(1.0, None, clock=lambda: next(now))
    speed.update(0)
    speed.pause()
    assert speed.update(10) == {}
    assert speed.update(30) == {"tokens_per_s": 20.0}


@pytest.mark.parametrize(
    ("kind", "tera"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989.4),
        ("NVIDIA H20", 148),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("TPU v5 lite", 197),
    ],
)
def test_data_sheet_of_known_devices(kind, tera):
    device = types.SimpleNamespace(platform="gpu", device_kind=kind)
    assert peak_flops("bfloat16", device) == (tera * 1e12, "data sheet")


def test_peak_of_the_cpu_is_measured_once():
    peak = peak_flops("float32")
    assert peak.source == "measured"
    assert 1e9 < peak.flops < 1e14
    assert peak_flops("float32") == peak  # equal to the last digit only if not measured again


def test_progress_line():
    assert (
        progress_text(
            {"loss": 3.14159, "mtp_loss": 4.0, "tokens_per_s": 4321.0, "mfu": 0.412, "max_vio": [0.5, 1.5]}
        )
        == "loss 3.142, MTP 4.000, 4,321 tok/s, MFU 41.2%, MaxVio 1.00"
    )
    assert progress_text({"loss": None, "max_vio": []}) == ""
    out = io.StringIO()
    progress = Progress(10, initial=4, file=out)
    progress.update(7, {"loss": 2.0})
    progress.write("saved")
    progress.close()
    assert "saved" in out.getvalue() and "7/10" in out.getvalue() and "loss 2.000" in out.getvalue()
