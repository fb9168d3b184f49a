"""A day on a GPU: which shapes come first, and several workers that measure until the time is up.

`measured.json` is the `bench.json` of the last day whose figures stand in README.md. A kernel that it does not have, or
whose source has changed since, comes first: no GPU has run it. Then come the shapes that are farthest from their bound.
"""

import hashlib
import json
import pathlib
import re
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

from pallas_kernels.testing.worker import Item, Worker
from pallas_kernels.testing.workloads import Workload

MEASURED = pathlib.Path(__file__).with_name("measured.json")
PACKAGE = pathlib.Path(__file__).parents[1]
NO_KERNELS = ("blocks", "compat", "dispatch", "groups")  # modules of the package without a part of a kernel
WORKERS = 4  # processes that compile; one at a time uses the GPU
GRACE_S = 20.0  # what has begun when the time is up may take so much longer


def digest(op: str, package: pathlib.Path = PACKAGE) -> str:
    """Returns a hash of the sources that an op's kernels are made of: its own, and what these import of the package."""
    folder = package / op
    parts = [path.read_bytes() for path in (*sorted(folder.glob("kernel*.py")), folder / "shapes.py")]
    seen: set[str] = set(NO_KERNELS)
    for part in parts:  # which grows
        named = set(re.findall(r"^from pallas_kernels\.(\w+) import", part.decode(), re.MULTILINE)) - seen
        paths = [package / f"{name}.py" for name in sorted(named)]
        parts += [path.read_bytes() for path in paths if path.exists()]
        seen |= named
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:12]


def last_figures(path: pathlib.Path = MEASURED) -> dict[tuple[str, str], float]:
    """(op, shape) -> share of the bound that the kernel as it is now reached on the last day."""
    found = json.loads(path.read_text())
    same = {op for op, source in found["sources"].items() if (PACKAGE / op).is_dir() and digest(op) == source}
    return {(r["op"], r["name"]): r["bound_share"] for r in found["results"] if r["op"] in same}


def in_order(shapes: Iterable[Workload], reached: dict[tuple[str, str], float]) -> list[Workload]:
    """Shapes that no GPU has run, one of each op after the other, then the others, the slowest first."""
    by_op: dict[str, list[Workload]] = {}
    for w in shapes:
        by_op.setdefault(w.op, []).append(w)

    def key(w: Workload) -> tuple[bool, float]:
        share = reached.get((w.op, w.name))
        return share is not None, by_op[w.op].index(w) if share is None else share

    return sorted((w for ws in by_op.values() for w in ws), key=key)


def item(w: Workload, implementation: str = "mosaic", **timing: Any) -> Item:
    """What a worker is asked about a workload."""
    shape = {field: getattr(w.shape, field) for field in w.shape.__dataclass_fields__}
    return {
        "op": w.op,
        "name": w.name,
        "shape": shape,
        "options": w.options,
        "implementation": implementation,
        "timing": timing,
    }


class Day:
    """Measures items until the time is up.

    Args:
      items: in their order.
      until: `time.monotonic()` from which on nothing is started.
      record: gets op, name and figures, or "error", of each item that is done; one at a time.
      log: folder for the workers' error output.
    """

    def __init__(
        self,
        items: Iterable[Item],
        until: float,
        record: Callable[[dict[str, Any]], None],
        log: pathlib.Path,
    ):
        self.left, self._until, self._record, self._log = list(items), until, record, log
        self._lock = threading.Lock()

    def run(self, workers: int = WORKERS) -> None:
        """Returns when all is measured, or the time is up; `left` is what was not begun."""
        threads = [
            threading.Thread(target=self._work, args=(self._log / f"worker{i}.log",)) for i in range(workers)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _next(self) -> Item | None:
        with self._lock:
            in_time = time.monotonic() < self._until
            return self.left.pop(0) if self.left and in_time else None

    def _work(self, log: pathlib.Path) -> None:
        worker: Worker | None = None
        while (wanted := self._next()) is not None:
            worker = worker or Worker(log)
            figures = worker.ask(wanted, self._until + GRACE_S)
            if "error" in figures:  # its device may be of no more use
                worker = None
            with self._lock:
                self._record({"op": wanted["op"], "name": wanted["name"], **figures})
        if worker is not None:
            worker.close()
