"""The records of a run: when the clock is read, what is said and when."""

import io

import numpy as np
import pytest

from deepseek_jax.training import records as module
from deepseek_jax.training.evaluation import Evaluation
from deepseek_jax.training.metrics import max_vio, read_records
from deepseek_jax.training.records import Records, Step
from deepseek_jax.training.state import Hyper
from deepseek_jax.training.step import Metrics
from deepseek_jax.training.throughput import Throughput
from tests.tiny_run import tiny

TOKENS = 128  # of a step
METRICS = Metrics({"loss": 3.0, "mtp_loss": 3.5, "balance_loss": 0.0}, 1.0, np.full((2, 8), 32), True, 0, 0)


class Run:
    """Records of a run of 20 steps, on a clock of the test."""

    def __init__(self, folder):
        self.now, self.shown = 0.0, io.StringIO()
        cfg = tiny(train={"out_dir": str(folder), "steps": 20, "batch_size": 4})
        self.records = Records(cfg, 0, 20, 1, lambda: None, self.shown)
        self.records._throughput = Throughput(1.0, None, clock=lambda: self.now)
        self.step = 0

    def dispatch(self, batch_size=4):
        self.step += 1
        hyper = Hyper(*np.float32([1, 0, 0]))
        self.records.add(Step(self.step, self.step * TOKENS, batch_size, hyper, METRICS, 0.25))

    def close(self):
        self.records.flush()
        self.records.end()
        self.records.close()


@pytest.fixture
def run(tmp_path):
    run = Run(tmp_path)
    yield run
    run.close()


def speeds(folder):
    records = read_records(folder / "metrics.jsonl")
    return {r["step"]: r["tokens_per_s"] for r in records if r["kind"] == "train" and "tokens_per_s" in r}


def test_a_step_is_timed_when_it_is_done_not_when_it_is_written(run, tmp_path, monkeypatch):
    """Writing the first record takes long: in that time the next step runs, and is no faster for it."""

    def slow(counts_le):
        run.now += 10.0 if run.step == 2 else 0.0
        return max_vio(counts_le)

    monkeypatch.setattr(module, "max_vio", slow)
    run.dispatch()
    run.dispatch()  # step 1 was done at 0, written at 10
    run.now += 1.0
    run.dispatch()  # step 2 was done at 11
    assert speeds(tmp_path) == {2: pytest.approx(TOKENS / 11.0)}
    records = {r["step"]: r for r in read_records(tmp_path / "metrics.jsonl")}
    assert records[2]["step_seconds"] == 11.0 and records[2]["data_seconds"] == 0.25
    assert "step_seconds" not in records[1] and "data_seconds" not in records[1]  # compilation


def test_what_is_left_is_shown(run):
    for _ in range(3):
        run.now += 60.0
        run.dispatch()
    assert "18 min" not in run.shown.getvalue()
    run.records.end()
    assert "2/20" in run.shown.getvalue() and "18:00 left" in run.shown.getvalue()  # 18 steps, a minute each


def test_a_warning_is_said_once(run):
    run.step = 10
    run.dispatch()
    for _ in range(2):
        run.records.evaluation(11, Evaluation(6.0, 2.5), unigram_loss=5.0)
    assert run.shown.getvalue().count("step 11: validation loss 6.000, 2.500 bits per byte") == 2
    assert (
        run.shown.getvalue().count("warning: validation loss 6.000 is no better than a unigram model's 5.000")
        == 1
    )


def test_samples_are_recorded(run, tmp_path):
    run.records.samples(20, {"middle": "a>>b<<c"})
    assert read_records(tmp_path / "metrics.jsonl") == [{"kind": "samples", "step": 20, "middle": "a>>b<<c"}]


def test_many_experts_are_counted_now_and_then(run, tmp_path):
    """At full size, the counts of every step would make a file of 19 GB."""
    metrics = METRICS._replace(counts_le=np.full((4, 256), 32))
    for step in range(1, 11):
        run.records.add(Step(step, step, 4, Hyper(*np.float32([1, 0, 0])), metrics, 0.0))
    records = read_records(tmp_path / "metrics.jsonl")
    assert [r["step"] for r in records if "expert_counts" in r] == [4, 8]
    assert all(len(r["max_vio"]) == 4 for r in records)
