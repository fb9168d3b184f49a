"""What the engine has on its way: programs that were launched, and requests that run."""

import dataclasses
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from deepseek_jax.serving.request import PromptToken, Token
from deepseek_jax.serving.steps import Running


class Flight(NamedTuple):
    """A program that was launched, so many times one after the other (`pace.py` has the names): whose rows it has, by (row,
    chunk or decode row), and its results on the device: what was drawn, one token of each row or a pair. table_rn: of chunks,
    the pages of the rows' sequences."""

    program: tuple[Any, ...]
    times: int
    rows: Sequence[tuple[int, Any]]
    drawn: Any
    given: Any
    version: int
    table_rn: Any = None


@dataclasses.dataclass
class Record:
    """What the engine has of a request beside the scheduler. paged: pages that the device knows of; given, routes: of the prompt;
    asked: when it came; queued: seconds from then until it ran first."""

    running: Running
    rank: int
    paged: int = 0
    new: list[Token] = dataclasses.field(default_factory=list)
    given: dict[int, PromptToken] = dataclasses.field(default_factory=dict)
    told_prompt: bool = False
    routes: Any = None
    asked: float = dataclasses.field(default_factory=time.monotonic)
    queued: float | None = None
