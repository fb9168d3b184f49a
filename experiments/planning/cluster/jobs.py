"""A request on its way through the cluster."""

import dataclasses

from deepseek_jax.serving.router.choice import Sent
from experiments.planning.cluster.demand import Asked


@dataclasses.dataclass(eq=False)
class Job:
    """Times in seconds of the simulation; -1: not yet.

    Attributes:
        prompt: token ids; keys: of its pages. answer: token ids that will be drawn.
        followed: its answer is simulated; else the rank that would draw it is one of those that are not.
        cached: tokens of the prompt that prefill did not compute.
        queued: when its prompt began to be computed; prefilled: when it was; joined: when decode had its latents; first: when
            its first token was drawn; end: its last.
        tries: how often it was sent.
    """

    id: str
    asked: Asked
    arrival: float
    prompt: list[int]
    keys: list[bytes]
    answer: list[int]
    followed: bool = True
    sent: Sent | None = None
    cached: int = 0
    queued: float = -1.0
    prefilled: float = -1.0
    joined: float = -1.0
    first: float = -1.0
    end: float = -1.0
    tries: int = 0

    @property
    def wait(self) -> float:
        """Until the first token."""
        return self.first - self.arrival

    @property
    def speed(self) -> float:
        """Tokens per second after the first."""
        return (len(self.answer) - 1) / (self.end - self.first) if len(self.answer) > 1 else 0.0
