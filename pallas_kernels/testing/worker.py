"""A process that checks and times shapes one after the other, and its parent's side of the pipe.

Several of them compile at the same time; what uses the GPU is behind `gpu_lock.exclusive`. A kernel that hangs or breaks
its process costs one shape: the parent kills the process and goes on with another.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from pallas_kernels.testing.aot import DUMP_TO, ROOT, KernelReport, merged, mosaic_dump, read_dump
from pallas_kernels.testing.gpu_lock import GPU_LOCK, LOCK, exclusive

Item = Mapping[
    str, Any
]  # op, shape (fields), options, implementation, and `timing`, arguments of `seconds_per_call`
COMMAND = [sys.executable, "-m", "pallas_kernels.testing.worker"]
CUBLAS_ALONE = (
    "--xla_gpu_enable_triton_gemm=false"  # XLA would compile and try its own products as peers, too
)
LIMITS = {
    "start": 120.0,
    "compile": 90.0,
    "measure": 60.0,
}  # seconds; to wait for the GPU, as long as it takes


class Worker:
    """The process. `log`: the file that gets its error output."""

    def __init__(self, log: pathlib.Path):
        self._log, self._lines = log, queue.Queue[str | None]()
        self._dump = tempfile.TemporaryDirectory()
        with open(log, "a") as errors:
            self._process = subprocess.Popen(
                COMMAND,
                env={**os.environ, **self._environment()},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _environment(self) -> dict[str, str]:
        return {
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
            "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {CUBLAS_ALONE}".strip(),
            GPU_LOCK: str(self._log.with_name(LOCK)),
            **mosaic_dump(self._dump.name),
        }

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def ask(self, item: Item, until: float) -> dict[str, Any]:
        """The figures of an item, or {"error": ...}, after which the worker is closed. until: `time.monotonic()` at which
        it is killed, whatever it does."""
        assert self._process.stdin is not None
        phase = "start"
        try:
            self._process.stdin.write(json.dumps(item) + "\n")
            self._process.stdin.flush()
            while True:
                limit = min(until - time.monotonic(), LIMITS.get(phase, float("inf")))
                line = self._lines.get(timeout=max(0.0, limit))
                if line is None:
                    return self._failed(f"died with status {self._process.wait()} ({phase}); see {self._log}")
                answer = json.loads(line)
                if "figures" in answer:
                    return answer["figures"]
                if "error" in answer:
                    return self._failed(answer["error"])
                phase = answer["phase"]
        except queue.Empty:
            return self._failed(f"killed: {phase} took too long")
        except BrokenPipeError:
            return self._failed(f"died with status {self._process.wait()}; see {self._log}")

    def _failed(self, error: str) -> dict[str, Any]:
        self.close()
        return {"error": error}

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._reader.join()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
        self._dump.cleanup()


def _figures(item: Item, say: Callable[[str], None]) -> dict[str, Any]:
    from pallas_kernels.testing.measure import compile_op, measure
    from pallas_kernels.testing.workloads import workload

    w = workload(item["op"], item["shape"], **item["options"])
    began, before = time.monotonic(), _dumped()
    say("compile")
    programs = compile_op(w, item["implementation"])
    kernel = _report(_dumped() - before)
    if w.op == "fp8_gemm":  # whose peer it is; loading takes seconds
        with contextlib.suppress(ImportError):
            import torch  # noqa: F401
    say("wait")
    with exclusive():
        say("measure")
        found = measure(w, item["implementation"], torch_peer=True, programs=programs, **item["timing"])
    took = time.monotonic() - began
    return dataclasses.asdict(found) | {
        "kernel": None if kernel is None else dataclasses.asdict(kernel),
        "took": took,
    }


def _dumped() -> set[str]:
    return {path.stem for path in pathlib.Path(os.environ[DUMP_TO]).glob("*.ptxas")}


def _report(stems: set[str]) -> KernelReport | None:
    """What ptxas said; None where the compiler left nothing that can be read, which loses no figure."""
    try:
        return merged(read_dump(pathlib.Path(os.environ[DUMP_TO]), sorted(stems)))
    except (OSError, RuntimeError, ValueError) as error:
        print(f"no report of ptxas: {error}", file=sys.stderr)
        return None


def serve() -> None:
    """Answers items, one JSON object a line, until its input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print

    def answer(**values: Any) -> None:
        print(json.dumps(values), file=answers, flush=True)

    for line in sys.stdin:
        try:
            answer(figures=_figures(json.loads(line), lambda phase: answer(phase=phase)))
        except Exception as error:  # whatever compiler or device raise is this item's result
            answer(error=f"{type(error).__name__}: {error}"[:2000])


if __name__ == "__main__":
    serve()
