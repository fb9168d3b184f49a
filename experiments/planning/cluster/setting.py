"""What a simulated cluster is: model, GPUs, units, demand, and by what rule units are added and freed."""

import dataclasses
import functools
import math
from collections.abc import Callable

from deepseek_jax.config import ModelConfig
from experiments.planning.cluster.clock import Clock, Work, decode_clock, prefill_clock
from experiments.planning.cluster.demand import PAGE, Day
from experiments.planning.hardware import H800, Hardware
from experiments.planning.serving_weights import weight_bytes
from experiments.planning.units import Unit, deployment_of

HOURS = 24
SLOTS = 512  # sequences that a decode device may run; pages bound them before
SPARE = 0.9  # of a GPU's memory, for weights and pages; the rest is for activations and buffers


@dataclasses.dataclass(frozen=True)
class Setting:
    """Attributes:
    prefill, decode: units. prefill_slow, decode_slow: the constants that times of steps are multiplied by.
    budget: tokens of a prefill device in a step. DeepSeek's profile of prefill has as many.
    speed: tokens per second of a user; as many decode units run as keep this. Published: 20 to 22.
    busy: share of what prefill units could compute that they are asked for. Assumed.
    uneven: seconds of a full prefill step over those where all devices are alike, as it is measured (`full.py: uneven`).
    balanced: prefill divides prompts among its devices as DeepSeek says it does; else as this engine does.
    acceptance: of drafts, where `decode.drafts`.
    kept: minutes of new tokens that the cache on disk holds.
    """

    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    hardware: Hardware = H800
    prefill: Unit = dataclasses.field(default_factory=lambda: Unit(nodes=4, experts=9))
    decode: Unit = dataclasses.field(default_factory=lambda: Unit(nodes=18, experts=2))
    day: Day = dataclasses.field(default_factory=Day)
    prefill_slow: float = 1.0
    decode_slow: float = 1.0
    budget: int = 16_384
    speed: float = 20.0
    busy: float = 0.85
    uneven: float = 1.0
    balanced: bool = True
    acceptance: float = 0.0
    kept: float = 10.0

    # --- times ----------------------------------------------------------------------------------------------------

    @functools.cached_property
    def prefill_clock(self) -> Clock:
        return prefill_clock(self.model, self.prefill, self.hardware, self.day.text, self.prefill_slow)

    @functools.cached_property
    def decode_clock(self) -> Clock:
        return decode_clock(self.model, self.decode, self.hardware, self.decode_slow)

    @property
    def token_bytes(self) -> int:
        """Bytes of a token's latents."""
        return self.decode.latent(self.model) * (self.model.num_hidden_layers + self.decode.drafts)

    def transfer(self, tokens: int) -> float:
        """Seconds from the end of a prompt's last chunk, of so many tokens, until its latents lie in the decode unit: those
        before it travelled meanwhile."""
        return tokens * self.token_bytes / self.hardware.nic.reached

    # --- pages ----------------------------------------------------------------------------------------------------

    def pages(self, unit: Unit) -> int:
        """Of a device."""
        room = SPARE * self.hardware.usable - sum(weight_bytes(deployment_of(unit, self.model)).values())
        pages = int(room // (PAGE * self.token_bytes))
        if pages < 1:
            raise ValueError(
                f"a unit of {unit.devices} {self.hardware.name} with {unit.experts} experts on each has no memory for latents: "
                "take more devices"
            )
        return pages

    # --- how many units -------------------------------------------------------------------------------------------

    @functools.cached_property
    def rows(self) -> float:
        """Of a decode device at the speed that users are to have: as many as memory holds, at most."""
        per_step = 1 + self.acceptance * self.decode.drafts
        most = min(SLOTS, self.pages(self.decode) * PAGE / self.day.context)
        low, high = 1.0, most
        for _ in range(30):
            rows = (low + high) / 2
            enough = per_step / self.decode_clock.even(Work(rows, self.day.context)) >= self.speed
            low, high = (rows, high) if enough else (low, rows)
        return low

    def rows_for(self, rate: float) -> float:
        """Sequences on a decode device that draws so many tokens per second, as many as have a slot at most."""
        low, high = 0.0, float(SLOTS)
        for _ in range(30):
            rows = (low + high) / 2
            drawn = (
                rows
                * (1 + self.acceptance * self.decode.drafts)
                / self.decode_clock.even(Work(rows, self.day.context))
            )
            low, high = (rows, high) if drawn < rate else (low, rows)
        return low

    @functools.cached_property
    def decode_rate(self) -> float:
        """Tokens per second of a decode unit at `rows`."""
        per_step = 1 + self.acceptance * self.decode.drafts
        step = self.decode_clock.even(Work(self.rows, self.day.context))
        return self.decode.devices * self.rows * per_step / step

    @functools.cached_property
    def prefill_rate(self) -> float:
        """Tokens per second that a prefill unit could compute, without those that the cache has."""
        step = self.uneven * self.prefill_clock.even(Work(self.budget, self.day.attended))
        return self.prefill.devices * self.budget / step

    def units(self, hour: int) -> tuple[int, int]:
        """Prefill and decode units that run in an hour."""
        day, load = self.day, self.day.load(hour + 0.5) / 86_400
        prompts = day.input * (1 - day.hits) * load / (self.busy * self.prefill_rate)
        answers = day.output * load / self.decode_rate
        return max(1, math.ceil(prompts)), max(1, math.ceil(answers))

    def nodes(self, hour: int) -> tuple[int, int]:
        prefill, decode = self.units(hour)
        return prefill * nodes_of(self.prefill), decode * nodes_of(self.decode)

    def mean_nodes(self) -> tuple[float, float]:
        of_hours = [self.nodes(hour) for hour in range(HOURS)]
        return sum(p for p, _ in of_hours) / HOURS, sum(d for _, d in of_hours) / HOURS


def nodes_of(unit: Unit) -> int:
    """Of eight GPUs."""
    return max(1, unit.devices // 8)


def fitted(setting: Setting, prefill: float, decode: float) -> Setting:
    """With the constants at which the day's units give so many tokens per second and node: input with what the cache has,
    and output."""

    def solve(which: int, wanted: float, with_slow: Callable[[float], Setting]) -> float:
        total = (setting.day.input, setting.day.output)[which] / 86_400
        low, high = 0.2, 5.0
        for _ in range(24):
            slow = (low * high) ** 0.5
            enough = total / with_slow(slow).mean_nodes()[which] > wanted
            low, high = (slow, high) if enough else (low, slow)
        return low

    return dataclasses.replace(
        setting,
        prefill_slow=solve(0, prefill, lambda slow: dataclasses.replace(setting, prefill_slow=slow)),
        decode_slow=solve(1, decode, lambda slow: dataclasses.replace(setting, decode_slow=slow)),
    )
