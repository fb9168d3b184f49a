"""The smallest run that has every part of a real one: a dense and a MoE layer, 8 experts, an MTP module."""

import jax
import numpy as np

from deepseek_jax.config import Config, from_config_dict
from deepseek_jax.model.layout import single_device
from deepseek_jax.training.gradients import by_micro_batches, value_of
from deepseek_jax.training.objectives import pretraining
from deepseek_jax.training.optimizer import adamw
from deepseek_jax.training.state import Hyper, TrainState
from tests.oracle.tiny import weights

MODEL = {
    "vocab_size": 384,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "first_k_dense_replace": 1,
    "intermediate_size": 48,
    "num_attention_heads": 2,
    "q_lora_rank": 16,
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "max_position_embeddings": 128,
    "moe_intermediate_size": 16,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 4,
    "topk_group": 2,
    "num_nextn_predict_layers": 1,
    "initializer_range": 0.05,
}
SECTIONS = {
    "model": MODEL,
    "data": {"vocab_size": 384, "seq_len": 32},
    "optimizer": {"peak_lr": 3e-3, "mid_lr": 3e-4, "final_lr": 1e-4, "batch_start": 4, "gamma": 0.01},
    "train": {"steps": 20, "batch_size": 4, "loss_chunk": 48, "sample_tokens": 8},
}
HYPER = Hyper(np.float32(3e-3), np.float32(0.01), np.float32(0.3))


def tiny(**changes) -> Config:
    """The tiny config with `section={key: value}` changed."""
    names = SECTIONS | changes
    sections = {
        name: SECTIONS.get(name, {}) | changes[name] if isinstance(changes.get(name), dict) else names[name]
        for name in names
    }
    return from_config_dict(sections)


def fresh_state(cfg: Config, seed: int = 0) -> TrainState:
    """A state before the first step, on the default device. NumPy's weights: nothing to compile."""
    params, bias = jax.tree.map(jax.numpy.asarray, weights(cfg.model, seed, bias=0.0))
    return TrainState.create(params, adamw(cfg.optimizer).init(params), bias)


def losses(params, cfg: Config, batch, bias, total) -> dict:
    """The metrics of pre-training on one device."""
    value = value_of(cfg, single_device(cfg.train.remat), pretraining(cfg))
    return value(params, batch, bias, total, HYPER)[1].metrics


def gradients(params, quantised, cfg: Config, batch, bias, total):
    """Of pre-training on one device."""
    of = by_micro_batches(cfg, single_device(cfg.train.remat), pretraining(cfg))
    return of(params, quantised, batch, bias, total, HYPER)[0]


def tokens(cfg: Config, seed: int = 0, size: int | None = None) -> np.ndarray:
    """int32 [batch, seq_len + 1]"""
    shape = (size or cfg.train.batch_size, cfg.data.seq_len + 1)
    return np.random.default_rng(seed).integers(0, cfg.model.vocab_size, shape, np.int32)
