"""Tiny checkpoints with random weights, made and run by transformers: one per variant, shared by all tests."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from deepseek_jax import hf
from deepseek_jax.hf.names import get, leaves
from deepseek_jax.model.modules import DeepSeekV3

torch.set_num_threads(1)
transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

LENGTH, PROMPT = 72, 8  # room for 64 greedy tokens
SMALL = {
    "vocab_size": 67,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "first_k_dense_replace": 1,
    "intermediate_size": 31,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "q_lora_rank": 14,
    "kv_lora_rank": 10,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 8,
    "v_head_dim": 5,
    "max_position_embeddings": 128,
    "moe_intermediate_size": 9,
    "n_routed_experts": 12,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "initializer_range": 0.2,
    "routed_scaling_factor": 2.5,
    "attention_dropout": 0.0,
    "tie_word_embeddings": False,
}


def _yarn(mscale: float, mscale_all_dim: float) -> dict[str, Any]:
    # 72 tokens lie far beyond the original 16; 0.5 turns at beta_slow put the ramp inside the 4 pairs.
    return {
        "rope_type": "yarn", "rope_theta": 1e3, "factor": 8.0, "original_max_position_embeddings": 16,
        "beta_fast": 2.0, "beta_slow": 0.05, "mscale": mscale, "mscale_all_dim": mscale_all_dim,
    }  # fmt: skip


PLAIN = {"rope_type": "default", "rope_theta": 1e4}
# (class, changes to SMALL, deviation of the correction bias)
VARIANTS: dict[str, tuple[int, dict[str, Any], float]] = {
    "v3": (3, {"rope_parameters": PLAIN}, 0.5),
    # Released models have equal mscales; unequal ones show both places where they enter.
    "v3_yarn": (3, {"rope_parameters": _yarn(0.9, 0.5), "first_k_dense_replace": 0}, 0.1),
    "v3_large_bias_many_groups": (
        3,
        {"rope_parameters": PLAIN, "n_routed_experts": 16, "n_group": 8, "topk_group": 3},
        5.0,
    ),
    "moonlight": (
        3,
        {
            "rope_parameters": PLAIN | {"rope_theta": 5e4},
            "q_lora_rank": None,
            "n_group": 1,
            "topk_group": 1,
            "rms_norm_eps": 1e-2,  # far from the 1e-6 inside MLA
        },
        0.3,
    ),
    "v2": (
        2,
        {
            "rope_parameters": _yarn(0.707, 0.707),
            "topk_method": "group_limited_greedy",
            "norm_topk_prob": False,
            "routed_scaling_factor": 16.0,
        },
        0.0,
    ),
    "v2_lite": (
        2,
        {
            "rope_parameters": _yarn(0.707, 0.707),
            "topk_method": "greedy",
            "norm_topk_prob": False,
            "q_lora_rank": None,
            "n_group": 1,
            "topk_group": 1,
            "tie_word_embeddings": True,
        },
        0.0,
    ),
}


@dataclasses.dataclass
class Variant:
    """A checkpoint of transformers, its torch model, and what this library loaded from it."""

    name: str
    path: Path
    torch_model: Any
    cfg: Any
    params: Any
    bias: Any

    @functools.cached_property
    def tokens(self) -> np.ndarray:
        return np.random.default_rng(7).integers(0, self.cfg.vocab_size, (2, LENGTH)).astype(np.int32)

    @functools.cached_property
    def apply(self) -> Any:
        """Jitted (params, tokens) -> (loss, logits, gradients): one compilation serves every test."""
        model = DeepSeekV3(self.cfg)

        def loss(params, tokens):
            logits, _ = model.apply({"params": params}, tokens, balance_bias=self.bias)
            log_p = jax.nn.log_softmax(logits[:, :-1])
            return -jnp.take_along_axis(log_p, tokens[:, 1:, None], -1).mean(), logits

        def apply(params, tokens):
            (value, logits), grads = jax.value_and_grad(loss, has_aux=True)(params, tokens)
            return value, logits, grads

        return jax.jit(apply)

    @functools.cached_property
    def torch_logits(self) -> np.ndarray:
        with torch.no_grad():
            return self.torch_model(torch.tensor(self.tokens, dtype=torch.long)).logits.numpy()

    def by_name(self, tree: Any) -> dict[str, np.ndarray]:
        """A tree like the parameters, as tensors by checkpoint name."""
        found = {}
        for leaf in leaves(self.cfg).values():
            array = np.asarray(get(tree, leaf.path))
            found |= {leaf.name(index): leaf.to_hf(array[index]) for index in leaf.indices()}
        return found


def torch_tensors(named: Any) -> dict[str, np.ndarray]:
    """Tensors of a transformers model by checkpoint name: it fuses the experts, the files do not."""
    found = {}
    for name, x in named:
        x = x.detach().float().numpy().copy()
        if name.endswith("experts.gate_up_proj"):
            stem = name.removesuffix("gate_up_proj")
            for e, both in enumerate(x):
                found[f"{stem}{e}.gate_proj.weight"], found[f"{stem}{e}.up_proj.weight"] = np.split(both, 2)
        elif name.endswith("experts.down_proj"):
            found |= {f"{name.removesuffix('down_proj')}{e}.down_proj.weight": w for e, w in enumerate(x)}
        else:
            found[name] = x
    return found


def build(name: str) -> Any:
    """The torch model of a variant, randomly initialised: norms away from 1, biases as large as asked."""
    number, changes, bias = VARIANTS[name]
    config_class = getattr(transformers, f"DeepseekV{number}Config")
    model_class = getattr(transformers, f"DeepseekV{number}ForCausalLM")
    torch.manual_seed(len(name))
    extra = {"num_nextn_predict_layers": 0} if number == 3 else {}
    model = model_class(
        config_class(**(SMALL | changes | extra), attn_implementation="eager", experts_implementation="eager")
    ).eval()
    with torch.no_grad():
        for key, x in model.named_parameters():
            if "norm" in key:
                x.add_(0.3 * torch.randn_like(x))
            elif "mlp.gate.weight" in key:  # clear preferences, so that rounding does not decide the routing
                x.mul_(3.0)
        for key, x in model.named_buffers():
            if "e_score_correction_bias" in key:
                x.copy_(bias * torch.randn_like(x))
    return model


@pytest.fixture(scope="session", params=list(VARIANTS))
def variant(request, tmp_path_factory) -> Variant:
    return _make(request.param, tmp_path_factory)


@pytest.fixture(scope="session", params=["v3", "v2"])
def trained_variant(request, tmp_path_factory) -> Variant:
    return _make(request.param, tmp_path_factory)


_made: dict[str, Variant] = {}


def _make(name: str, tmp_path_factory) -> Variant:
    if name not in _made:
        path = tmp_path_factory.mktemp("checkpoints") / name
        model = build(name)
        model.save_pretrained(path)
        _made[name] = Variant(name, path, model, *hf.load(path))
    return _made[name]
