"""Rewards by name, as configs name them: `rewards_named(("answer=1", "format_tagged=0.2"), settings)`."""

import dataclasses
import importlib
import inspect
import os
from collections.abc import Callable, Mapping, Sequence

from deepseek_jax.checks import choice, ranges, require, shown
from deepseek_jax.posttraining.rewards import code, rules
from deepseek_jax.posttraining.rewards.combination import RewardFunction, Rewards, Weighted
from deepseek_jax.posttraining.rewards.verl import of_verl
from deepseek_jax.posttraining.sandbox import Limits, Sandbox


@dataclasses.dataclass(frozen=True)
class RewardConfig:
    """What the rewards of a run are told."""

    tolerance: float = 1e-4  # of "numeric", relative to the truth
    longest: int = 1024  # tokens of an answer from which "overlong" is -1
    margin: int = 256  # tokens before `longest` over which "overlong" falls from 0 to -1
    language: str = "en"  # of "language": that the reasoning should be in
    code_seconds: float = 10.0  # that "code" gives a program and its tests, on the wall's clock
    code_memory_mb: int = 512  # that "code" gives each process of a program
    code_workers: int = 0  # programs that "code" tests at the same time; 0: one per CPU
    # let "code" run a model's programs with limits alone, where no sandbox can be built
    unsandboxed: bool = False

    def __post_init__(self):
        ranges("reward", self, "longest margin", 1, 1 << 31)
        ranges("reward", self, "code_workers", 0, 1 << 16)
        ranges("reward", self, "tolerance", 0, 1)

    def limits(self) -> Limits:
        """Of a program that is tested."""
        return Limits(seconds=self.code_seconds, memory_mb=self.code_memory_mb)


_GIVEN = ("prompts", "completions", "completion_ids")


def _code(cfg: RewardConfig) -> RewardFunction:
    return code.code(Sandbox(cfg.limits(), cfg.unsandboxed), cfg.code_workers or os.cpu_count() or 1)


_MAKERS: dict[str, Callable[[RewardConfig], RewardFunction]] = {
    "answer": lambda cfg: rules.answer,
    "boxed": lambda cfg: rules.boxed,
    "tagged": lambda cfg: rules.tagged,
    "numeric": lambda cfg: rules.numeric(cfg.tolerance),
    "format_tagged": lambda cfg: rules.format_tagged,
    "format_boxed": lambda cfg: rules.format_boxed,
    "format_code": lambda cfg: rules.format_code,
    "overlong": lambda cfg: rules.overlong(cfg.longest, cfg.margin),
    "language": lambda cfg: rules.language(cfg.language),
    "code": _code,
    "coin": lambda cfg: rules.coin,
}


def rewards_named(
    named: Sequence[str], cfg: RewardConfig | None = None, more: Mapping[str, RewardFunction] | None = None
) -> Rewards:
    """The rewards that "NAME" or "NAME=WEIGHT" name; a weight that is not said is 1.

    NAME is one of this catalogue or of `more` (a judge, which needs a model), "package.module:function" for a function
    of one's own, or "verl:package.module:function" for a `compute_score`.

    Raises ValueError: no such name, module or function; a weight that is no number; what a reward refuses.
    """
    return Rewards(_weighted(entry, cfg or RewardConfig(), dict(more or {})) for entry in named)


def _weighted(entry: str, cfg: RewardConfig, more: dict[str, RewardFunction]) -> Weighted:
    name, equals, text = entry.partition("=")
    try:
        weight = float(text) if equals else 1.0
    except ValueError:
        raise ValueError(f'reward {shown(entry)} should be "NAME" or "NAME=WEIGHT"') from None
    if name in more:
        return Weighted(name, weight, more[name])
    if ":" in name:
        return Weighted(name, weight, _own(name))
    require(name != "judge", 'reward "judge" asks a model: name one by judge.model')
    choice("reward", name, (*_MAKERS, *more, "module:function"))  # the last: of one's own
    return Weighted(name, weight, _MAKERS[name](cfg))


def _own(name: str) -> RewardFunction:
    """The function that "module:function" or "verl:module:function" names."""
    of, path = ("verl", name.removeprefix("verl:")) if name.startswith("verl:") else ("", name)
    module, _, function = path.partition(":")
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f'reward {shown(name)} should be "package.module:function": {error}') from error
    require(callable(found), f"reward {shown(name)} is no function")
    if of:
        return of_verl(found)
    takes = inspect.signature(found)
    try:
        takes.bind(**dict.fromkeys(_GIVEN), **dict.fromkeys(_required(takes)))
    except TypeError as error:
        raise ValueError(
            f"reward {shown(name)} takes {takes}, and is called with prompts, completions, completion_ids and the columns of the rows "
            f"by these names ({error}): define it as f(prompts, completions, completion_ids, **columns)"
        ) from error
    return found


def _required(takes: inspect.Signature) -> list[str]:
    """What a reward asks of the columns."""
    return [
        name
        for name, p in takes.parameters.items()
        if name not in _GIVEN and p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    ]
