"""Let a model write training data: `python -m experiments.distill --config=configs/tiny_distill.py`.

An expert, a run of `experiments.grpo` or a Hugging Face folder, answers each problem several times. Rewards say which answers are
right; of these, style and length decide which are kept. The output folder gets `sft.jsonl`, for `experiments.sft`, with two samples
per problem (its original answer; a system prompt and the expert's); a card of counts, lengths and reasons of rejection (`card.json`,
`card.md`); and accuracy against length (`length.png`). `--config.judgements` writes `judgements.jsonl`, which makes a judge of an SFT
checkpoint.

What was drawn stays: the command goes on where it was cut off, and with other settings of `select` it draws nothing anew.
"""

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deepseek_jax.posttraining.distill import DistillConfig
from experiments import command_line, config_flag

DEFAULT_CONFIG = "configs/tiny_distill.py"


def _tell(cfg: DistillConfig, card: dict[str, Any]) -> None:
    accuracy, lengths = card["accuracy"], card["tokens of answers"]
    right = "" if accuracy is None else f", {accuracy['mean']:.1%} ± {accuracy['error']:.1%} right"
    print(f"{card['answers']:,} answers to {card['problems']:,} problems{right}")
    print(
        f"kept: {card['kept']:,}, of {lengths['kept']['mean']:.1f} tokens; all right ones have {lengths['right']['mean']:.1f}"
    )
    print("rejected: " + (", ".join(f"{n:,} {reason}" for reason, n in card["rejected"].items()) or "none"))
    for kind, of_kind in card["rows"].items():
        print(f"rows, {kind}: {of_kind['rows']:,}, {of_kind['learned tokens']:,} tokens to learn")
    folder = Path(cfg.out_dir)
    print(f"data: {folder / 'sft.jsonl'}\ncard: {folder / 'card.md'}\npicture: {folder / 'length.png'}")


def main(argv: Sequence[str]) -> int:
    cfg = config_flag.parse(argv, DEFAULT_CONFIG, whole=DistillConfig)
    from deepseek_jax.posttraining.distill import run
    from deepseek_jax.training.run_lock import RunLock

    with contextlib.ExitStack() as stack:
        stack.callback(RunLock(Path(cfg.out_dir)).release)
        card = run(cfg)
    _tell(cfg, card)
    return 0


if __name__ == "__main__":
    command_line.run(main)
