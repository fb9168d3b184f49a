"""Sentences say how the config of a resumed run differs from the config in its checkpoint."""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from flax.traverse_util import flatten_dict

from deepseek_jax.checks import names_that_differ, plain, shown
from deepseek_jax.config import Config, to_dict

# Where a run lies and how its processes meet changes nothing in it.
_PLACES = ("train.out_dir", "train.wandb", "data.cache_dir", "distributed.")
# What `Schedules` reads: another value moves the boundaries of all schedules, or their heights.
_OF_SCHEDULE = ("optimizer.", "train.steps", "train.batch_size", "data.seq_len")


class Changes(NamedTuple):
    """Sentences like "train.steps was 20, is 40": of the keys that bend the schedules, and of the others."""

    schedule: list[str]
    other: list[str]


def config_changes(saved: Mapping[str, Any], config: Config) -> Changes:
    """Compares a checkpoint's config with `config`. A key that the checkpoint lacks had its default."""
    defaults, now = (_flat(to_dict(c)) for c in (Config(), config))
    before = defaults | _flat(saved)
    found = Changes([], [])
    for key, value in now.items():
        if before[key] != value and not key.startswith(_PLACES):
            sentences = found.schedule if key.startswith(_OF_SCHEDULE) else found.other
            sentences.append(f"{key} was {shown(before[key])}, is {shown(value)}")
    return found


def differing(there: Mapping[str, Any], here: Mapping[str, Any], path: str = "") -> list[str]:
    """Sentences like "model.dtype is 'bfloat16' there, 'float32' here", one for each key that differs."""
    a, b = _flat(there), _flat(here)
    return [
        f"{plain(path + key)} is {shown(a.get(key))} there, {shown(b.get(key))} here"
        for key in names_that_differ(a, b)
    ]


def _flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """{"train": {"steps": 3}} -> {"train.steps": 3}, with the types that JSON has."""
    return flatten_dict(json.loads(json.dumps(config)), sep=".")
