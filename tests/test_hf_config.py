"""config.json <-> ModelConfig: the published files, both ways, and what is refused."""

import dataclasses
import json
from pathlib import Path

import pytest

from deepseek_jax.config import ModelConfig, YarnConfig
from deepseek_jax.hf_config import quantization, quantization_config

CONFIGS = Path(__file__).parent / "hf_configs"
NAMES = ("deepseek_v3", "deepseek_v3_1", "deepseek_v2", "deepseek_v2_lite", "moonlight_16b", "kimi_k2")

# vocab, hidden, layers, dense, heads, q_lora, inter, expert inter, routed, shared, top-k, groups, top groups,
# scale, theta, YaRN factor, mscale_all_dim, eps, MTP (SPEC of the family, one line per model)
FAMILY = {
    "deepseek_v3": (129280, 7168, 61, 3, 128, 1536, 18432, 2048, 256, 1, 8, 8, 4, 2.5, 1e4, 40, 1.0, 1e-6, 1),
    "deepseek_v3_1": (
        129280,
        7168,
        61,
        3,
        128,
        1536,
        18432,
        2048,
        256,
        1,
        8,
        8,
        4,
        2.5,
        1e4,
        40,
        1.0,
        1e-6,
        1,
    ),
    "deepseek_v2": (
        102400,
        5120,
        60,
        1,
        128,
        1536,
        12288,
        1536,
        160,
        2,
        6,
        8,
        3,
        16.0,
        1e4,
        40,
        0.707,
        1e-6,
        0,
    ),
    "deepseek_v2_lite": (
        102400,
        2048,
        27,
        1,
        16,
        None,
        10944,
        1408,
        64,
        2,
        6,
        1,
        1,
        1.0,
        1e4,
        40,
        0.707,
        1e-6,
        0,
    ),
    "moonlight_16b": (
        163840,
        2048,
        27,
        1,
        16,
        None,
        11264,
        1408,
        64,
        2,
        6,
        1,
        1,
        2.446,
        5e4,
        None,
        None,
        1e-5,
        0,
    ),
    "kimi_k2": (163840, 7168, 61, 1, 64, 1536, 18432, 2048, 384, 1, 8, 1, 1, 2.827, 5e4, 32, 1.0, 1e-6, 0),
}
TOTALS = {"deepseek_v3": 671_026_419_200, "deepseek_v2": 235_741_434_880, "deepseek_v2_lite": 15_706_484_224}


def published(name: str) -> dict:
    return json.loads((CONFIGS / f"{name}.json").read_text())


@pytest.mark.parametrize("name", NAMES)
def test_published_config_is_read(name):
    c = ModelConfig.from_hf(published(name))
    yarn = c.rope_scaling
    assert FAMILY[name] == (
        c.vocab_size, c.hidden_size, c.num_hidden_layers, c.first_k_dense_replace, c.num_attention_heads,
        c.q_lora_rank, c.intermediate_size, c.moe_intermediate_size, c.n_routed_experts, c.n_shared_experts,
        c.num_experts_per_tok, c.n_group, c.topk_group, c.routed_scaling_factor, c.rope_theta,
        yarn and yarn.factor, yarn and yarn.mscale_all_dim, c.rms_norm_eps, c.num_nextn_predict_layers,
    )  # fmt: skip
    assert (c.kv_lora_rank, c.qk_nope_head_dim, c.qk_rope_head_dim, c.v_head_dim) == (512, 128, 64, 128)
    softmax = name.startswith("deepseek_v2")
    assert (c.scoring_func, c.norm_topk_prob) == (("softmax", False) if softmax else ("sigmoid", True))
    assert c.has_balance_bias is not softmax
    assert c.dtype == "bfloat16"
    assert c.num_params() == TOTALS.get(name, c.num_params())


def test_kimi_has_its_own_correction_range():
    assert ModelConfig.from_hf(published("kimi_k2")).rope_scaling == YarnConfig(
        32.0, 4096, 1.0, 1.0, 1.0, 1.0
    )


@pytest.mark.parametrize("name", NAMES)
def test_round_trip(name):
    hf = published(name)
    cfg = ModelConfig.from_hf(hf)
    back = cfg.to_hf()
    assert ModelConfig.from_hf(json.loads(json.dumps(back))) == cfg
    # Every field that we write and the published file has is equal, but for the name of Kimi's twin class.
    differing = {k for k in back if k in hf and back[k] != hf[k]}
    assert differing == ({"model_type"} if name == "kimi_k2" else set())


def test_round_trip_of_a_model_of_our_own():
    cfg = ModelConfig(vocab_size=64, hidden_size=32, num_hidden_layers=3, rope_scaling=YarnConfig(factor=2.0))
    assert ModelConfig.from_hf(cfg.to_hf()) == cfg


def test_spelling_of_transformers_5():
    hf = published("deepseek_v3")
    rope = hf.pop("rope_scaling") | {"rope_theta": hf.pop("rope_theta")}
    rope["rope_type"] = rope.pop("type")
    hf |= {"rope_parameters": rope, "dtype": hf.pop("torch_dtype"), "head_dim": 64, "_experts": "eager"}
    assert ModelConfig.from_hf(hf) == ModelConfig.from_hf(published("deepseek_v3"))


def test_yarn_without_mscale_leaves_the_softmax_scale_alone():
    hf = published("deepseek_v3")
    del hf["rope_scaling"]["mscale_all_dim"]
    assert ModelConfig.from_hf(hf).rope_scaling.mscale_all_dim == 0.0


def test_quantization():
    assert quantization(published("deepseek_v3")) == "fp32"
    assert quantization(published("deepseek_v3_1")) == "ue8m0"
    assert quantization(published("deepseek_v2")) is None
    for name, scale in (("deepseek_v3", "fp32"), ("deepseek_v3_1", "ue8m0")):
        assert quantization_config(scale) == published(name)["quantization_config"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "model_type='llama'"),
        ({"index_topk": 2048}, "index_topk=2048"),
        ({"sliding_window": 512}, "sliding_window=512"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"moe_layer_freq": 2}, "moe_layer_freq=2"),
        ({"rope_interleave": False}, "rope_interleave=False"),
        ({"num_key_value_heads": 8}, "num_key_value_heads=8"),
        ({"scoring_func": "softmax"}, "scoring_func='softmax'"),
        ({"topk_method": "greedy"}, "topk_method='greedy'"),
        ({"torch_dtype": "float16"}, "torch_dtype='float16'"),
        ({"rope_theta": None}, "lacks rope_theta"),
        ({"rope_scaling": {"type": "linear", "factor": 4}}, "rope_scaling.type='linear'"),
        ({"rope_scaling": {"type": "yarn", "factor": 4}}, "original_max_position_embeddings"),
        ({"rope_scaling": {"factor": 4}}, r"\['factor'\] without type"),
        (
            {
                "rope_scaling": {
                    "type": "yarn",
                    "factor": 4,
                    "original_max_position_embeddings": 8,
                    "truncate": 0,
                }
            },
            "truncate",
        ),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config.quant_method='awq'"),
        ({"quantization_config": {"quant_method": "fp8", "weight_block_size": [64, 64]}}, r"\[64, 64\]"),
        ({"quantization_config": {"quant_method": "fp8", "modules": []}}, "quantization_config.modules"),
        ({"quantization_config": {"quant_method": "fp8"}}, "lacks weight_block_size"),
        ({"n_group": 7}, "n_group=7"),
    ],
)
def test_refused_with_the_field_named(change, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_hf(published("deepseek_v3") | change)


def test_missing_field_is_named():
    hf = published("deepseek_v3")
    del hf["kv_lora_rank"]
    with pytest.raises(ValueError, match="kv_lora_rank"):
        ModelConfig.from_hf(hf)


def test_softmax_gating_with_normalised_weights_is_refused():
    with pytest.raises(ValueError, match="norm_topk_prob=True"):
        ModelConfig.from_hf(published("deepseek_v2") | {"norm_topk_prob": True})
    cfg = dataclasses.replace(ModelConfig.from_hf(published("deepseek_v2")), norm_topk_prob=True)
    with pytest.raises(ValueError, match="norm_topk_prob=True"):
        cfg.to_hf()
