"""MTP logits of a saved checkpoint: against NumPy on the raw files, and against transformers' own MTP layer."""

import dataclasses

import jax
import numpy as np
import pytest
import torch
import transformers
from safetensors import safe_open
from transformers.modeling_layers import MtpLayer

from deepseek_jax import hf
from deepseek_jax.model.modules import DeepSeekV3
from tests.oracle import model as oracle
from tests.oracle.tiny import V3, rel, weights

CFG = dataclasses.replace(V3, num_hidden_layers=2, num_nextn_predict_layers=1)
TOKENS = np.random.default_rng(3).integers(0, CFG.vocab_size, (2, 12)).astype(np.int32)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(folder, tensors as stored, MTP logits of this library from what it loads)"""
    path = tmp_path_factory.mktemp("mtp") / "checkpoint"
    hf.save(path, CFG, *weights(CFG), format="f32")
    with safe_open(next(path.glob("*.safetensors")), "pt") as f:
        tensors = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
    cfg, params, bias = hf.load(path)
    _, aux = jax.jit(DeepSeekV3(cfg).apply)({"params": params}, TOKENS, balance_bias=bias)
    return path, tensors, np.asarray(aux.mtp[0][:, :-1])


def test_against_numpy_on_the_files(saved):
    path, tensors, got = saved
    config = hf.Checkpoint(path).hf
    want = oracle.forward({n: x.numpy() for n, x in tensors.items()}, config, TOKENS).mtp[0][:, :-1]
    assert rel(got, want) < 2e-5


def test_against_transformers(saved):
    path, tensors, got = saved
    main = transformers.DeepseekV3ForCausalLM.from_pretrained(
        path, attn_implementation="eager", experts_implementation="eager"
    ).eval()
    kinds = type(main.model.layers[-1]), type(main.model.norm)
    layer = MtpLayer(main.config, *kinds, layer_idx=CFG.num_hidden_layers).eval()  # past the dense layers
    prefix = f"model.layers.{CFG.num_hidden_layers}."
    state = {}
    for name, x in tensors.items():
        if name.startswith(prefix):
            rest = name.removeprefix(prefix)
            own = rest.split(".")[0] in ("enorm", "hnorm", "eh_proj")
            state[rest if own else f"mtp_block.{rest}"] = x
    state["post_norm.weight"] = state.pop("mtp_block.shared_head.norm.weight")
    experts = [
        {p: state.pop(f"mtp_block.mlp.experts.{e}.{p}_proj.weight") for p in ("gate", "up", "down")}
        for e in range(CFG.n_routed_experts)
    ]
    fused = [torch.cat([x["gate"], x["up"]]) for x in experts]
    state["mtp_block.mlp.experts.gate_up_proj"] = torch.stack(fused)
    state["mtp_block.mlp.experts.down_proj"] = torch.stack([x["down"] for x in experts])
    copies = {"mtp_block.embed_tokens.weight", "mtp_block.shared_head.head.weight"}
    result = layer.load_state_dict(state, strict=False)
    assert set(result.unexpected_keys) == copies and not result.missing_keys

    ids = torch.tensor(TOKENS, dtype=torch.long)
    with torch.no_grad():
        hidden = main.model(ids).last_hidden_state[:, :-1]
        n = hidden.shape[1]
        mask = torch.full((n, n), float("-inf")).triu(1)[None, None]
        rotary = main.model.rotary_emb(hidden, torch.arange(n)[None])
        out = layer(main.model.embed_tokens(ids[:, 1:]), hidden, rotary, mask, None, None)
        want = main.lm_head(out).numpy()
    assert rel(got, want) < 2e-5
