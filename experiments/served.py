"""A server in a process of its own, and a load over HTTP, as the benchmark and the tests need them. Standard library only.

with Server([sys.executable, "-m", "experiments.serve", "--checkpoint=DIR", "--port={port}"], log="server.log") as server:
    answers, wall = asyncio.run(load(server.port, wanted, limit=8))
"""

import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.serving_load import Answer, Wanted

MODEL = "served"  # the name under which servers of the benchmark serve
_TICKS = os.sysconf("SC_CLK_TCK")
_SAMPLE = re.compile(r"([\w:]+)(\{.*\})? (\S+)")


class Server:
    """A server's process, ready, on a free port of this machine.

    Args:
        command: with "{port}" where the port belongs.
        log: file that gets its output.
        environment: changes to the environment.
        ready: path that answers 200 once it serves.
        seconds: that its start may take.

    Raises:
        RuntimeError: it ended, or took longer; with the end of its log.
    """

    def __init__(
        self,
        command: Sequence[str],
        log: str | Path,
        environment: Mapping[str, str] | None = None,
        ready: str = "/health",
        seconds: float = 300,
    ):
        self.port, self.log = _free_port(), Path(log)
        began = time.perf_counter()
        with self.log.open("w") as output:
            self.process = subprocess.Popen(
                [part.replace("{port}", str(self.port)) for part in command],
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(environment or {})},
                start_new_session=True,
            )
        try:
            while not self._answers(ready):
                if self.process.poll() is not None or time.perf_counter() - began > seconds:
                    raise RuntimeError(
                        f"{' '.join(command[:4])} is not ready after {time.perf_counter() - began:.0f} s; "
                        f"its log ends:\n{self.log.read_text()[-2000:]}"
                    )
                time.sleep(0.05)
        except BaseException:
            self.kill()
            raise
        self.start_seconds = time.perf_counter() - began

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *error: object) -> None:
        self.kill() if self.process.poll() is not None else self.stop()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def get(self, path: str) -> str:
        with urllib.request.urlopen(self.url + path, timeout=10) as response:
            return response.read().decode()

    def metrics(self) -> dict[str, float]:
        """Of /metrics: the sum over its labels of each sample, and under "name{labels}" each one."""
        return read_metrics(self.get("/metrics"))

    def cpu(self) -> float:
        """Seconds of all cores that the server and its processes have taken."""
        return sum(int(fields[11]) + int(fields[12]) for fields in self._stat()) / _TICKS

    def resident(self) -> int:
        """Bytes of memory that the server and its processes hold."""
        return sum(int(fields[21]) for fields in self._stat()) * os.sysconf("SC_PAGE_SIZE")

    def stop(self, seconds: float = 60) -> int:
        """Asks it to end; returns its exit status. Kills it where it takes longer than `seconds`."""
        self.process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(seconds)
        self.kill()
        return self.process.wait()

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def _answers(self, path: str) -> bool:
        try:
            self.get(path)
        except OSError:
            return False
        return True

    def _stat(self) -> Iterator[list[str]]:
        """The fields of /proc/PID/stat from the third on, of each process of the server's session."""
        for pid in filter(str.isdigit, os.listdir("/proc")):
            with contextlib.suppress(OSError):
                fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                if int(fields[3]) == self.process.pid:
                    yield fields


def end_servers_at_sigterm() -> None:
    """Has SIGTERM end this process by an exception, so that `with Server(...)` ends its server."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def read_metrics(text: str) -> dict[str, float]:
    """Samples of Prometheus' text format: the sum over its labels of each name, and under "name{labels}" each one."""
    found: dict[str, float] = {}
    for line in text.splitlines():
        if sample := _SAMPLE.fullmatch(line):
            name, labels, value = sample.groups()
            found[name] = found.get(name, 0) + float(value)
            if labels:
                found[name + labels] = float(value)
    return found


# --- load -----------------------------------------------------------------------------------------------------------


async def load(
    port: int, wanted: Sequence[Wanted], rate: float = 1.0, limit: int | None = None
) -> tuple[list[Answer], float]:
    """Asks for streamed greedy completions: `rate` a second on average, at the trace's times; or, with `limit`, as many at a
    time. Returns the answers in the order of `wanted`, and the seconds that all took. Prompts of one load are not found in the
    prefix cache by another."""
    salt = str(time.time_ns())
    gate, start = asyncio.Semaphore(limit or len(wanted)), time.perf_counter()

    async def one(request: Wanted) -> Answer:
        if limit is None:
            due = start + request.arrival / rate
            await asyncio.sleep(due - time.perf_counter())
            return await _answer(port, request, salt, due)
        async with gate:
            return await _answer(port, request, salt, time.perf_counter())

    answers = await asyncio.gather(*map(one, wanted))
    return list(answers), time.perf_counter() - start


async def _answer(port: int, wanted: Wanted, salt: str, due: float) -> Answer:
    answer = Answer([], [])
    async for event in _events(port, _body(wanted, salt)):
        for choice in event["choices"]:
            if ids := choice.get("token_ids"):
                answer.tokens.extend(ids)
                answer.times.append(time.perf_counter() - due)
    if len(answer.tokens) != wanted.max_tokens:
        raise RuntimeError(f"{len(answer.tokens)} tokens came instead of {wanted.max_tokens}")
    return answer


def _body(wanted: Wanted, salt: str) -> dict[str, Any]:
    return {
        "model": MODEL,
        "prompt": wanted.prompt,
        "max_tokens": wanted.max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "return_token_ids": True,
        "cache_salt": salt,
    }


async def _events(port: int, body: Mapping[str, Any]) -> Any:
    """Yields the events of a streamed completion. By HTTP/1.0, whose answer is not in chunks. Raises RuntimeError."""
    content = json.dumps(body).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 22)
    head = (
        "POST /v1/completions HTTP/1.0\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(content)}\r\n\r\n"
    )
    writer.write(head.encode() + content)
    try:
        status = await reader.readline()
        if status.split()[1:2] != [b"200"]:
            raise RuntimeError(f"{status.decode().strip()}: {(await reader.read()).decode()[-500:]}")
        async for line in reader:
            if line.startswith(b"data: {"):
                event = json.loads(line[6:])
                if "error" in event:
                    raise RuntimeError(f"the server broke off: {event['error']}")
                yield event
    finally:
        writer.close()
