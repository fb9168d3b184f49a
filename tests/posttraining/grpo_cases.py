"""A GRPO run of a tiny model: two updates to a rollout, rewards that random answers differ in."""

import dataclasses
from pathlib import Path
from typing import Any

import jax

from deepseek_jax import hf
from deepseek_jax.checks import build
from deepseek_jax.data import Tokenizer
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.posttraining.grpo import GRPO
from deepseek_jax.posttraining.grpo_settings import GRPOConfig
from tests.golden.config import HERE
from tests.oracle.tiny import weights
from tests.tiny_run import tiny

MODEL = {
    "initializer_range": 0.2,
    "num_hidden_layers": 1,
    "first_k_dense_replace": 0,
    "num_nextn_predict_layers": 0,
}
CFG = tiny(model=MODEL)
ROLLOUTS = {
    "samples": 2,
    "updates": 2,
    "max_tokens": 12,
    "rows": 2,
    "buckets": 1,
    "eval_prompts": 2,
    "eval_samples": 2,
    "reference_every": 2,
}


def even(prompts: Any, completions: Any, completion_ids: Any, **columns: Any) -> list[float]:
    """A reward: 1 for answers whose first id is even, and a little for short ones."""
    return [float(ids[0] % 2 == 0) - 0.01 * len(ids) for ids in completion_ids]


def config(folder: Path, train: Any = None, **sections: Any) -> GRPOConfig:
    """In `folder`: weights in base, output in run. The weights are written once."""
    base = folder / "base"
    if not base.exists():
        params, bias = weights(CFG.model, 1)
        tokenizer = Tokenizer.load(HERE / "tokenizer.json")
        hf.save(base, CFG.model, params, bias, format="f32", tokenizer=tokenizer)
    values = dataclasses.asdict(CFG)
    values["data"] |= {"cache_dir": str(folder / "cache"), "seq_len": 48}
    values["optimizer"] |= {"schedule": "constant", "warmup_steps": 0, "gamma": 0.0}
    values["train"] |= {
        "init_from": str(base),
        "out_dir": str(folder / "run"),
        "steps": 4,
        "batch_size": 4,
        "checkpoint_every": 2,
        "eval_every": 2,
        "ema_every": 1,
        "detached_mtp": True,
        **(train or {}),
    }
    values |= {
        "prompts": {"sources": ("tasks:addition/1/60",)},
        "rewards": ("tests.posttraining.grpo_cases:even",),
    }
    values["rollouts"] = ROLLOUTS | sections.pop("rollouts", {})
    return build(GRPOConfig, values | sections)


def trainer(cfg: GRPOConfig) -> GRPO:
    return GRPO(cfg, make_mesh(cfg.mesh, jax.devices()[:1]))
