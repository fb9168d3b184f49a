"""XLA's own bytes of a unit's programs, compiled for H100s on a machine without a GPU (`xla.py`), beside the predicted ones."""

import time

from experiments.planning import xla
from experiments.planning.memory import UNITS
from experiments.planning.serving_memory import step_bytes
from experiments.planning.serving_prediction import Prediction
from experiments.planning.serving_programs import traced
from experiments.planning.tables import table


def check(hardware: str) -> None:
    """Raises ValueError for what cannot be compiled here; to be called before anything is computed."""
    if hardware != "h100":
        raise ValueError(f"--compile: the compiler knows H100s, not --hardware={hardware}")
    xla.check_compiler()
    xla.prepare()


def report(p: Prediction) -> str:
    """A table for each program."""
    devices = tuple(xla.h100s(p.unit.devices, p.unit.mesh.local * p.unit.mesh.tensor))
    made = traced(p.unit, p.memory.pages, devices)
    return "\n\n".join(_program(p, name, program) for name, program in made.items())


def _program(p: Prediction, name: str, program: object) -> str:
    began = time.perf_counter()
    compiled = program.lower().compile()  # type: ignore[attr-defined]
    took, stats = time.perf_counter() - began, compiled.memory_analysis()
    held = sum(p.memory.weights.values()) + p.memory.state + p.memory.pages * p.memory.page
    step = sum(step_bytes(p.unit, name).values())
    rows = [
        ("arguments: weights, pages, state", stats.argument_size_in_bytes, held),
        ("outputs, not in the arguments' place", stats.output_size_in_bytes - stats.alias_size_in_bytes, 0.0),
        ("temporaries", stats.temp_size_in_bytes, step),
    ]
    rows.append(("all", sum(row[1] for row in rows), sum(row[2] for row in rows)))
    lines = [(what, [f"{a / UNITS['GiB']:.2f}", f"{b / UNITS['GiB']:.2f}"]) for what, a, b in rows]
    text = table(f"{name}, compiled for H100 in {took:.0f} s", ["XLA GiB", "predicted"], lines)
    return f"{text}\n{xla.exchanges(compiled.as_text() or '')}"
