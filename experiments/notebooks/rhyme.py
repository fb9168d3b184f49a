"""The notebooks' small model: DeepSeek-V3 with 2 layers, trained on one nursery rhyme.

"The house that Jack built" repeats itself, so 160,000 parameters learn it within a minute on two
CPU cores, and its next words are easy for the MTP module to guess.
"""

import io
from pathlib import Path

from deepseek_jax.config import Config, from_config_dict
from deepseek_jax.training.loop import Evaluation, Trainer

_LINES = (
    "the house that Jack built",
    "the malt that lay in",
    "the rat that ate",
    "the cat that killed",
    "the dog that worried",
    "the cow with the crumpled horn that tossed",
    "the maiden all forlorn that milked",
    "the man all tattered and torn that kissed",
    "the priest all shaven and shorn that married",
    "the cock that crowed in the morn that waked",
    "the farmer sowing his corn that kept",
)
RHYME = "\n".join("This is " + "\n".join(_LINES[n::-1]) + ".\n" for n in range(len(_LINES)))


def config(folder: str | Path) -> Config:
    """Returns the config of the run in `folder`: 2 layers, 8 routed experts, one MTP module."""
    folder = Path(folder)
    return from_config_dict(
        {
            "model": {
                "vocab_size": 384,
                "hidden_size": 64,
                "num_hidden_layers": 2,
                "first_k_dense_replace": 1,
                "intermediate_size": 128,
                "num_attention_heads": 4,
                "q_lora_rank": 32,
                "kv_lora_rank": 32,
                "qk_nope_head_dim": 16,
                "qk_rope_head_dim": 8,
                "v_head_dim": 16,
                "moe_intermediate_size": 32,
                "n_routed_experts": 8,
                "num_experts_per_tok": 2,
                "n_group": 4,
                "topk_group": 2,
                "max_position_embeddings": 512,
                "initializer_range": 0.05,
            },
            "data": {
                "source": str(folder / "text" / "train.txt"),
                "validation": str(folder / "text" / "validation.txt"),
                "vocab_size": 384,
                "seq_len": 64,
                "fim_rate": 0.0,
                "cache_dir": str(folder / "cache"),
            },
            "optimizer": {"peak_lr": 6e-3, "mid_lr": 6e-4, "final_lr": 3e-4, "batch_start": 8, "gamma": 0.01},
            "train": {
                "steps": 80,
                "batch_size": 8,
                "loss_chunk": 512,
                "eval_every": 1000,
                "checkpoint_every": 20,
                "keep": 4,
                "ema_decay": 0.8,
                "out_dir": str(folder),
            },
        }
    )


def train(folder: str | Path) -> Evaluation:
    """Trains in `folder`, an empty one, with a checkpoint every 20 steps; returns the final evaluation.

    The validation text is the rhyme itself: the aim is a model that knows it by heart.
    """
    text = Path(folder) / "text"
    text.mkdir(parents=True)
    (text / "train.txt").write_text(RHYME * 8, encoding="utf-8")
    (text / "validation.txt").write_text(RHYME, encoding="utf-8")
    trainer = Trainer(config(folder))
    try:
        result = trainer.run(progress_file=io.StringIO())
    finally:
        trainer.close()
    assert result.evaluation is not None
    return result.evaluation
