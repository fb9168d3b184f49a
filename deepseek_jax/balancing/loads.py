"""How many rows (token, expert) each expert of each layer got lately: counted in a window, and kept in a file.

Dims: l layer, e logical expert.
"""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from deepseek_jax.balancing.plan import Floats
from deepseek_jax.checks import require, shown
from deepseek_jax.json_files import read_object

# Rows per layer after which a report counts half: of a million tokens of DeepSeek-V3. An expert's mean count is then 47,000,
# known to half a percent.
HALF_LIFE = 8 << 20
FORMAT = "deepseek_jax expert loads"
VERSION = 1


class Window:
    """Counts that fade: what came `half_life` rows ago counts half. One table, whatever it looks back on, and no edge at which
    old reports are lost all at once. It fades by rows, not by steps, so that it always knows a load as exactly: a night of steps
    with one token each does not wipe out the day.

    Attributes:
        count_le: float64, faded counts.
    """

    def __init__(self, layers: int, experts: int, half_life: float = HALF_LIFE):
        require(half_life > 0, f"half_life={half_life} must be a positive number of rows")
        self.half_life = half_life
        self.count_le: Floats = np.zeros((layers, experts))

    def add(self, count_le: npt.ArrayLike) -> None:
        """Counts of a step. Raises ValueError as `checked`."""
        layers, experts = self.count_le.shape
        new_le = checked(count_le, layers, experts, "counts")
        self.count_le *= 0.5 ** (new_le.sum(1).max() / self.half_life)
        self.count_le += new_le


def with_shared(count_le: npt.ArrayLike, per_token: int) -> Floats:
    """Counts with a column more: of the shared expert, where it is one more of the others (`plan.py: Plan`). Every token chooses it,
    beside `per_token` others."""
    table = np.asarray(count_le, np.float64)
    return np.concatenate([table, table.sum(1, keepdims=True) / per_token], 1)


def checked(count_le: npt.ArrayLike, layers: int, experts: int, where: str) -> Floats:
    """Counts as float64 [layers, experts]. Raises ValueError, which names `where`: another shape, or a count that is negative or
    not finite."""
    table = np.asarray(count_le, np.float64)
    require(
        table.shape == (layers, experts),
        f"{where}: counts of shape {table.shape} for {layers} MoE layers of {experts} experts",
    )
    wrong = np.argwhere(~(np.isfinite(table) & (table >= 0)))
    if len(wrong):
        layer, expert = wrong[0].tolist()
        raise ValueError(
            f"{where}: layer {layer} counts {table[layer, expert]} rows of expert {expert}; give finite numbers >= 0"
        )
    return table


def write(path: Path, count_le: npt.ArrayLike) -> None:
    """Writes counts into a file, which is whole or not there: a JSON object with

    format: "deepseek_jax expert loads"      version: 1
    layers, experts: how many MoE layers, MTP modules last, and routed experts
    counts: per layer a list with a number >= 0 for each expert, of any unit
    """
    layers, experts = np.shape(count_le)
    table = checked(count_le, layers, experts, str(path))
    head = {"format": FORMAT, "version": VERSION, "layers": layers, "experts": experts}
    part = path.with_name(f"{path.name}.part{os.getpid()}")
    part.write_text(json.dumps(head | {"counts": table.round(3).tolist()}))
    part.replace(path)


def read(path: Path, layers: int, experts: int) -> Floats:
    """Counts of a file. Raises ValueError: no such file, another format, another model's, or counts as `checked`."""
    found = read_object(path)
    for name, want in {"format": FORMAT, "version": VERSION, "layers": layers, "experts": experts}.items():
        require(found.get(name) == want, f"{path}: {name}={shown(found.get(name))} should be {want!r}")
    rows: Any = found.get("counts")
    table = isinstance(rows, list) and all(isinstance(row, list) for row in rows)
    numbers = table and all(
        type(count) in (int, float) and abs(count) < 1e300 for row in rows for count in row
    )
    require(numbers, f"{path}: counts should be a list of lists of numbers")
    lengths = {len(row) for row in rows}
    require(
        len(rows) == layers and lengths == {experts},
        f"{path}: counts has {len(rows)} lists of {sorted(lengths)} numbers for {layers} layers of {experts} experts",
    )
    return checked(rows, layers, experts, str(path))
