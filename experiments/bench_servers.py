"""Servers of `experiments.bench serve`, over HTTP: a closed loop, then Poisson arrivals, by turns."""

import argparse
import asyncio
import contextlib
import functools
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from experiments.bench_engines import LONGEST, Engines
from experiments.bench_vllm import engine_options, environment
from experiments.served import MODEL, Server, load
from experiments.serving_load import Answer, Bounds, Figures, Wanted, figures
from experiments.serving_report import OURS, TRANSFORMERS, Rounds, check_gap, table, vllm_name


def our_server(checkpoint: Path, rows: int) -> list[str]:
    options = [f"--checkpoint={checkpoint}", f"--served_model_name={MODEL}", "--port={port}"]
    return [
        sys.executable,
        "-m",
        "experiments.serve",
        *options,
        f"--rows={rows}",
        f"--max_model_len={LONGEST}",
    ]


def vllm_server(python: str, checkpoint: Path, rows: int) -> list[str]:
    """Its module, since `vllm serve` asks for a distribution called vllm, and the CPU build's has another name."""
    o = engine_options(LONGEST, rows)
    return [
        *(python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(checkpoint)),
        *("--served-model-name", MODEL, "--host", "127.0.0.1", "--port", "{port}", "--dtype", o["dtype"]),
        *("--max-model-len", str(LONGEST), "--max-num-seqs", str(rows), "--enforce-eager"),
        *("--no-enable-prefix-caching", "--compilation-config", json.dumps(o["compilation_config"])),
        "--disable-uvicorn-access-log",
    ]


def _started(args: argparse.Namespace, folder: Path, checkpoint: Path) -> dict[str, Callable[[], Server]]:
    """What starts each server."""
    rows = max(args.limits)
    ours = our_server(checkpoint, rows)
    servers: dict[str, Callable[[], Server]] = {}
    servers[OURS] = functools.partial(Server, ours, folder / "ours.log", {"JAX_PLATFORMS": "cpu"}, "/readyz")
    for threads in args.vllm_threads if args.vllm_python else ():
        command, log = vllm_server(args.vllm_python, checkpoint, rows), folder / f"vllm{threads}.log"
        servers[vllm_name(threads)] = functools.partial(Server, command, log, environment(threads, False))
    return servers


class _Client:
    """Asks one server for the trace; keeps the answers of the last time."""

    def __init__(self, server: Server, wanted: Sequence[Wanted], bounds: Bounds):
        self.server, self.wanted, self.bounds = server, wanted, bounds
        self.answers: list[Answer] = []

    def warm(self, limit: int) -> None:
        asyncio.run(load(self.server.port, [w._replace(max_tokens=8) for w in self.wanted], limit=limit))

    def measure(self, **how: Any) -> Figures:
        before = self.server.cpu()
        self.answers, wall = asyncio.run(load(self.server.port, self.wanted, **how))
        return figures(self.answers, wall, self.server.cpu() - before, self.bounds)


def run(args: argparse.Namespace, folder: Path, checkpoint: Path, engines: Engines) -> None:
    """Measures and prints. Raises ValueError where tokens are not the model's."""
    wanted, limit = engines.wanted, max(args.limits)
    with contextlib.ExitStack() as stack:
        clients = {}
        for name, start in _started(args, folder, checkpoint).items():
            clients[name] = _Client(stack.enter_context(start()), wanted, engines.bounds)
            print(f"server of {name}: ready after {clients[name].server.start_seconds:.1f} s", flush=True)
            clients[name].warm(limit)
        full, part, rate = _rounds(clients, args.rounds, limit, args.load)
    title = (
        f"servers, {limit} at a time: {len(wanted)} requests, {sum(w.max_tokens for w in wanted):,} tokens"
    )
    print("\n".join(table(title, full)))
    good = f"good: first token within {args.ttft_ms:g} ms, then {args.itl_ms:g} ms each on average"
    print("\n".join(table(f"servers, Poisson arrivals, {rate:.2f} requests/s; {good}", part)))
    for name, client in clients.items() if TRANSFORMERS in engines.workers else ():
        file = folder / f"{name} served.json"
        file.write_text(json.dumps(client.answers))
        print(f"  tokens of the server of {name}: {check_gap(name, engines.gap(file, wanted))}")
    print(flush=True)


def _rounds(
    clients: dict[str, _Client], rounds: int, limit: int, share: float
) -> tuple[Rounds, Rounds, float]:
    """Figures of closed loops and of Poisson arrivals, and their rate: a share of what the fastest peer reached at first."""
    full: Rounds = {name: [] for name in clients}
    part: Rounds = {name: [] for name in clients}
    peers, rate = [name for name in clients if name != OURS] or [OURS], 0.0
    for _ in range(rounds):
        for name, client in clients.items():
            full[name].append(client.measure(limit=limit))
        rate = rate or share * max(full[name][0].requests_per_s for name in peers)
        for name, client in clients.items():
            part[name].append(client.measure(rate=rate))
    return full, part, rate
