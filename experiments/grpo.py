"""Reinforcement learning from rewards that rules give: `python -m experiments.grpo --config=configs/tiny_grpo.py`.

Starts from the weights of `train.init_from`, a run of `experiments.sft` or a Hugging Face folder, whose tokenizer and chat
template it takes. Everything else is as in `experiments.train`: resumed by itself, SIGTERM and Ctrl-C save and exit (between two
rollouts), several processes share the prompts.

At the end it prints the share of right answers to held-out questions (pass@1, and pass@k of the best of k), the worst and the
best of these answers, and draws `report.png`.
"""

from collections.abc import Sequence
from typing import Any

from absl import flags

from deepseek_jax import now
from deepseek_jax.posttraining.grpo_settings import GRPOConfig
from experiments import command_line, train

flags.adopt_module_key_flags(train)


def _trainer(cfg: GRPOConfig) -> Any:
    from deepseek_jax.posttraining.grpo import GRPO

    return GRPO(cfg)


def _finish(command: train.Command, trainer: Any, result: Any, weights: Any) -> None:
    """Reports a finished run."""
    from deepseek_jax.posttraining.experience import ends
    from deepseek_jax.posttraining.grpo_report import write_grpo_report
    from deepseek_jax.training.metrics import METRICS_FILE, read_records

    found, out_dir = result.evaluation, trainer.out_dir
    texts = ends(trainer.last_held_out, trainer.cfg.rollouts.samples_shown)
    trainer.records.samples(result.step, texts)
    for name, text in texts.items():
        print(f"\n--- held-out question, {name} ".ljust(76, "-"))
        print(text)
    print("-" * 75)
    with now.doing("drawing the picture"):
        write_grpo_report(read_records(out_dir / METRICS_FILE), out_dir / "report.png", out_dir.name)
    print(f"held-out questions: pass@1 {found.pass_at_1:.1%}, pass@{found.k} {found.pass_at_k:.1%}")
    print(f"picture: {out_dir / 'report.png'}\nmetrics: {out_dir / METRICS_FILE}, {out_dir / 'tensorboard'}")
    print(f"checkpoints: {out_dir / 'checkpoints'}", flush=True)


def _step(cfg: GRPOConfig, mesh: Any) -> tuple[Any, Any]:
    from deepseek_jax.posttraining.experience import abstract_rows
    from deepseek_jax.posttraining.grpo import make_step

    return make_step(cfg, mesh), abstract_rows(cfg, mesh)


COMMAND = train.Command("configs/tiny_grpo.py", GRPOConfig, _trainer, None, "", _finish, _step)


def main(argv: Sequence[str]) -> int:
    return train.main(argv, COMMAND)


if __name__ == "__main__":
    command_line.run(main)
