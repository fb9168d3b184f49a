"""An engine over a mesh of several processes: process 0 has requests and schedulers, the others launch what it launches.

So the plan of a step is one by construction, all wait idly while there is no request, and none can be out of step. What a step
asks of process 0's host grows with the ranks; what travels to the others is the plan, some kB.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from deepseek_jax.parallel.processes.leading import Follower, Leader
from deepseek_jax.serving.over_mesh import OverMesh


class Leading(OverMesh):
    """On process 0: as `OverMesh`. say: see `Leader`."""

    def __init__(self, *args: Any, say: Callable[[str], None], **options: Any):
        super().__init__(*args, **options)
        self._leader = Leader(say)

    def _admit(self, *args: Any) -> None:
        self._leader.tell(("_admit", args))
        super()._admit(*args)

    def decode(self, rows: Any, most: int | None, times: int = 1) -> Any:
        self._leader.tell(("decode", (_sendable(rows), most, times)))
        return super().decode(rows, most, times)

    def decode_pairs(self, rows: Any, most: int | None, times: int = 1) -> Any:
        self._leader.tell(("decode_pairs", (_sendable(rows), most, times)))
        return super().decode_pairs(rows, most, times)

    def prefill(self, chunks: Any, most: int | None) -> Any:
        self._leader.tell(("prefill", (_sendable(chunks), most)))
        return super().prefill(chunks, most)

    def move(self, layer: int, physical_p: Any) -> None:
        self._leader.tell(("move", (layer, physical_p)))
        super().move(layer, physical_p)

    def loads(self) -> Any:
        self._leader.tell(("loads", ()))
        return super().loads()

    def export(self, rank: int, pages: list[int]) -> Any:
        self._leader.tell(("export", (rank, pages)))
        return super().export(rank, pages)

    def bring(self, rank: int, pages: list[int], block: Any) -> None:
        self._leader.tell(("bring", (rank, pages, np.asarray(block))))
        super().bring(rank, pages, block)

    def close(self) -> None:
        self._leader.close()


class Following(OverMesh):
    """On the other processes. say: see `Follower`."""

    def __init__(self, *args: Any, say: Callable[[str], None], **options: Any):
        super().__init__(*args, **options)
        self._follower = Follower(say)

    def follow(self) -> None:
        """Launches what process 0 does, until that one is closed."""
        self._follower.follow(self._do)

    def _do(self, message: tuple[str, tuple[Any, ...]]) -> None:
        name, args = message
        getattr(self, name)(*args)


def _sendable(plan: Any) -> Any:
    """Without the mask that lets everything come, which lies on the devices."""
    return plan if isinstance(plan.mask_rw, np.ndarray) else plan._replace(mask_rw=None)
