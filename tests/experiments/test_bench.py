"""The benchmark's arithmetic, and the memory that a CPU run keeps."""

import ctypes
import subprocess
import sys
import time

import pytest

from experiments import bench_sft
from experiments.bench import OURS, PEER, _report
from experiments.bench_worker import Round, _timed


def test_a_report_gives_rates_cpu_seconds_and_shares_of_the_peak(capsys):
    rounds = {
        OURS: [Round(0.5, 1.0), Round(0.4, 0.8), Round(0.6, 0.9)],
        PEER: [Round(1.0, 1.5), Round(1.0, 1.6), Round(0.9, 1.8)],
    }
    _report("train", rounds, tokens=100, peak=4e9, flops=1e9)
    title, ours, peer, ratio = capsys.readouterr().out.strip().splitlines()
    assert title == "train; float32 matmul peak 4 GFLOP/s"
    assert "200 tokens/s" in ours and "0.900 CPU s, 50% of the peak" in ours
    assert "100 tokens/s" in peer and "1.600 CPU s, 25% of the peak" in peer
    # CPU seconds of the rounds: 1.5, 2 and 2.
    assert ratio.strip() == "ratio 2.00x   (rounds 1.50 to 2.50; in CPU time 2.00x)"


def test_fine_tuning_is_compared_with_the_faster_of_trls_two_ways():
    """Rounds are of one token."""
    rounds = {
        bench_sft.OURS: [Round(1e-3, 2e-3), Round(2e-3, 2e-3), Round(1e-3, 3e-3)],
        bench_sft.PADDED: [Round(9e-3, 9e-3)] * 3,
        bench_sft.PACKED: [Round(2e-3, 4e-3), Round(3e-3, 4e-3), Round(3e-3, 4e-3)],
    }
    ours, padded, packed, ratio = bench_sft.report(rounds).splitlines()
    assert "1,000 tokens/s   (500 to 1,000; 2,000 CPU us per token)" in ours
    assert "111 tokens/s" in padded and "333 tokens/s" in packed
    assert ratio.strip() == "ratio to TRL, packed 3.00x   (rounds 1.50 to 3.00)"


def test_sleep_takes_no_cpu_time():
    def sleep() -> float:
        time.sleep(0.2)
        return 0.1  # two steps

    assert _timed(sleep).seconds == 0.1
    assert _timed(sleep).cpu < 0.05


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="no glibc")
def test_what_a_cpu_run_frees_comes_back_without_new_pages():
    program = """
import ctypes, resource, sys
from experiments.devices import force_devices
if sys.argv[1] == "keep":
    force_devices(1)
libc, size = ctypes.CDLL(None), 64 << 20
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
for _ in range(2):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = libc.malloc(size)
    ctypes.memset(block, 1, size)
    libc.free(ctypes.c_void_p(block))
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""

    def faults(how: str) -> int:
        command = [sys.executable, "-c", program, how]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    assert 10 * faults("keep") < faults("default")
