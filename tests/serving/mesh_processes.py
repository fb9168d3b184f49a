"""The engine over two processes of four devices, with drafts: the tokens of one device; idle without an end; a death ends both at
once.

python -m tests.serving.mesh_processes
"""

import dataclasses
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

from tests.parallel.processes import Launched, devices, until

HEARTBEAT = 60  # seconds: longer than it may take to notice
IDLE = 3.0  # seconds
MESH = "heads"
WORKER = [sys.executable, "-m", "tests.serving.mesh_processes", "worker"]


def worker(seconds: float) -> None:
    """One of the processes. After the trace, process 0 goes on idly for so long."""
    import jax

    from deepseek_jax.config import DistributedConfig
    from deepseek_jax.model.decoding import decoding_config
    from deepseek_jax.parallel.processes import joining
    from deepseek_jax.serving.engine import Engine
    from deepseek_jax.serving.processes import Following, Leading
    from tests.serving import mesh_engine as m

    cfg = DistributedConfig(heartbeat_timeout=HEARTBEAT)
    found = joining.find(cfg, os.environ)
    assert found is not None
    joining.start(found, cfg)

    def say(text: str) -> None:
        print(f"error: {text}", file=sys.stderr, flush=True)

    with joining.failing_fast(say):
        mesh = m.MESHES[MESH]
        kind = Following if jax.process_index() else Leading
        device = m.put(kind(decoding_config(m.CFG), m.SIZES, 4, drafts=True, mesh=mesh, say=say), mesh)
        if isinstance(device, Following):
            device.follow()
            print("let go", flush=True)
        else:
            made = Engine(device, dataclasses.replace(m.OPTIONS, drafts=True))
            began = time.monotonic()
            for seed in (0, 1):
                requests = m.trace(seed, 12)
                assert m.run(made, requests, seed) == m.alone(requests)
                print(f"trace {seed} is that of one device", flush=True)
                time.sleep(IDLE)
            assert made.stats.drafts > 0
            print(f"{made.stats} in {time.monotonic() - began:.1f} s", flush=True)
            time.sleep(seconds)
            made.device.close()
        joining.stop()


def launched(folder: Path, name: str, seconds: float) -> Launched:
    return Launched(folder / name, [*WORKER, str(seconds)], ("--processes=2", "--grace=30"), devices(4))


def killed(folder: Path, rank: int) -> None:
    """One is killed while nothing is asked: the other says so in a line, and ends."""
    with launched(folder, f"killed {rank}", 3600) as run:
        until(lambda: " in " in run.printed and "Stats(" in run.printed, "the traces")
        os.kill(run.pids()[rank], signal.SIGKILL)
        took = until(lambda: run.process.poll() is not None, "the other ends", HEARTBEAT / 2)
        lines = [line for line in run.printed.splitlines() if "error:" in line]
        who = "process 0" if rank == 0 else "another process"
        assert lines == [
            f"[{1 - rank}] error: {who} ended, and what is spread over all cannot go on: start all of them again"
        ], run.printed[-3000:]
        assert "is killed" not in run.printed, run.printed[-3000:]
        print(f"process {rank} killed: the other ended after {took:.1f} s, with one line")


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        with launched(Path(folder), "whole", 0) as run:
            assert run.wait() == 0, run.printed[-5000:]
            assert "trace 1 is that of one device" in run.printed and "[1] let go" in run.printed
            print(run.printed)
        for rank in (0, 1):
            killed(Path(folder), rank)


if __name__ == "__main__":
    worker(float(sys.argv[2])) if sys.argv[1:2] == ["worker"] else main()
