"""Runs that go on from weights."""

import dataclasses

from deepseek_jax.checkpoints.files import run_folder
from deepseek_jax.config import Config


@dataclasses.dataclass(frozen=True)
class FromWeights(Config):
    """The config of a run that starts from `train.init_from`. Without data.tokenizer, it takes that of these weights."""

    def __post_init__(self):
        if self.data.tokenizer is None and self.train.init_from:
            data = dataclasses.replace(self.data, tokenizer=run_folder(self.train.init_from))
            object.__setattr__(self, "data", data)
        super().__post_init__()
