"""Tiny models for the tests: no two dimensions alike, so that no transposition or swap goes unnoticed."""

import dataclasses

import numpy as np

from deepseek_jax.config import ModelConfig, YarnConfig
from deepseek_jax.hf.names import bias_names, get, leaves, unflatten

YARN = YarnConfig(factor=8.0, original_max_position_embeddings=16, mscale=0.8, mscale_all_dim=0.6)

V3 = ModelConfig(
    vocab_size=67,
    hidden_size=24,
    num_hidden_layers=3,
    first_k_dense_replace=1,
    intermediate_size=31,
    num_attention_heads=3,
    q_lora_rank=14,
    kv_lora_rank=10,
    qk_nope_head_dim=6,
    qk_rope_head_dim=8,
    v_head_dim=5,
    max_position_embeddings=64,
    moe_intermediate_size=9,
    n_routed_experts=12,
    n_shared_experts=2,
    num_experts_per_tok=3,
    n_group=4,
    topk_group=2,
    num_nextn_predict_layers=2,
    rms_norm_eps=1e-3,  # far from the eps inside MLA
    initializer_range=0.2,
)
V2 = dataclasses.replace(
    V3,
    q_lora_rank=None,
    scoring_func="softmax",
    norm_topk_prob=False,
    routed_scaling_factor=4.0,
    num_nextn_predict_layers=0,
    rope_scaling=YARN,
)


def weights(cfg: ModelConfig, seed: int = 0, bias: float = 0.3):
    """(params, balance_bias): norms away from 1, biases large enough to decide the selection.

    Made by NumPy: compiling a random generator for each of some 25 shapes would take longer than the tests.
    """
    rng, flat = np.random.default_rng(seed), {}
    for path, leaf in leaves(cfg).items():
        x = rng.standard_normal(leaf.shape, np.float32)
        flat[path] = 1 + 0.3 * x if "norm" in path else cfg.initializer_range * x
    rows = (bias if cfg.has_balance_bias else 0.0) * rng.standard_normal(cfg.balance_bias_shape)
    return unflatten(flat), rows.astype(np.float32) + 0.0  # no negative zeros


OUTPUTS = ("wo_hvd", "w_down_fd", "w_down_efd")  # the last projection of attention and of the FFNs


def mostly_agreeing(cfg: ModelConfig, seed: int, share: float):
    """Weights whose MTP modules often guess what the main model says next.

    Blocks add only `share` of their output, so the main model mostly follows the last token; the MTP module
    reads the same token's embedding, and agrees always at share 0.
    """
    params, bias = weights(cfg, seed)

    def scaled(x, name: str = ""):
        if isinstance(x, dict):
            return {key: scaled(value, key) for key, value in x.items()}
        return share * x if name in OUTPUTS else x

    params = scaled(params)
    mtp, d = params["mtp"], cfg.hidden_size
    embedding_only = np.concatenate([np.eye(d), np.zeros((d, d))]).astype(np.float32)
    mtp["w_eh_cd"] = np.broadcast_to(embedding_only, mtp["w_eh_cd"].shape)
    mtp["enorm_d"] = np.ones_like(mtp["enorm_d"])
    mtp["norm_d"] = np.broadcast_to(params["final_norm"]["scale_d"], mtp["norm_d"].shape)
    return params, bias


def checkpoint(cfg: ModelConfig, params, balance_bias) -> tuple[dict, dict]:
    """(tensors by checkpoint name in float64, config.json) of a model, for the oracle."""
    tensors = {}
    for leaf in leaves(cfg).values():
        array = np.asarray(get(params, leaf.path), np.float64)
        tensors |= {leaf.name(index): leaf.to_hf(array[index]) for index in leaf.indices()}
    names = bias_names(cfg)
    tensors |= {name: np.asarray(row, np.float64) for name, row in zip(names, balance_bias, strict=False)}
    config = dataclasses.asdict(cfg)  # same field names as config.json
    return tensors, config


def rel(got, want) -> float:
    """Largest difference relative to the largest wanted value."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return float(np.abs(got - want).max() / np.abs(want).max())
