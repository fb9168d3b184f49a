"""Benchmark of the kernels on their named shapes.

    python -m pallas_kernels.bench --all --out=DIR
    python -m pallas_kernels.bench --op=fp8_gemm --out=DIR

With a Hopper GPU: correctness, TFLOPS, GB/s, the share of the roofline, and the ratio to cuBLAS BF16 (for `quantize`:
to XLA's fusions) and to torch's scaled product, both in the same run, with what ptxas said. What no GPU has run comes
first, then what is slowest; after --seconds no shape is started, and the report says what is left. Without a GPU: what the
compiler says about each kernel for an H100, and the roofline bound of each shape.

With --all, the model that uses the kernels, where it is there, trains and decodes at the same time (`python -m
experiments.bench gpu`). Writes DIR/bench.md and DIR/bench.json after each shape.
"""

import argparse
import dataclasses
import importlib.util
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

os.environ.setdefault(
    "XLA_PYTHON_CLIENT_PREALLOCATE", "false"
)  # several processes share the device, torch is one

import jax

from pallas_kernels.compat import why_not_hopper
from pallas_kernels.testing.aot import (
    ROOT,
    CaseReport,
    KernelReport,
    compile_for_h100,
    merged,
    why_unavailable,
)
from pallas_kernels.testing.day import GRACE_S, Day, digest, in_order, item, last_figures
from pallas_kernels.testing.gpu_lock import GPU_LOCK, LOCK
from pallas_kernels.testing.workloads import Workload, workloads

SECONDS = 440.0
MOST_NOTES, MOST_ROWS, MOST_MODEL_LINES = 8, 90, 40  # of what is printed at the end; the files have all
MODEL = ("experiments", [sys.executable, "-m", "experiments.bench", "gpu"])  # package, command

Record = dict[str, Any]


def _or_dash(value: Any, form: str) -> str:
    return "-" if value is None else format(value, form)


MEASURED: dict[str, Callable[[Record], str]] = {
    "op": lambda r: r["op"],
    "shape": lambda r: r["name"],
    "correct": lambda r: "yes" if r["correct"] else "NO",
    "diff": lambda r: f"{r['diff']:.2e}",
    "us": lambda r: f"{r['seconds'] * 1e6:.1f}",
    "TFLOPS": lambda r: f"{r['tflops']:.0f}",
    "GB/s": lambda r: f"{r['gb_s']:.0f}",
    "of bound": lambda r: f"{r['bound_share']:.0%}",
    "x peer": lambda r: f"{r['peer_ratio']:.2f}",
    "x torch": lambda r: _or_dash(r["torch_ratio"], ".2f"),
    "published": lambda r: _or_dash(r["published_tflops"], ".0f"),
    "registers": lambda r: _or_dash((r.get("kernel") or {}).get("registers"), ""),
    "spill B": lambda r: _or_dash((r.get("kernel") or {}).get("spill_bytes"), ""),
}
COMPILED: dict[str, Callable[[KernelReport], Any]] = {
    "registers": lambda k: k.registers,
    "spill B": lambda k: k.spill_bytes,
    "shared B": lambda k: k.shared_bytes,
    "blocks/SM": lambda k: k.blocks_per_sm,
    "wgmma": lambda k: (" ".join(k.wgmma) + (" serialised" if k.serialised else "")) or "-",
}
BOUND: dict[str, Callable[[Workload], str]] = {
    "bound us": lambda w: f"{w.bound_seconds * 1e6:.1f}",
    "bound TFLOPS": lambda w: f"{w.flops / w.bound_seconds / 1e12:.0f}",
    "by": lambda w: w.bound_by,
}


def compiled_row(w: Workload, report: CaseReport | None) -> list[str]:
    kernel = None if report is None else merged(report.kernels)
    if report is None or report.error is not None or kernel is None:
        found = ["-" if report is None else "failed"] * len(COMPILED)
    else:
        found = [str(column(kernel)) for column in COMPILED.values()]
    return [w.op, w.name, *found, *(column(w) for column in BOUND.values())]


def table(columns: Sequence[str], rows: list[list[str]]) -> str:
    """Returns a Markdown table, aligned for the terminal."""
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
    lines = [columns, ["-" * width for width in widths], *rows]
    return "\n".join(
        "| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in lines
    )


def commit() -> str:
    """Returns the short hash of the checkout, with a mark if it has uncommitted changes."""
    where = pathlib.Path(__file__).parent
    command = ["git", "-C", str(where), "describe", "--always", "--dirty", "--exclude=*"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


@dataclasses.dataclass
class Report:
    """What is known so far; `write` puts it into the folder, if there is one."""

    header: str
    columns: list[str]
    order: dict[tuple[str, str], int]  # of the rows: (op, shape)
    out: pathlib.Path | None
    rows: list[list[str]] = dataclasses.field(default_factory=list)  # each begins with op and shape
    records: list[Record] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)
    model: list[str] = dataclasses.field(default_factory=list)

    def add(self, row: list[str] | None, record: Record) -> None:
        if row is not None:
            self.rows.append(row)
            self.rows.sort(key=lambda row: self.order[row[0], row[1]])
        self.records.append(record)
        if "error" in record and record["error"] not in (None, why_unavailable()):
            self.notes.append(f"{record['op']} {record['name']}: {record['error']}")
        self.write()

    def text(self, short: bool = False) -> str:
        """As Markdown; at most 150 lines of it."""
        notes, rows, model = self.notes, self.rows, self.model
        if short:
            notes, rows, model = notes[:MOST_NOTES], rows[:MOST_ROWS], model[:MOST_MODEL_LINES]
        parts = [f"# Kernel benchmark: {self.header}", "\n".join(note[:300] for note in notes)]
        if rows:
            parts.append(table(self.columns, rows))
        if len(rows) < len(self.rows):
            parts.append(f"{len(self.rows) - len(rows)} further rows are in bench.md")
        if model:
            parts += ["## The model", "\n".join(model)]
        return "\n\n".join(filter(None, parts))

    def write(self) -> None:
        if self.out is None:
            return
        sources = {op: digest(op) for op in sorted({r["op"] for r in self.records})}
        found = {"header": self.header, "sources": sources, "results": self.records}
        for name, text in (("bench.md", self.text() + "\n"), ("bench.json", json.dumps(found, indent=1))):
            (self.out / f"{name}.new").write_text(text)
            (self.out / f"{name}.new").replace(self.out / name)


def _tell(line: str) -> None:
    """To whoever waits; the report is printed at the end."""
    print(line, file=sys.stderr, flush=True)


def run_measured(shapes: list[Workload], report: Report, until: float, log: pathlib.Path) -> None:
    def record(found: Record) -> None:
        row = None if "error" in found else [column(found) for column in MEASURED.values()]
        report.add(row, found)
        print(" ".join(row or [found["op"], found["name"], found["error"]]), flush=True)

    day = Day(map(item, in_order(shapes, last_figures())), until, record, log)
    day.run()
    if day.left:
        names = ", ".join(f"{i['op']} {i['name']}" for i in day.left)
        report.notes.append(f"time is up, {len(day.left)} shapes are left: {names}")


def run_compiled(shapes: list[Workload], report: Report, until: float) -> None:
    reason = why_unavailable()
    if reason is not None:
        report.notes.append(f"No compilation for H100: {reason}. Only the roofline bounds follow.")
    for op in dict.fromkeys(w.op for w in shapes):
        of_op = [w for w in shapes if w.op == op]
        if time.monotonic() >= until:
            report.notes.append(f"time is up, {op} is left")
            continue
        if reason is None:
            _tell(f"{op}: compiling {len(of_op)} shapes for an H100, some seconds each")
        for w, found in zip(of_op, [None] * len(of_op) if reason else compile_for_h100(of_op), strict=True):
            kernels = [] if found is None else [dataclasses.asdict(k) for k in found.kernels]
            record = {"op": op, "name": w.name, "kernels": kernels, "bound_seconds": w.bound_seconds}
            report.add(compiled_row(w, found), record | {"error": reason if found is None else found.error})


class Model:
    """The process in which the model trains and decodes, with whatever processes it starts; its lines go to a file."""

    def __init__(self, out: pathlib.Path, until: float):
        seconds = max(1.0, until - time.monotonic())
        self._path = out / "model.md"
        with open(self._path, "w") as lines, open(out / "model.log", "w") as errors:
            command = [*MODEL[1], f"--seconds={seconds:.0f}"]
            self._process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=os.environ | {GPU_LOCK: str(out / LOCK)},
                stdout=lines,
                stderr=errors,
                start_new_session=True,
            )
        self._until = until + GRACE_S

    def wait(self, tell: Callable[[str], None] = lambda _: None) -> list[str]:
        """Its lines, when it is done or the time is up; the last says how it ended."""
        left = max(0.0, self._until - time.monotonic())
        if self._process.poll() is None:
            tell(f"waiting for the model, at most {left:.0f} s; its lines so far are in {self._path}")
        try:
            status = self._process.wait(max(0.0, self._until - time.monotonic()))
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            status = self._process.wait()
        lines = self._path.read_text().splitlines()
        return lines if status == 0 else [*lines, f"ended with status {status}; see model.log"]


def _arguments(argv: Sequence[str] | None, everything: dict[str, list[Workload]]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--op", choices=everything, help="one op")
    which.add_argument("--all", action="store_true", help="every op, and the model")
    parser.add_argument("--shape", help="only shapes whose name contains this")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="from which on nothing is started")
    parser.add_argument("--out", type=pathlib.Path, help="folder for bench.md and bench.json")
    arguments = parser.parse_args(argv)
    arguments.shapes = [
        w
        for op, ws in everything.items()
        for w in ws
        if (arguments.all or op == arguments.op) and (arguments.shape or "") in w.name
    ]
    if not arguments.shapes:
        parser.error(f"no shape of {arguments.op or 'all ops'} contains {arguments.shape!r}")
    return arguments


def main(argv: list[str] | None = None) -> int:
    until = time.monotonic()
    arguments = _arguments(argv, workloads())
    until += arguments.seconds
    shapes, out = arguments.shapes, arguments.out
    if out:
        out.mkdir(parents=True, exist_ok=True)
    on_gpu = jax.default_backend() == "gpu" and why_not_hopper() is None
    device = jax.devices()[0].device_kind if on_gpu else "no Hopper GPU; compiled for H100"
    columns = [*MEASURED] if on_gpu else ["op", "shape", *COMPILED, *BOUND]
    report = Report(
        header=f"{device}, jax {jax.__version__}, commit {commit()}",
        columns=columns,
        order={(w.op, w.name): i for i, w in enumerate(shapes)},
        out=out,
    )
    with_model = arguments.all and out and importlib.util.find_spec(MODEL[0]) is not None
    model = Model(out, until) if with_model else None
    if on_gpu:
        run_measured(shapes, report, until, out or pathlib.Path(tempfile.mkdtemp()))
    else:
        run_compiled(shapes, report, until)
    report.model = model.wait(_tell) if model else []
    report.write()
    print(report.text(short=True))
    fine = (None, why_unavailable())
    return 0 if all(r.get("correct", True) and r.get("error") in fine for r in report.records) else 1


if __name__ == "__main__":
    sys.exit(main())
