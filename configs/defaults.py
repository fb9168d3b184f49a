"""All keys of a config with their defaults, so that any of them can be overridden on the command line."""

import dataclasses
from typing import Any

import ml_collections

from deepseek_jax.config import Config


def defaults(whole: Any = Config) -> ml_collections.ConfigDict:
    """The defaults of `deepseek_jax.config.Config`, or of a dataclass that derives from it, as a ConfigDict."""
    return ml_collections.ConfigDict(dataclasses.asdict(whole()))
