"""config.json <-> ModelConfig: the published files, both ways, and what is refused."""

import dataclasses
import json
from pathlib import Path

import pytest

from deepseek_jax.config import ModelConfig, YarnConfig
from deepseek_jax.hf.config import quantization, quantization_config

CONFIGS = Path(__file__).parent / "configs"
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


def test_both_spellings_of_the_rotary_settings():
    """A file that transformers 5 wrote and somebody added YaRN to in the old spelling, and the other way round."""
    want, hf = ModelConfig.from_hf(published("deepseek_v3")), published("deepseek_v3")
    default = {"rope_theta": 10000.0, "rope_type": "default"}
    assert ModelConfig.from_hf(hf | {"rope_parameters": default}) == want
    new = hf["rope_scaling"] | default | {"rope_type": "yarn"}
    assert ModelConfig.from_hf(hf | {"rope_parameters": new}) == want
    assert ModelConfig.from_hf(hf | {"rope_parameters": new, "rope_scaling": {"type": "default"}}) == want
    assert (
        ModelConfig.from_hf(hf | {"rope_parameters": new, "rope_scaling": None, "rope_theta": None}) == want
    )
    both = new | {"type": "yarn", "truncate": True, "partial_rotary_factor": 1.0, "attention_factor": None}
    assert ModelConfig.from_hf(hf | {"rope_parameters": both, "rope_scaling": None}) == want


def test_fp8_as_transformers_5_writes_it(tmp_path):
    transformers = pytest.importorskip("transformers")
    for scale, format in (("float", "fp32"), ("ue8m0", "ue8m0")):
        config = transformers.DeepseekV3Config()
        skipped = ["lm_head", "model.layers.*.mlp.gate"]
        config.quantization_config = transformers.FineGrainedFP8Config(
            modules_to_not_convert=skipped, scale_fmt=scale
        )
        config.save_pretrained(tmp_path)
        hf = json.loads((tmp_path / "config.json").read_text())
        assert hf["quantization_config"]["expert_dtype"] == "fp8"
        assert quantization(hf) == format
        assert ModelConfig.from_hf(hf).num_params() == TOTALS["deepseek_v3"]


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
                    "truncate": False,
                }
            },
            "truncate",
        ),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config.quant_method='awq'"),
        ({"quantization_config": {"quant_method": "fp8", "weight_block_size": [64, 64]}}, r"\[64, 64\]"),
        ({"quantization_config": {"quant_method": "fp8", "modules": []}}, "quantization_config.modules"),
        ({"quantization_config": {"quant_method": "fp8"}}, "lacks weight_block_size"),
        (
            {"quantization_config": {"quant_method": "fp8", "weight_block_size": None}},
            "weight_block_size=None",
        ),
        ({"quantization_config": {"quant_method": "compressed-tensors", "config_groups": {}}}, "in BF16"),
        ({"quantization_config": "fp8"}, "quantization_config='fp8' should be an object"),
        ({"n_group": 7}, "n_group=7"),
        ({"n_group": 0}, "n_group=0 must be positive"),
        # types and ranges, as of any other config
        ({"hidden_size": "7168"}, "hidden_size='7168' should be int, not str"),
        ({"hidden_size": 7168.0}, r"hidden_size=7168.0 should be int, not float"),
        ({"hidden_size": True}, "hidden_size=True should be int, not bool"),
        ({"hidden_size": None}, "hidden_size=None should be int, not NoneType"),
        ({"hidden_size": [7168] * 1000}, r"hidden_size=\[7168, .*\.\.\. should be int"),
        ({"q_lora_rank": "a"}, "q_lora_rank='a' should be int or None"),
        ({"num_nextn_predict_layers": 10**9}, "num_nextn_predict_layers=1000000000 must be <= 100"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers=1000000000 must be <= 10000"),
        ({"n_routed_experts": 1 << 40}, "n_routed_experts=1099511627776 must be <= 100000"),
        ({"num_nextn_predict_layers": 1, "num_mtp_layers": 2}, "two names of one field"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps=nan should be a finite number"),
        ({"routed_scaling_factor": float("inf")}, "routed_scaling_factor=inf should be a finite number"),
        ({"rope_theta": 0}, "rope_theta=0 must be >= 2"),
        ({"rope_theta": [1]}, r"rope_theta=\[1\] should be float"),
        ({"moe_intermediate_size": 0}, "moe_intermediate_size=0 must be positive"),
        ({"rope_scaling": "yarn"}, "rope_scaling='yarn' should be an object"),
        ({"rope_scaling": {"type": ["yarn"]}}, r"type=\['yarn'\] is not supported"),
        ({"rope_scaling": {"type": "yarn", "rope_type": "linear"}}, "two types"),
        ({"rope_parameters": {"rope_theta": 5e4}}, r"rope_theta=50000.0, but elsewhere it is 10000"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2}}, r"factor=2, but elsewhere it is 40"),
        ({"rope_parameters": {"rope_type": "llama3"}}, r"two types, \['yarn', 'llama3'\]"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings='no' should be bool"),
        ({"torch_dtype": "bfloat16", "dtype": "float32"}, "two names of one field"),
        ({"torch_dtype": []}, r"torch_dtype=\[\] is not supported"),
        ({"num_nextn_predict_layers": ""}, "num_nextn_predict_layers='' should be int"),
        ({"model_type": ["deepseek_v3"]}, r"model_type=\['deepseek_v3'\]"),
        ({"num_key_value_heads": "128"}, "num_key_value_heads='128'"),
        ({"line\nbreak": 1}, r"'line\\nbreak'=1"),
    ],
)
def test_refused_with_the_field_named(change, message):
    with pytest.raises(ValueError, match=message) as error:
        ModelConfig.from_hf(published("deepseek_v3") | change)
    assert str(error.value).startswith("config.json: ") and str(error.value).isprintable()


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
