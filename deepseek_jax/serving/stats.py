"""What an engine counts."""

import collections
import dataclasses


@dataclasses.dataclass
class Stats:
    """Counts since the start; of tokens but for requests, steps, drafts (of one token each) and preemptions. in_two: steps with
    a program whose rows were in two halves, whose exchange is beside computing. ended: requests by finish reason."""

    steps: int = 0
    in_two: int = 0
    prompt: int = 0
    generated: int = 0
    cache_queries: int = 0
    cache_hits: int = 0
    preemptions: int = 0
    drafts: int = 0
    drafted: int = 0
    accepted: int = 0
    ended: collections.Counter = dataclasses.field(default_factory=collections.Counter)
