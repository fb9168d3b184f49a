"""Supervised fine-tuning (report section 5.1): a run of `training/loop.py` that starts from weights and reads conversations.

Loss, micro-batches, checkpoints, records and several processes are those of pre-training: its objective counts the labels
that a batch's "loss_mask" leaves, over the whole batch (`training/labels.py`), MTP depths likewise. What is here: the
config, where the conversations come from, and how long "so many epochs" is.
"""

import dataclasses
import functools
import math
from pathlib import Path

from deepseek_jax import data as data_lib
from deepseek_jax.checks import ranges, require
from deepseek_jax.config import Config
from deepseek_jax.data import supervised
from deepseek_jax.data.supervised import SupervisedConfig
from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.posttraining.from_weights import FromWeights
from deepseek_jax.posttraining.task_files import check_tasks, in_files
from deepseek_jax.training.loop import Trainer
from deepseek_jax.training.preflight import check_vocabulary


@dataclasses.dataclass(frozen=True)
class LearningConfig(SupervisedConfig):
    """What is learned, and for how long. Sources are files, or generated tasks as "tasks:addition/2" (`tasks.py`)."""

    # how often each sample is learned, on average, which decides train.steps; 0: train.steps stands
    epochs: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        ranges("sft", self, "epochs", 0, 1e6)


@dataclasses.dataclass(frozen=True)
class SFTConfig(FromWeights):
    """Of a run of supervised fine-tuning."""

    sft: LearningConfig = dataclasses.field(default_factory=LearningConfig)

    def __post_init__(self):
        super().__post_init__()
        check_tasks(self.sft.sources, self.sft.validation, "sft.sources")

    @property
    def remarks(self) -> tuple[str, ...]:
        """As `Config.remarks`."""
        epochs = self.sft.epochs
        said = f"sft.epochs={epochs:g}: the conversations decide how many steps; train.steps={self.train.steps} stands for them"
        return (said,) if epochs else ()

    @property
    def batch_arrays(self) -> dict[str, str]:
        """As `Config.batch_arrays`."""
        whole = dict.fromkeys(("tokens", "segments", "positions"), "int32")
        return whole | dict.fromkeys(("loss_mask", "padding"), "bool")


class Tuner(Trainer):
    """A run of supervised fine-tuning. Arguments and errors are those of `Trainer`; cfg: an `SFTConfig`."""

    cfg: SFTConfig

    def check(self) -> None:
        """As `Trainer.check`; raises ValueError for no weights to start from, too."""
        start = self.cfg.train.init_from
        if self.checkpointer.latest() is None:
            require(
                bool(start),
                "train.init_from is empty, and fine-tuning starts from weights: name a run, one of its checkpoints or a "
                "Hugging Face folder, as --config.train.init_from=runs/tiny",
            )
            there = Path(start).expanduser().exists()
            require(there, f"train.init_from={start} does not exist: train it first, or name other weights")
        super().check()

    @functools.cached_property
    def data(self) -> data_lib.Data:
        """The conversations. Reading them decides how many steps `sft.epochs` are. Raises ValueError for what cannot be read,
        or does not fit the model."""
        cfg = self.cfg
        require(
            cfg.data.tokenizer is not None, "data.tokenizer is not set, nor train.init_from, which has one"
        )
        tokenizer = Tokenizer.load(str(cfg.data.tokenizer))
        check_vocabulary(cfg, tokenizer)
        cache = Path(cfg.data.cache_dir).expanduser()
        data = supervised.load(
            in_files(cfg.sft, cache, "sft.sources"), tokenizer, cfg.data.seq_len, cache, *self.feed.share
        )
        assert isinstance(data.report, supervised.SupervisedReport)
        if cfg.sft.epochs:
            steps = max(1, math.ceil(cfg.sft.epochs * data.report.windows / cfg.train.batch_size))
            self.cfg = dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, steps=steps))
            super()._schedule(self.cfg)
        return data

    def _schedule(self, cfg: Config) -> None:
        """Of enough steps for any warm-up, where the data will say how many there are."""
        assert isinstance(cfg, SFTConfig)
        if cfg.sft.epochs:
            steps = max(cfg.train.steps, 100 * (cfg.optimizer.warmup_steps + 1))
            cfg = dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, steps=steps))
        super()._schedule(cfg)
