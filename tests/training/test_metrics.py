"""The metrics file across a resume, and MaxVio."""

import json

import numpy as np
import pytest

from deepseek_jax.training.metrics import TIMINGS, MetricsFile, max_vio, read_records


def values(step: int, seconds: float = 0.1):
    return {
        "loss": np.float32(5.0 / step),
        "tokens": 14 * 10**12 + step,
        "max_vio": np.float32([0.5, 1.0 / step]),
        "expert_counts": np.int32([[4, 4, step], [0, 8, 4]]),
        "tokens_per_s": 1000.0 / seconds,
        "step_seconds": seconds,
    }


def write(directory, steps, resume_step=None, seconds=0.1):
    file = MetricsFile(directory, resume_step)
    for step in steps:
        file.write("train", step, values(step, seconds))
        if step % 2 == 0:
            file.write("eval", step, {"loss": 4.0 / step})
    file.close()


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


def test_what_a_resumed_file_has_is_known(tmp_path):
    write(tmp_path, range(1, 7))
    file = MetricsFile(tmp_path, 4)
    assert file.has("eval", 4) and not file.has("eval", 6) and not file.has("samples", 4)
    file.close()


def test_values_survive_exactly_and_a_new_run_starts_anew(tmp_path):
    write(tmp_path, range(1, 4))
    write(tmp_path, [3])
    (record,) = read_records(tmp_path / "metrics.jsonl")
    assert record["tokens"] == 14 * 10**12 + 3 and record["expert_counts"] == [[4, 4, 3], [0, 8, 4]]
    assert np.float32(record["loss"]) == np.float32(5.0 / 3)


def test_what_is_not_finite_is_null_and_the_file_stays_json(tmp_path):
    file = MetricsFile(tmp_path)
    file.write("train", 1, {"loss": float("nan"), "max_vio": np.array([1.0, np.inf]), "note": "skipped"})
    file.close()
    line = (tmp_path / "metrics.jsonl").read_text()
    strict = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert strict == {"kind": "train", "step": 1, "loss": None, "max_vio": [1.0, None], "note": "skipped"}


def test_a_damaged_line_in_the_middle_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "train", "step": 1}\nnonsense\n{"kind": "train", "step": 2}\n')
    with pytest.raises(ValueError, match="line 2 is not a metrics record: 'nonsense'"):
        read_records(path)
    path.write_bytes(b'{"kind": "train", "step": 1}\n\xff\xfe\n{"kind": "train", "step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl, line 2 is not a metrics record: '"):
        read_records(path)


def test_a_last_line_that_is_no_text_is_left_out(tmp_path):
    """As a machine that went down may leave it."""
    path = tmp_path / "metrics.jsonl"
    for rest in (b"\0" * 64, b'{"kind": "tr\xff\xfe'):
        path.write_bytes(b'{"kind": "train", "step": 1}\n' + rest)
        assert read_records(path) == [{"kind": "train", "step": 1}]


def test_max_vio():
    got = max_vio(np.array([[2, 2, 2, 2], [8, 0, 0, 0], [3, 1, 2, 2], [0, 0, 0, 0]]))
    np.testing.assert_allclose(got, [0.0, 3.0, 0.5, 0.0], rtol=1e-6)
    assert got.dtype == np.float32 and isinstance(
        got, np.ndarray
    )  # no work for the device, which runs the next step
