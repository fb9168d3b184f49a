"""All keys of a config with their defaults, so that any of them can be overridden on the command line."""

import dataclasses

import ml_collections

from deepseek_jax.config import Config


def defaults() -> ml_collections.ConfigDict:
    """The defaults of `deepseek_jax.config.Config` as a ConfigDict."""
    return ml_collections.ConfigDict(dataclasses.asdict(Config()))
