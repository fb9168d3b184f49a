"""Benchmark of the kernels on their named shapes.

    python -m pallas_kernels.bench --all --out=DIR
    python -m pallas_kernels.bench --op=fp8_gemm --out=DIR

With a Hopper GPU: correctness, TFLOPS, GB/s, the share of the roofline, and the ratio to cuBLAS BF16 (for `quantize`:
to XLA's fusions) and to torch's scaled product, both in the same run. Without one: what the compiler says about each
kernel for an H100, and the roofline bound of each shape. Writes DIR/bench.md and DIR/bench.json.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # leave memory to the torch peer

import jax

from pallas_kernels.compat import why_not_hopper
from pallas_kernels.testing.aot import CaseReport, KernelReport, compile_for_h100, why_unavailable
from pallas_kernels.testing.measure import Measurement, measure
from pallas_kernels.testing.workloads import Workload, workloads

MEASURED: dict[str, Callable[[Measurement], str]] = {
    "shape": lambda m: m.name,
    "correct": lambda m: "yes" if m.correct else "NO",
    "diff": lambda m: f"{m.diff:.2e}",
    "us": lambda m: f"{m.seconds * 1e6:.1f}",
    "TFLOPS": lambda m: f"{m.tflops:.0f}",
    "GB/s": lambda m: f"{m.gb_s:.0f}",
    "of bound": lambda m: f"{m.bound_share:.0%}",
    "x peer": lambda m: f"{m.peer_ratio:.2f}",
    "x torch": lambda m: "-" if m.torch_ratio is None else f"{m.torch_ratio:.2f}",
    "DeepGEMM H800": lambda m: "-" if m.published_tflops is None else f"{m.published_tflops:.0f}",
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
    if report is None or report.error is not None:
        found = ["-" if report is None else "failed"] * len(COMPILED)
    else:
        [kernel] = report.kernels
        found = [str(column(kernel)) for column in COMPILED.values()]
    return [w.name, *found, *(column(w) for column in BOUND.values())]


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


def run_measured(selected: dict[str, list[Workload]]) -> tuple[list[str], list[dict]]:
    sections, records = [], []
    for op, shapes in selected.items():
        rows = []
        for workload in shapes:
            measurement = measure(workload, "mosaic", torch_peer=True)
            rows.append([column(measurement) for column in MEASURED.values()])
            records.append(dataclasses.asdict(measurement))
            print(f"{op}: " + " ".join(rows[-1]), flush=True)
        sections.append(f"## {op}\n\n{table([*MEASURED], rows)}")
    return sections, records


def run_compiled(selected: dict[str, list[Workload]]) -> tuple[list[str], list[dict]]:
    reason = why_unavailable()
    sections, records = [], []
    if reason is not None:
        sections.append(f"No compilation for H100: {reason}. Only the roofline bounds follow.")
    for op, shapes in selected.items():
        reports = [None] * len(shapes) if reason else compile_for_h100(shapes)
        rows = [compiled_row(w, r) for w, r in zip(shapes, reports, strict=True)]
        errors = [f"{row[0]}: {r.error}" for row, r in zip(rows, reports, strict=True) if r and r.error]
        columns = ["shape", *COMPILED, *BOUND]
        sections.append("\n\n".join([f"## {op}", table(columns, rows), *errors]))
        for workload, report in zip(shapes, reports, strict=True):
            kernels = [] if report is None else [dataclasses.asdict(k) for k in report.kernels]
            error = reason if report is None else report.error
            record = {"op": op, "name": workload.name, "kernels": kernels, "error": error}
            records.append(record | {"bound_seconds": workload.bound_seconds})
    return sections, records


def main(argv: list[str] | None = None) -> int:
    everything = workloads()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--op", choices=everything, help="one op")
    which.add_argument("--all", action="store_true", help="every op")
    parser.add_argument("--shape", help="only shapes whose name contains this")
    parser.add_argument("--out", type=pathlib.Path, help="folder for bench.md and bench.json")
    arguments = parser.parse_args(argv)
    selected = {op: w for op, w in everything.items() if arguments.all or op == arguments.op}
    if arguments.shape:
        selected = {op: [w for w in ws if arguments.shape in w.name] for op, ws in selected.items()}
    if not any(selected.values()):
        parser.error(f"no shape of {', '.join(selected)} contains {arguments.shape!r}")

    on_gpu = jax.default_backend() == "gpu" and why_not_hopper() is None
    device = jax.devices()[0].device_kind if on_gpu else "no Hopper GPU; compiled for H100"
    header = f"{device}, jax {jax.__version__}, commit {commit()}"
    sections, records = (run_measured if on_gpu else run_compiled)(
        {op: ws for op, ws in selected.items() if ws}
    )
    text = "\n\n".join([f"# Kernel benchmark: {header}", *sections])
    print(text)
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "bench.md").write_text(text + "\n")
        (arguments.out / "bench.json").write_text(
            json.dumps({"header": header, "results": records}, indent=1)
        )
    failed = [
        r for r in records if (not r["correct"] if on_gpu else r["error"] and r["error"] != why_unavailable())
    ]
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
