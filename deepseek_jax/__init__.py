"""DeepSeek-V3 as a whole system in JAX.

deepseek_jax.load(path) -> Model       a checkpoint, ready to generate and score
DeepSeekV3(cfg).apply(...)             the model as a Linen module
ModelConfig                            any model of the family; counts of parameters, FLOPs, cache bytes
"""

from deepseek_jax import hf
from deepseek_jax.config import Config, MeshConfig, ModelConfig, from_config_dict
from deepseek_jax.inference.loading import load
from deepseek_jax.inference.model import Model
from deepseek_jax.model.modules import DeepSeekV3

__all__ = [
    "Config",
    "DeepSeekV3",
    "MeshConfig",
    "Model",
    "ModelConfig",
    "from_config_dict",
    "hf",
    "load",
]
