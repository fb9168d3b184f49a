"""How the benchmark and its workers talk: one JSON object per line over pipes. Standard library only.

A worker answers {"setup": case, ...} and {"measure": case}, and sleeps on its pipe in between: while one worker
measures, the other uses no core.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

PEAK_SIZE, PEAK_PRODUCTS = 1024, 8  # of square float32 matrices, in a round of a machine's peak

Measure = Callable[[], float]  # one round; seconds per step, of one generation, or of one matrix product


class Round(NamedTuple):
    """Of what a round measures once: seconds on the clock, and of all cores together."""

    seconds: float
    cpu: float


def _timed(measure: Measure) -> Round:
    wall, cpu = time.perf_counter(), time.process_time()
    seconds = measure()
    cores = (time.process_time() - cpu) / (time.perf_counter() - wall)
    return Round(seconds, seconds * cores)


def serve(start: Callable[[], Mapping[str, str]], setup: Callable[[Mapping[str, Any]], Measure]) -> None:
    """Runs a worker until its input ends.

    Args:
        start: imports what the worker needs; returns versions to print. ImportError is reported, not raised.
        setup: compiles and warms up one case; returns what measures it.
    """
    # Libraries that print to stdout would break the protocol: they get stderr instead.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(**values: Any) -> None:
        print(json.dumps(values), file=answers, flush=True)

    try:
        answer(versions=start())
    except ImportError as error:
        answer(missing=str(error))
        return
    cases: dict[str, Measure] = {}
    for line in sys.stdin:
        request = json.loads(line)
        if "setup" in request:
            cases[request["setup"]] = setup(request)
            answer(ready=request["setup"])
        else:
            answer(**_timed(cases[request["measure"]])._asdict())


class Worker:
    """A worker process.

    Args:
        module: with a `serve` call as its main program.
        python: interpreter; default: this one.
        environment: changes to the environment.

    Raises:
        ValueError: `python` is no interpreter.
    """

    def __init__(
        self, module: str, python: str = sys.executable, environment: Mapping[str, str] | None = None
    ):
        self.module = module
        try:
            self._process = subprocess.Popen(
                [python, "-m", module],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env={**os.environ, **(environment or {})},
            )
        except OSError as error:
            raise ValueError(f"cannot run {python!r}: {error}") from error
        hello = self._read()
        self.missing: str | None = hello.get("missing")
        self.versions: dict[str, str] = hello.get("versions", {})

    def setup(self, case: str, **spec: Any) -> None:
        """Prepare a case, warmed up."""
        self._ask(setup=case, **spec)

    def measure(self, case: str) -> Round:
        """One round."""
        return Round(**self._ask(measure=case))

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _ask(self, **request: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(
                f"{self.module} ended with status {self._process.wait()}; its error stands above"
            )
        return json.loads(line)
