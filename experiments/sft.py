"""Fine-tune a model on conversations: `python -m experiments.sft --config=configs/tiny_sft.py`.

Starts from the weights of `train.init_from` and learns the answers of `sft.sources`: files of rows (messages, prompt and
completion, or text), or generated tasks, as "tasks:addition/2". Otherwise it is `experiments.train`: flags, resuming, stopping
and several processes are the same. At the end it answers held-out conversations.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags

from deepseek_jax import now
from deepseek_jax.posttraining.sft import SFTConfig
from experiments import command_line, train

flags.adopt_module_key_flags(train)


def _tuner(cfg: SFTConfig) -> Any:
    from deepseek_jax.posttraining.sft import Tuner

    return Tuner(cfg)


def _answers(trainer, params, bias) -> Mapping[str, str]:
    from experiments.answers import answers

    with now.doing("answering held-out conversations, for which programs are compiled"):
        return answers(trainer.cfg, params, bias, trainer.data.tokenizer, trainer.data.validation)


SUPERVISED = train.Command(
    "configs/tiny_sft.py",
    SFTConfig,
    _tuner,
    _answers,
    "held out: {}, from >> on the model's ",
)


def main(argv: Sequence[str]) -> int:
    return train.main(argv, SUPERVISED)


if __name__ == "__main__":
    command_line.run(main)
