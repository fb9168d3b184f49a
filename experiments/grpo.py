"""Reinforcement learning from rewards that rules give: `python -m experiments.grpo --config=configs/tiny_grpo.py`.

Starts from the weights of `train.init_from`, a run of `experiments.sft` or a Hugging Face folder, whose tokenizer and chat
template it takes. Everything else is as in `experiments.train`: resumed by itself, SIGTERM and Ctrl-C save and exit (between two
rollouts), several processes share the prompts.

At the end it prints the share of right answers to held-out questions (pass@1, and pass@k of the best of k), the worst and the
best of these answers, and draws `report.png`.
"""

from collections.abc import Sequence
from typing import Any

from deepseek_jax.posttraining.grpo_settings import GRPOConfig
from experiments import command_line, train


def _trainer(cfg: GRPOConfig) -> Any:
    from deepseek_jax.posttraining.grpo import GRPO

    return GRPO(cfg)


def _finish(command: train.Command, trainer: Any, result: Any, weights: Any) -> None:
    """Reports a finished run."""
    found, out_dir = result.evaluation, trainer.out_dir
    print(f"\nheld-out questions: pass@1 {found.pass_at_1:.1%}, pass@{found.k} {found.pass_at_k:.1%}")


COMMAND = train.Command("configs/tiny_grpo.py", GRPOConfig, _trainer, None, "", _finish)


def main(argv: Sequence[str]) -> int:
    return train.main(argv, COMMAND)


if __name__ == "__main__":
    command_line.run(main)
