"""Throughput, utilisation, the host's time; all on a clock of the test."""

import itertools
import types

import jax
import pytest

from deepseek_jax.training.throughput import HostTime, Throughput, peak_flops


def clock(*seconds):
    return iter(seconds).__next__


def test_throughput_leaves_out_compilation_and_old_steps():
    # 100: the first step ended, compilation included
    speed = Throughput(flops_per_token=2e6, peak=1e9, window=2, clock=clock(100.0, 101.0, 103.0, 104.0))
    assert speed.update(500) == {}
    assert speed.update(600) == {"tokens_per_s": 100.0, "mfu": pytest.approx(0.2)}
    assert speed.update(900)["tokens_per_s"] == pytest.approx(400 / 3)
    assert speed.update(1100)["tokens_per_s"] == pytest.approx(500 / 3)  # the window has moved on


def test_throughput_starts_afresh_after_a_pause():
    now = itertools.count(0.0, 1.0)
    speed = Throughput(1.0, None, clock=now.__next__)
    speed.update(0)
    speed.pause()
    assert speed.update(10) == {}
    assert speed.update(30) == {"tokens_per_s": 20.0}


def test_host_time():
    host = HostTime(clock(10.0, 11.0, 12.0, 20.0, 20.5, 22.0, 30.0, 30.5, 40.0, 43.0))
    with host.waiting_for_data():  # 10 to 11
        pass
    assert host.dispatched() == {}  # 12: the first step
    with host.waiting_for_data():  # 20 to 20.5
        pass
    assert host.dispatched() == {"step_seconds": 10.0, "data_seconds": 0.5}  # 22
    host.pause()
    with host.waiting_for_data():  # 30 to 30.5
        pass
    assert host.dispatched() == {}  # 40: with the evaluation before it
    assert host.dispatched() == {"step_seconds": 3.0, "data_seconds": 0.0}  # 43


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
