"""All keys of a unit that serves, with their defaults, and DeepSeek-V3 as it is published."""

import dataclasses

import ml_collections

from deepseek_jax.model_config import YarnConfig
from deepseek_jax.serving.deployment import Deployment


def defaults() -> ml_collections.ConfigDict:
    """The defaults of `deepseek_jax.serving.deployment.Deployment` as a ConfigDict; V3 in BF16 with YaRN, for 160K tokens."""
    config = ml_collections.ConfigDict(dataclasses.asdict(Deployment()))
    config.model.dtype = "bfloat16"
    config.model.max_position_embeddings = 163_840
    config.model.rope_scaling = dataclasses.asdict(YarnConfig())
    return config
