"""Config: what is refused and how it is said, round trips, and what the counts mean."""

import dataclasses
import json
import math

import ml_collections
import pytest
from absl import flags

from configs.defaults import defaults
from deepseek_jax.config import (
    BalanceConfig,
    Config,
    DataConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
    YarnConfig,
    build,
    from_config_dict,
    to_dict,
)
from deepseek_jax.model.params import count
from deepseek_jax.model.transformer import model_params
from experiments import config_flag
from tests.oracle.tiny import V2, V3, YARN


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"trian": {}}, "unknown config key trian; did you mean train[?]"),
        ({"train": {"stesp": 3}}, "unknown config key train.stesp; did you mean train.steps[?]"),
        ({"model": {"kv_lora": 3}}, "unknown config key model.kv_lora; did you mean model.kv_lora_rank[?]"),
        (
            {"model": {"rope_scaling": {"faktor": 2.0}}},
            "unknown config key model.rope_scaling.faktor; did you mean model.rope_scaling.factor[?]",
        ),
        ({"mesh": {"zzzz": 1}}, "unknown config key mesh.zzzz; valid keys: pipe, data, node, local, tensor"),
        ({"train": {"steps": 3.5}}, r"config key train.steps=3.5 should be .*int.*, not float"),
        ({"train": {"steps": True}}, r"config key train.steps=True should be .*int.*, not bool"),
        ({"data": {"segments": 1}}, r"config key data.segments=1 should be .*bool.*, not int"),
        ({"train": 3}, "config key train=3 should be TrainConfig, not int"),
        ({"train": Config()}, r"config key train=Config[(].* should be TrainConfig, not Config"),
        ({"train": {3: 3}}, "unknown config key train.3"),
        ([], r"a config should be a mapping with the keys of Config, not \[\]"),
        (
            {"optimizer": {"peak_lr": float("nan")}},
            "config key optimizer.peak_lr=nan should be a finite number",
        ),
        ({"optimizer": {"peak_lr": 10**400}}, "optimizer.peak_lr=1000.* should be a finite number"),
        ({"model": {"hidden_size": 10**5000}}, r"hidden_size=<int of 16610 bits> must be <="),
        (
            {"model": {"rope_scaling": {"factor": "2"}}},
            "model.rope_scaling.factor='2' should be float, not str",
        ),
        ({"model": {"rope_scaling": 2}}, "model.rope_scaling=2 should be YarnConfig or None, not int"),
        ({"train": {"remat": "ful"}}, r"train.remat='ful' is not one of .*; did you mean 'full'[?]"),
        ({"balance": {"mode": "los_free"}}, "did you mean 'loss_free'[?]"),
    ],
)
def test_mistakes_name_the_key_and_the_nearest(values, message):
    with pytest.raises(ValueError, match=message):
        from_config_dict(values)


@pytest.mark.parametrize(
    ("cls", "values", "message"),
    [
        (ModelConfig, {"hidden_size": 0}, "hidden_size=0 must be positive"),
        (ModelConfig, {"qk_rope_head_dim": 7}, "qk_rope_head_dim=7 must be even"),
        (ModelConfig, {"first_k_dense_replace": 62}, r"first_k_dense_replace=62 must lie in \[0, .*=61\]"),
        (ModelConfig, {"q_lora_rank": 0}, "q_lora_rank=0: use None"),
        (ModelConfig, {"num_nextn_predict_layers": -1}, "num_nextn_predict_layers=-1 must be >= 0"),
        (ModelConfig, {"n_group": 7}, "n_routed_experts=256 must be divisible by n_group=7"),
        (ModelConfig, {"topk_group": 9}, r"topk_group=9 must lie in \[1, n_group=8\]"),
        (ModelConfig, {"num_experts_per_tok": 129}, "num_experts_per_tok=129 exceeds the 128 experts"),
        (ModelConfig, {"n_shared_experts": -1}, "n_shared_experts=-1 must be >= 0"),
        (ModelConfig, {"scoring_func": "softmx"}, "did you mean 'softmax'[?]"),
        (YarnConfig, {"factor": 0.5}, "rope_scaling.factor=0.5 must be >= 1"),
        (YarnConfig, {"factor": float("nan")}, "rope_scaling.factor=nan must be a finite number"),
        (YarnConfig, {"beta_slow": 64.0}, "beta_slow=64.0 must not exceed rope_scaling.beta_fast=32.0"),
        (ModelConfig, {"hidden_size": "7168"}, "hidden_size='7168' must be an integer"),
        (ModelConfig, {"hidden_size": 1e300}, "hidden_size=1e[+]300 must be an integer"),
        (
            ModelConfig,
            {"num_nextn_predict_layers": 10**9},
            "num_nextn_predict_layers=1000000000 must be <= 100",
        ),
        (ModelConfig, {"rms_norm_eps": -1e-6}, "rms_norm_eps=-1e-06 must be >= 0"),
        (ModelConfig, {"moe_intermediate_size": 0}, "moe_intermediate_size=0 must be positive"),
        (ModelConfig, {"intermediate_size": 0}, "intermediate_size=0 must be positive"),
        (DataConfig, {"fim_rate": 1.5}, r"data.fim_rate=1.5 must lie in \[0, 1\]"),
        (DataConfig, {"seq_len": 0}, "data.seq_len=0 must be positive"),
        (OptimizerConfig, {"peak_lr": 0.0}, "optimizer.peak_lr=0.0 must be positive"),
        (OptimizerConfig, {"peak_lr": math.nan}, "optimizer.peak_lr=nan must be positive and finite"),
        (OptimizerConfig, {"peak_lr": math.inf}, "optimizer.peak_lr=inf must be positive and finite"),
        (OptimizerConfig, {"final_lr": math.nan}, "optimizer.final_lr=nan must be a finite number"),
        (OptimizerConfig, {"weight_decay": -0.1}, "optimizer.weight_decay=-0.1 must be >= 0"),
        (OptimizerConfig, {"gamma": math.inf}, r"optimizer.gamma=inf must be <= 1e\+18"),
        (OptimizerConfig, {"b1": 1.0}, r"optimizer.b1=1.0 must lie inside \(0, 1\)"),
        (OptimizerConfig, {"b2": math.nan}, r"optimizer.b2=nan must lie inside \(0, 1\)"),
        (OptimizerConfig, {"eps": 0.0}, "optimizer.eps=0.0 must be positive"),
        (OptimizerConfig, {"batch_start": -1}, "optimizer.batch_start=-1 must be >= 0"),
        (OptimizerConfig, {"batch_ramp_tokens": -1.0}, "optimizer.batch_ramp_tokens=-1.0 must be >= 0"),
        (BalanceConfig, {"seq_alpha": math.nan}, "balance.seq_alpha=nan must be a finite number"),
        (TrainConfig, {"eval_every": 0}, "train.eval_every=0 must be positive"),
        (TrainConfig, {"eval_windows": 0}, "train.eval_windows=0 must be positive"),
        (TrainConfig, {"checkpoint_every": 0}, "train.checkpoint_every=0 must be positive"),
        (TrainConfig, {"sample_tokens": -1}, "train.sample_tokens=-1 must be >= 0"),
        (TrainConfig, {"seed": 1 << 65}, "train.seed=36893488147419103232 must be <= 4294967295"),
        (TrainConfig, {"ema_decay": math.nan}, "train.ema_decay=nan must lie in"),
        (TrainConfig, {"out_dir": ""}, "train.out_dir is empty"),
        (DataConfig, {"seed": -1}, "data.seed=-1 must be >= 0"),
        (DataConfig, {"fim_rate": math.nan}, "data.fim_rate=nan must lie in"),
        (DataConfig, {"vocab_size": 0}, "data.vocab_size=0 must be positive"),
        (MeshConfig, {"receive": math.nan}, "mesh.receive=nan must be a finite number"),
        (MeshConfig, {"node": 1 << 40}, "mesh.node=1099511627776 must be <= 2147483648"),
        (OptimizerConfig, {"moment_dtype": "float16"}, "optimizer.moment_dtype='float16' is not one of"),
        (MeshConfig, {"local": 0}, "mesh.local=0 must be positive"),
        (
            MeshConfig,
            {"experts": "two_hops"},
            "mesh.experts='two_hops' is not one of .*; did you mean 'two_hop'",
        ),
        (MeshConfig, {"dispatch": "fp9"}, "mesh.dispatch='fp9' is not one of"),
        (MeshConfig, {"combine": "fp8"}, "mesh.combine='fp8' is not one of .'auto', 'same', 'bf16'"),
        (MeshConfig, {"receive": -1.0}, "mesh.receive=-1.0 must be >= 0"),
        (TrainConfig, {"batch_size": 6, "grad_accumulation": 4}, "must be divisible by grad_accumulation=4"),
        (TrainConfig, {"ema_decay": 1.0}, r"train.ema_decay=1.0 must lie in \[0, 1\)"),
        (BalanceConfig, {"mode": "all"}, "balance.mode='all' is not one of"),
        (Config, {"data": DataConfig(seq_len=8192)}, "data.seq_len=8192 exceeds model.max_position_embed"),
        (Config, {"data": DataConfig(vocab_size=200_000)}, "is smaller than data.vocab_size=200000"),
    ],
)
def test_bad_values(cls, values, message):
    with pytest.raises(ValueError, match=message):
        cls(**values)


def test_data_axis_may_be_left_open():
    assert MeshConfig(data=0).data == 0


def test_round_trip():
    cfg = Config(
        model=dataclasses.replace(V3, rope_scaling=YARN),
        data=DataConfig(vocab_size=60, seq_len=16, validation="v/*.txt"),
        balance=BalanceConfig(mode="classic"),
    )
    through_json = json.loads(json.dumps(to_dict(cfg)))
    assert build(Config, through_json) == cfg
    assert from_config_dict(ml_collections.ConfigDict(through_json)) == cfg
    assert from_config_dict(defaults()) == Config()
    assert hash(cfg) == hash(build(Config, through_json))  # static argument of jitted functions


def test_integers_are_good_floats():
    assert from_config_dict({"optimizer": {"peak_lr": 1, "schedule_tokens": 10**13}}).optimizer.peak_lr == 1


@pytest.mark.parametrize("cfg", [V3, V2, dataclasses.replace(V2, tie_word_embeddings=True)])
def test_counts_are_the_sizes_of_the_arrays(cfg):
    tree = model_params(cfg)
    mtp = tree.pop("mtp", {})
    biases = cfg.n_routed_experts if cfg.has_balance_bias else 0
    assert cfg.num_params() == count(tree) + biases * cfg.num_moe_layers
    assert cfg.num_mtp_params() == count(mtp) + biases * cfg.num_nextn_predict_layers
    idle = 3 * cfg.hidden_size * cfg.moe_intermediate_size * (cfg.n_routed_experts - cfg.num_experts_per_tok)
    table = 0 if cfg.tie_word_embeddings else cfg.vocab_size * cfg.hidden_size
    assert cfg.num_active_params() == cfg.num_params() - cfg.num_moe_layers * idle - table


def test_flops_count_a_masked_score_as_none():
    heads = V3.num_attention_heads * (V3.qk_head_dim + V3.v_head_dim)
    attention = 6 * V3.num_hidden_layers * 64 * heads
    assert V3.flops_per_token(64, causal=False) - V3.flops_per_token(64) == attention / 2
    assert V3.flops_per_token(64) - V3.flops_per_token(32) == attention / 4


def test_cache_bytes():
    per_layer = V3.kv_lora_rank + V3.qk_rope_head_dim
    assert V3.kv_cache_bytes_per_token("float32") == 3 * 4 * per_layer
    with pytest.raises(ValueError, match="dtype='float8_e4m3' is not one of"):
        V3.kv_cache_bytes_per_token("float8_e4m3")


def test_sources_with_weights_from_the_command_line_and_from_json():
    values = {"data": {"sources": ["web/*.jsonl=0.75", "a=b/*.py=3"]}}
    cfg = from_config_dict(values)
    assert cfg.data.sources == tuple(values["data"]["sources"]), "JSON has lists"
    assert cfg.data.weighted_sources() == [("web/*.jsonl", 0.75), ("a=b/*.py", 3.0)]
    assert build(Config, json.loads(json.dumps(to_dict(cfg)))) == cfg
    assert DataConfig(source="x").weighted_sources() == [("x", 1.0)]
    for text in ("('web/*.jsonl=0.75', 'a=b/*.py=3')", "web/*.jsonl=0.75,a=b/*.py=3"):
        argv = [f"--config.data.sources={text}"]
        assert config_flag.parse(argv, "configs/tiny.py", flags.FlagValues()).data.sources == cfg.data.sources
    for bad in ("web/*.jsonl", "web=x", "web=0", "web=-1", "=1", "web=inf"):
        with pytest.raises(ValueError, match=r"data.sources entry .* should be \"SOURCE=WEIGHT\""):
            DataConfig(sources=(bad,))
    with pytest.raises(ValueError, match=r"data\.sources='web=1' should be a tuple of strings"):
        from_config_dict({"data": {"sources": "web=1"}})
