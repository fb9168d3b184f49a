"""Throughput and utilisation, on a clock of the test."""

import itertools
import types

import jax
import pytest

from deepseek_jax.training.throughput import Throughput, peak_flops


def clock(*seconds):
    return iter(seconds).__next__


def test_throughput_leaves_out_compilation_and_old_steps():
    # 100: the first step ended, compilation included
    speed = Throughput(flops_per_token=2e6, peak=1e9, window=2, clock=clock(100.0, 101.0, 103.0, 104.0))
    assert speed.update(500) == {}
    assert speed.update(600) == {"step_seconds": 1.0, "tokens_per_s": 100.0, "mfu": pytest.approx(0.2)}
    third = speed.update(900)
    assert third["tokens_per_s"] == pytest.approx(400 / 3) and third["step_seconds"] == 2.0
    assert speed.update(1100)["tokens_per_s"] == pytest.approx(500 / 3)  # the window has moved on


def test_throughput_starts_afresh_after_a_pause():
    now = itertools.count(0.0, 1.0)
    speed = Throughput(1.0, None, clock=now.__next__)
    speed.update(0)
    speed.pause()
    assert speed.update(10) == {}
    assert speed.update(30) == {"step_seconds": 1.0, "tokens_per_s": 20.0}


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
    assert peak_flops(types.SimpleNamespace(platform="gpu", device_kind=kind)) == tera * 1e12


def test_no_peak_of_cpus_and_unknown_devices():
    assert peak_flops(jax.devices("cpu")[0]) is None
    assert peak_flops(types.SimpleNamespace(platform="gpu", device_kind="GeForce 256")) is None
