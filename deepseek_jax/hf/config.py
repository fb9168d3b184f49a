"""`from_hf` and `to_hf` translate config.json to `ModelConfig` and back.

They know DeepSeek-V3/R1/V3.1, V2, V2-Lite, Moonlight and Kimi-K2.

Every field is either translated, required to have the one value that this model implements, or known to be
harmless; anything else raises, because a field that is skipped in silence is a model that is silently wrong.
Both spellings of the rotary settings are read: the published one (`rope_theta`, `rope_scaling`) and that of
transformers 5 (`rope_parameters`); where a file has both, they must agree. Types and ranges are those of `ModelConfig`,
checked by `checks.build` as for every other config. Sources: config.json of each model as published.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from deepseek_jax.checks import build, named, plain, require, shown
from deepseek_jax.model_config import ModelConfig, YarnConfig

_SIGMOID_TYPES = ("deepseek_v3", "kimi_k2")  # V3, R1, V3.1, Moonlight; Kimi-K2
_SOFTMAX_TYPES = ("deepseek_v2",)  # V2, V2-Lite

_OPTIONAL = ("tie_word_embeddings", "initializer_range")

# Fields with one supported value. Absent is fine: it is the default everywhere.
_FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "attention_dropout": (0.0,),
    "moe_layer_freq": (1,),
    "rope_interleave": (True,),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
}

# Fields that do not change what the model computes.
_HARMLESS_NAMES = """
    _name_or_path architectures auto_map aux_loss_alpha bad_words_ids begin_suppress_tokens bos_token_id
    chunk_size_feed_forward cross_attention_hidden_size decoder_start_token_id diversity_penalty do_sample
    early_stopping encoder_no_repeat_ngram_size eos_token_id ep_size exponential_decay_length_penalty
    finetuning_task forced_bos_token_id forced_eos_token_id id2label is_decoder label2id length_penalty
    max_length min_length no_repeat_ngram_size num_beam_groups num_beams num_return_sequences
    output_attentions output_hidden_states output_router_logits output_scores pad_token_id prefix
    pretraining_tp problem_type remove_invalid_values repetition_penalty return_dict
    return_dict_in_generate router_aux_loss_coef sep_token_id seq_aux suppress_tokens
    task_specific_params temperature tf_legacy_loss tie_encoder_decoder tokenizer_class top_k top_p
    torchscript transformers_version typical_p unsloth_version use_bfloat16 use_cache use_mtp
"""
_HARMLESS = frozenset(_HARMLESS_NAMES.split())
# Translated, or compared with what other fields imply, by the functions below.
_HANDLED_NAMES = """
    model_type scoring_func topk_method n_group topk_group n_shared_experts num_key_value_heads head_dim
    qk_head_dim num_nextn_predict_layers num_mtp_layers rope_theta rope_scaling rope_parameters
    torch_dtype dtype quantization_config num_local_experts num_experts
"""
_HANDLED = frozenset(_HANDLED_NAMES.split())
# Every other field of `ModelConfig` has the same name and meaning on both sides.
_SAME = tuple(f.name for f in dataclasses.fields(ModelConfig) if f.name not in {*_HANDLED, *_OPTIONAL})
_YARN = tuple(f.name for f in dataclasses.fields(YarnConfig))
# Settings of transformers' YaRN beside these, with the value that they have for every model of the family.
_YARN_FIXED: dict[str, Any] = {"truncate": True, "partial_rotary_factor": 1.0}

_QUANTIZATION: dict[str, tuple[Any, ...]] = {
    "quant_method": ("fp8",),
    "weight_block_size": ([128, 128], (128, 128)),
    "fmt": ("e4m3",),
    "activation_scheme": ("dynamic",),
    "scale_fmt": ("ue8m0", "float"),
    "expert_dtype": ("fp8",),
}
_QUANTIZATION_NEEDED = ("quant_method", "weight_block_size")
# Which tensors are FP8 is read from the files; whether transformers dequantises them is its own affair.
_QUANTIZATION_HARMLESS = ("modules_to_not_convert", "modules_to_convert", "ignored_layers", "dequantize")
_DEQUANTISE = "load a copy of the checkpoint in BF16, or in DeepSeek's FP8 layout, instead"


def from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    """Returns the ModelConfig of a parsed config.json.

    `dtype` follows `torch_dtype` (float32 if absent). `initializer_range` is copied as it stands: every published
    file says 0.02, transformers' default, while the report (section 4.2) trained with 0.006.

    Raises ValueError naming the field: unknown, missing, of a wrong type, out of range, or with a value that this model
    does not implement.
    """
    with named("config.json: "):
        scoring = _scoring(hf)
        _refuse_unsupported(hf)
        quantization(hf)
        missing = [name for name in _SAME if name not in hf and name != "q_lora_rank"]
        require(not missing, f"lacks {missing}")
        values = {name: hf.get(name) for name in _SAME}
        values |= {name: hf[name] for name in _OPTIONAL if hf.get(name) is not None}
        values |= _router(hf, scoring) | _rope(hf)
        values["num_nextn_predict_layers"] = _either(hf, 0, "num_nextn_predict_layers", "num_mtp_layers")
        values["dtype"] = _dtype(hf)
        cfg = build(ModelConfig, values)
        implied = {
            "num_key_value_heads": cfg.num_attention_heads,
            "head_dim": cfg.qk_rope_head_dim,
            "qk_head_dim": cfg.qk_head_dim,
            "num_local_experts": cfg.n_routed_experts,
            "num_experts": cfg.n_routed_experts,
        }
        for name, value in implied.items():  # fields that repeat what others say
            _supported(hf, name, (value,))
    return cfg


def to_hf(cfg: ModelConfig) -> dict[str, Any]:
    """The config.json (as a dict) that `transformers` reads for this model: DeepseekV3 with sigmoid gating,
    DeepseekV2 with softmax.

    Raises ValueError for a combination that no published format expresses.
    """
    if cfg.scoring_func == "softmax" and (cfg.norm_topk_prob or cfg.num_nextn_predict_layers):
        raise ValueError(
            f"DeepSeek-V2's format has neither norm_topk_prob={cfg.norm_topk_prob} nor "
            f"num_nextn_predict_layers={cfg.num_nextn_predict_layers}: use False and 0, or scoring_func='sigmoid'"
        )
    v3, grouped = cfg.scoring_func == "sigmoid", cfg.n_group > 1
    topk_method = "noaux_tc" if v3 else ("group_limited_greedy" if grouped else "greedy")
    hf: dict[str, Any] = {
        "architectures": ["DeepseekV3ForCausalLM" if v3 else "DeepseekV2ForCausalLM"],
        "model_type": "deepseek_v3" if v3 else "deepseek_v2",
        "attention_bias": False,
        "hidden_act": "silu",
        "moe_layer_freq": 1,
        "n_group": cfg.n_group,
        "n_shared_experts": cfg.n_shared_experts,
        "num_key_value_heads": cfg.num_attention_heads,
        "rope_scaling": None,
        "rope_theta": cfg.rope_theta,
        "scoring_func": cfg.scoring_func,
        "topk_group": cfg.topk_group,
        "topk_method": topk_method,
        "torch_dtype": cfg.dtype,
        "use_cache": True,
    }
    hf |= {name: getattr(cfg, name) for name in (*_SAME, *_OPTIONAL)}
    if v3:
        hf["num_nextn_predict_layers"] = cfg.num_nextn_predict_layers
    if cfg.rope_scaling is not None:
        hf["rope_scaling"] = dataclasses.asdict(cfg.rope_scaling) | {"type": "yarn"}
    return dict(sorted(hf.items()))


# `ModelConfig` stands below this folder and has the two as methods: they come to it, it does not import them.
ModelConfig.from_hf, ModelConfig.to_hf = staticmethod(from_hf), to_hf


def quantization(hf: Mapping[str, Any]) -> str | None:
    """Returns the format of the FP8 scales: None for an unquantised checkpoint, else "fp32" or "ue8m0".

    Which tensors are FP8, the files themselves say. Raises ValueError for any quantisation that is not DeepSeek's
    (e4m3, blocks of 128 x 128).
    """
    q = hf.get("quantization_config")
    if q is None:
        return None
    require(isinstance(q, Mapping), f"quantization_config={shown(q)} should be an object")
    for name, values in _QUANTIZATION.items():
        _supported(q, name, values, "quantization_config.", f"; {_DEQUANTISE}")
    for name, value in q.items():
        known = name in _QUANTIZATION or name in _QUANTIZATION_HARMLESS or value is None
        field = f"quantization_config.{plain(str(name))}={shown(value)}"
        require(known, f"unknown field {field}; {_DEQUANTISE}")
    unset = [name for name in _QUANTIZATION_NEEDED if q.get(name) is None]
    missing = [f"{name} ({name}=None)" if name in q else name for name in unset]
    require(not missing, f"quantization_config lacks {' and '.join(missing)}; {_DEQUANTISE}")
    return "ue8m0" if q.get("scale_fmt") == "ue8m0" else "fp32"


def quantization_config(scale: str) -> dict[str, Any]:
    """`quantization_config` of DeepSeek's FP8 layout, with "fp32" scales (V3) or "ue8m0" ones (V3.1)."""
    names = ("activation_scheme", "fmt", "quant_method", "weight_block_size")
    config = {name: _QUANTIZATION[name][0] for name in names}
    return config | ({"scale_fmt": "ue8m0"} if scale == "ue8m0" else {})


# --- the parts of from_hf ---------------------------------------------------------------------------------


def _supported(
    hf: Mapping[str, Any], name: str, values: Sequence[Any], path: str = "", more: str = ""
) -> None:
    """Raises ValueError, ending with `more`, if the field is set and not to one of `values`."""
    value = hf.get(name)
    if value is not None and value not in values:
        said = f"{path}{name}={shown(value)} is not supported"
        raise ValueError(f"{said}; supported: {list(values)}{more}")


def _scoring(hf: Mapping[str, Any]) -> str:
    require(hf.get("model_type") is not None, "lacks model_type")
    _supported(hf, "model_type", _SIGMOID_TYPES + _SOFTMAX_TYPES)
    expected = "sigmoid" if hf["model_type"] in _SIGMOID_TYPES else "softmax"
    _supported(hf, "scoring_func", (expected,), more=f" with model_type={hf['model_type']!r}")
    return expected


def _refuse_unsupported(hf: Mapping[str, Any]) -> None:
    known = _HARMLESS | _HANDLED | set(_FIXED) | set(_SAME) | set(_OPTIONAL)
    # Unset fields carry no meaning, and transformers writes its private ones with a leading underscore.
    unknown = [k for k, v in hf.items() if k not in known and v is not None and not str(k).startswith("_")]
    if unknown:
        named = ", ".join(f"{plain(str(k))}={shown(hf[k])}" for k in sorted(unknown, key=str)[:5])
        raise ValueError(
            f"unknown or unsupported fields: {named}; one that does not change what the model computes can be "
            "taken out of the file"
        )
    for name, values in _FIXED.items():
        _supported(hf, name, values)


def _router(hf: Mapping[str, Any], scoring: str) -> dict[str, Any]:
    methods = ("noaux_tc",) if scoring == "sigmoid" else ("greedy", "group_limited_greedy")
    _supported(hf, "topk_method", methods, more=f" with {scoring} gating")
    method = methods[0] if hf.get("topk_method") is None else hf["topk_method"]
    if scoring == "softmax" and hf.get("norm_topk_prob"):
        raise ValueError(
            "norm_topk_prob=True is not supported with softmax gating (the released code drops "
            "routed_scaling_factor then, transformers ignores the field)"
        )
    unset = {"n_group": 1, "topk_group": 1, "n_shared_experts": 0}
    values = {name: hf[name] if hf.get(name) is not None else value for name, value in unset.items()}
    if method == "greedy":  # V2-Lite: groups, if given, are not looked at
        values |= {"n_group": 1, "topk_group": 1}
    return values | {"scoring_func": scoring}


def _rope(hf: Mapping[str, Any]) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling`, the latter as a mapping for `build`, from either spelling or both."""
    rope = _rope_fields(hf)
    theta = rope.pop("rope_theta", None)
    require(theta is not None, "lacks rope_theta")
    kind = rope.pop("type", "default")
    for name, value in _YARN_FIXED.items():
        if rope.pop(name, value) != value:
            raise ValueError(f"rope_scaling.{name} is not supported but for {value}")
    if kind == "default":
        require(not rope, f"rope_scaling fields {sorted(map(plain, rope))} without type 'yarn'")
        return {"rope_theta": theta, "rope_scaling": None}
    require(kind == "yarn", f"rope_scaling.type={shown(kind)} is not supported; supported: 'yarn'")
    unknown = sorted(plain(k) for k in rope if k not in _YARN)
    require(not unknown, f"unknown fields of rope_scaling: {unknown}; known: {list(_YARN)}")
    missing = [k for k in ("factor", "original_max_position_embeddings") if k not in rope]
    require(not missing, f"rope_scaling lacks {missing}")
    # Absent means what DeepSeek's code takes: no mscale in the softmax scale.
    return {"rope_theta": theta, "rope_scaling": {"mscale": 1.0, "mscale_all_dim": 0.0} | rope}


def _rope_fields(hf: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `rope_theta`, `rope_scaling` and `rope_parameters` together, `rope_type` as `type`.

    Unset ones are left out. Raises ValueError where two spellings differ; that a kind is "default" in one of them
    leaves it to the other.
    """
    found: dict[str, Any] = {} if hf.get("rope_theta") is None else {"rope_theta": hf["rope_theta"]}
    kinds = []
    for name in ("rope_scaling", "rope_parameters"):
        fields = hf.get(name)
        if fields is None:
            continue
        require(isinstance(fields, Mapping), f"{name}={shown(fields)} should be an object")
        for key, value in fields.items():
            if key in ("type", "rope_type"):
                kinds.append(value)
            elif value is not None:
                require(
                    found.setdefault(key, value) == value,
                    f"{name}.{plain(str(key))}={shown(value)}, but elsewhere it is {shown(found[key])}: rope_theta, "
                    "rope_scaling and rope_parameters must agree; take out what is wrong",
                )
    named = [kind for kind in kinds if kind not in ("default", None)]
    require(
        all(kind == named[0] for kind in named),
        f"rope_scaling has two types, {shown(named)}: rope_scaling and rope_parameters must agree",
    )
    return found | ({"type": named[0]} if named else {})


def _either(hf: Mapping[str, Any], default: Any, *names: str) -> Any:
    """Returns the value of a field with two names; `default` if neither is set."""
    found = {name: hf[name] for name in names if hf.get(name) is not None}
    values = list(found.values())
    require(
        all(v == values[0] for v in values),
        f"{shown(found)} are two names of one field, with different values",
    )
    return values[0] if values else default


def _dtype(hf: Mapping[str, Any]) -> str:
    dtype = _either(hf, "float32", "torch_dtype", "dtype")
    hint = "; the weights keep their own, set the one to compute in"
    _supported({"torch_dtype": dtype}, "torch_dtype", ("float32", "bfloat16"), more=hint)
    return dtype
