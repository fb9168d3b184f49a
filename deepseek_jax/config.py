"""Configuration: frozen, validated dataclasses with DeepSeek's names, and the counts derived from them.

`ModelConfig` describes any model of the family (DeepSeek-V3/R1/V3.1, V2, V2-Lite, Moonlight, Kimi-K2).
`Config` is the frozen whole of a training run; `from_config_dict` builds it once from a
`ml_collections.ConfigDict` and names the nearest valid key for every mistake.
Sources: technical report sections 2 and 4; the published config.json of each model.
"""

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from typing import Any

# Presets of `deepseek_jax.precision`, which says what each quantises.
PRECISIONS = (
    "bf16",
    "deepseek_fp8",
    "deepseek_fp8_ue8m0",
    "per_token_channel",
    "per_tensor",
    "block_wise_grads",
)
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float8_e4m3fn": 1}


def _require(ok: bool, message: str) -> None:
    if not ok:
        raise ValueError(message)


def _choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        close = difflib.get_close_matches(str(value), choices, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"{name}={value!r} is not one of {list(choices)}{hint}")


@dataclasses.dataclass(frozen=True)
class YarnConfig:
    """YaRN context extension of RoPE (report section 4.3; `rope_scaling` of config.json)."""

    factor: float = 40.0
    original_max_position_embeddings: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 1.0

    def __post_init__(self):
        _require(self.factor >= 1.0, f"rope_scaling.factor={self.factor} must be >= 1")
        _require(
            self.original_max_position_embeddings > 0,
            f"rope_scaling.original_max_position_embeddings={self.original_max_position_embeddings} must be > 0",
        )


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Architecture of one model; every default is DeepSeek-V3's (report section 4.2)."""

    vocab_size: int = 129280
    hidden_size: int = 7168
    num_hidden_layers: int = 61
    first_k_dense_replace: int = 3
    intermediate_size: int = 18432
    # Multi-head Latent Attention (section 2.1.1)
    num_attention_heads: int = 128
    q_lora_rank: int | None = 1536  # None: full-rank queries (V2-Lite)
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    rope_theta: float = 10000.0
    rope_scaling: YarnConfig | None = None
    max_position_embeddings: int = 4096
    # DeepSeekMoE (section 2.1.2)
    moe_intermediate_size: int = 2048
    n_routed_experts: int = 256
    n_shared_experts: int = 1
    num_experts_per_tok: int = 8
    n_group: int = 8
    topk_group: int = 4
    scoring_func: str = "sigmoid"  # V2: "softmax", which has no correction bias
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 2.5
    # Multi-Token Prediction (section 2.2)
    num_nextn_predict_layers: int = 1
    # everything else
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.006
    tie_word_embeddings: bool = False
    dtype: str = "float32"  # compute dtype; master parameters are float32

    def __post_init__(self):
        for name in (
            "vocab_size",
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "kv_lora_rank",
            "qk_nope_head_dim",
            "qk_rope_head_dim",
            "v_head_dim",
            "max_position_embeddings",
        ):
            _require(getattr(self, name) > 0, f"{name}={getattr(self, name)} must be positive")
        _choice("scoring_func", self.scoring_func, ("sigmoid", "softmax"))
        _choice("dtype", self.dtype, ("float32", "bfloat16"))
        _require(self.qk_rope_head_dim % 2 == 0, f"qk_rope_head_dim={self.qk_rope_head_dim} must be even")
        _require(
            0 <= self.first_k_dense_replace <= self.num_hidden_layers,
            f"first_k_dense_replace={self.first_k_dense_replace} must lie in [0, num_hidden_layers={self.num_hidden_layers}]",
        )
        _require(
            self.q_lora_rank is None or self.q_lora_rank > 0, f"q_lora_rank={self.q_lora_rank}: use None"
        )
        _require(
            self.num_nextn_predict_layers >= 0,
            f"num_nextn_predict_layers={self.num_nextn_predict_layers} must be >= 0",
        )
        if self.num_moe_layers or self.num_nextn_predict_layers:
            self._check_moe()
        else:
            _require(
                self.intermediate_size > 0, f"intermediate_size={self.intermediate_size} must be positive"
            )

    def _check_moe(self):
        e, g, k = self.n_routed_experts, self.n_group, self.num_experts_per_tok
        _require(e > 0 and k > 0, f"n_routed_experts={e} and num_experts_per_tok={k} must be positive")
        _require(g > 0 and e % g == 0, f"n_routed_experts={e} must be divisible by n_group={g}")
        _require(0 < self.topk_group <= g, f"topk_group={self.topk_group} must lie in [1, n_group={g}]")
        _require(
            k <= self.topk_group * (e // g),
            f"num_experts_per_tok={k} exceeds the {self.topk_group * (e // g)} experts of topk_group={self.topk_group} groups",
        )
        _require(self.n_shared_experts >= 0, f"n_shared_experts={self.n_shared_experts} must be >= 0")

    # --- shapes that follow -------------------------------------------------------------------------------

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def num_moe_layers(self) -> int:
        """MoE layers of the main model, without the MTP modules."""
        return self.num_hidden_layers - self.first_k_dense_replace

    @property
    def has_balance_bias(self) -> bool:
        """Sigmoid gating selects with a correction bias (auxiliary-loss-free balancing); softmax does not."""
        return self.scoring_func == "sigmoid"

    @property
    def balance_bias_shape(self) -> tuple[int, int]:
        """[layer, expert]: the MoE layers of the main model, then one row per MTP module."""
        return (self.num_moe_layers + self.num_nextn_predict_layers, self.n_routed_experts)

    # --- counts -------------------------------------------------------------------------------------------

    def _mla_params(self) -> tuple[int, int]:
        """(matmul parameters, norm parameters) of one attention layer."""
        d, h, rq, rkv = self.hidden_size, self.num_attention_heads, self.q_lora_rank, self.kv_lora_rank
        q = d * rq + rq * h * self.qk_head_dim if rq else d * h * self.qk_head_dim
        kv = d * (rkv + self.qk_rope_head_dim) + rkv * h * (self.qk_nope_head_dim + self.v_head_dim)
        return q + kv + h * self.v_head_dim * d, (rq or 0) + rkv

    def _moe_params(self, experts: int) -> int:
        """Matmul parameters of one MoE FFN with `experts` routed experts counted (the gate counts whole)."""
        expert = 3 * self.hidden_size * self.moe_intermediate_size
        return (experts + self.n_shared_experts) * expert + self.hidden_size * self.n_routed_experts

    def _count(self, experts: int) -> tuple[int, int]:
        """(matmul parameters without embedding and head, norms and biases) of the main model."""
        mla, mla_norms = self._mla_params()
        dense = self.first_k_dense_replace * 3 * self.hidden_size * self.intermediate_size
        moe = self.num_moe_layers * self._moe_params(experts) if self.num_moe_layers else 0
        norms = self.num_hidden_layers * (mla_norms + 2 * self.hidden_size) + self.hidden_size
        bias = self.num_moe_layers * self.n_routed_experts if self.has_balance_bias else 0
        return self.num_hidden_layers * mla + dense + moe, norms + bias

    def num_params(self) -> int:
        """Parameters of the main model, correction biases included, MTP modules excluded."""
        matmul, rest = self._count(self.n_routed_experts)
        tables = 1 if self.tie_word_embeddings else 2
        return matmul + rest + tables * self.vocab_size * self.hidden_size

    def num_active_params(self) -> int:
        """Parameters used per token, without the embedding table, as DeepSeek counts ("37B")."""
        matmul, rest = self._count(self.num_experts_per_tok)
        return matmul + rest + self.vocab_size * self.hidden_size

    def num_mtp_params(self) -> int:
        """Parameters that the MTP modules add (embedding and head are shared)."""
        d, (mla, mla_norms) = self.hidden_size, self._mla_params()
        bias = self.n_routed_experts if self.has_balance_bias else 0
        block = mla + mla_norms + self._moe_params(self.n_routed_experts) + bias + 2 * d
        return self.num_nextn_predict_layers * (block + 2 * d * d + 3 * d)

    def flops_per_token(self, seq_len: int, causal: bool = True) -> float:
        """Training FLOPs per token (forward and backward) of the main model at `seq_len`, MTP excluded.

        6 per matmul parameter, plus the attention core with half of the scores masked if `causal`
        (ISCA paper, table 2: 250 GFLOP per token for V3 at 4K).
        """
        matmul, _ = self._count(self.num_experts_per_tok)
        linear = 6 * (matmul + self.vocab_size * self.hidden_size)
        keys = seq_len / 2 if causal else seq_len
        heads = self.num_attention_heads * (self.qk_head_dim + self.v_head_dim)
        return linear + 6 * self.num_hidden_layers * keys * heads

    def kv_cache_bytes_per_token(self, dtype: str = "bfloat16") -> int:
        """Bytes of latent cache per token over all layers (main model).

        float8_e4m3fn is DeepSeek's mixed layout: FP8 latent with a float32 scale per 128, RoPE part in BF16.
        """
        _choice("dtype", dtype, tuple(DTYPE_BYTES))
        if dtype == "float8_e4m3fn":
            per_layer = self.kv_lora_rank + 4 * -(-self.kv_lora_rank // 128) + 2 * self.qk_rope_head_dim
        else:
            per_layer = (self.kv_lora_rank + self.qk_rope_head_dim) * DTYPE_BYTES[dtype]
        return per_layer * self.num_hidden_layers

    # --- Hugging Face config.json -------------------------------------------------------------------------

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "ModelConfig":
        """ModelConfig of a parsed config.json. Raises ValueError on unknown or unsupported fields."""
        from deepseek_jax.hf_config import from_hf

        return from_hf(hf)

    def to_hf(self) -> dict[str, Any]:
        """The config.json (as a dict) that `transformers` reads for this model."""
        from deepseek_jax.hf_config import to_hf

        return to_hf(self)


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where text comes from and how it becomes windows of tokens (report section 4.1)."""

    source: str = "stdlib"  # "stdlib": the interpreter's own library sources; else a glob
    validation: str | None = None  # a glob; None: hold out `validation_fraction` of the documents
    validation_fraction: float = 0.05
    text_field: str = "text"
    tokenizer: str | None = None  # None: train a byte-level BPE of `vocab_size`; else a tokenizer.json
    vocab_size: int = 4096
    seq_len: int = 256
    fim_rate: float = 0.1
    split_punctuation_rate: float = 0.0
    segments: bool = False  # True: documents packed into one window do not see each other
    seed: int = 0
    cache_dir: str = ".cache"

    def __post_init__(self):
        _require(self.seq_len > 0, f"data.seq_len={self.seq_len} must be positive")
        for name in ("fim_rate", "split_punctuation_rate", "validation_fraction"):
            value = getattr(self, name)
            _require(0.0 <= value <= 1.0, f"data.{name}={value} must lie in [0, 1]")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and the schedules of report section 4.2, by token count (tokens of the report's 14.8T run).

    Every `*_tokens` is a boundary of the 14.8T run; `schedule_tokens` is the length of that run. A shorter
    run scales all boundaries by total_tokens / schedule_tokens, and the warm-up likewise
    (`training/schedules.py`).
    """

    peak_lr: float = 2.2e-4
    mid_lr: float = 2.2e-5
    final_lr: float = 7.3e-6
    warmup_steps: int = 2000
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    moment_dtype: str = "bfloat16"
    schedule_tokens: float = 14.8e12
    constant_until_tokens: float = 10e12
    cosine_until_tokens: float = 14.3e12
    mid_until_tokens: float = 14.633e12
    batch_start: int = 3072
    batch_ramp_tokens: float = 469e9
    gamma: float = 0.001
    gamma_until_tokens: float = 14.3e12
    mtp_lambda: float = 0.3
    mtp_lambda_final: float = 0.1
    mtp_lambda_until_tokens: float = 10e12

    def __post_init__(self):
        _choice("optimizer.moment_dtype", self.moment_dtype, ("float32", "bfloat16"))
        _require(self.peak_lr > 0, f"optimizer.peak_lr={self.peak_lr} must be positive")
        _require(self.clip_norm > 0, f"optimizer.clip_norm={self.clip_norm} must be positive")
        _require(self.warmup_steps >= 0, f"optimizer.warmup_steps={self.warmup_steps} must be >= 0")


@dataclasses.dataclass(frozen=True)
class BalanceConfig:
    """Load balancing (section 2.1.2): `loss_free` (bias update + sequence-wise loss) or `classic`.

    The classic loss takes the loads of each device's micro-batch, so it depends on the number of devices.
    """

    mode: str = "loss_free"
    seq_alpha: float = 1e-4  # weight of the sequence-wise loss, mode "loss_free"
    classic_alpha: float = 1e-2  # weight of the batch-wise auxiliary loss, mode "classic"

    def __post_init__(self):
        _choice("balance.mode", self.mode, ("loss_free", "classic", "none"))


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Size of each mesh axis; expert parallelism spans node x local x tensor. 0 for `data`: whatever is left.

    `tensor` divides the heads inside the attention and the tokens of a sequence outside of it (`parallel/tensor.py`).
    """

    pipe: int = 1
    data: int = 0
    node: int = 1
    local: int = 1
    tensor: int = 1
    experts: str = (
        "auto"  # sharded over node x local x tensor: "two_hop" or "flat", or "replicated"; auto: by mesh
    )
    dispatch: str = "auto"  # format of tokens on the way to experts: same (as computed), bf16, fp8, fp8_ue8m0
    combine: str = "auto"  # of results on the way back: same, bf16; auto: as `precision` says
    receive: float = (
        0.0  # rows received at once, in units of a device's tokens, more in rounds; 0: all at once
    )
    zero: bool = False  # ZeRO-1: master weights and moments divided over all axes that divide tokens
    overlap: bool = (
        False  # two halves of each device's batch in flight: one computes while the other's tokens travel
    )
    comm_channels: int = 0  # NCCL channels, so many SMs, that a collective may take on GPUs; 0: NCCL decides

    def __post_init__(self):
        for name in ("pipe", "data", "node", "local", "tensor"):
            value, low = getattr(self, name), 0 if name == "data" else 1
            _require(value >= low, f"mesh.{name}={value} must be >= {low}")
        _choice("mesh.experts", self.experts, ("auto", "two_hop", "flat", "replicated"))
        _choice("mesh.dispatch", self.dispatch, ("auto", "same", "bf16", "fp8", "fp8_ue8m0"))
        _choice("mesh.combine", self.combine, ("auto", "same", "bf16"))
        _require(
            0 <= self.comm_channels <= 64, f"mesh.comm_channels={self.comm_channels} must lie in [0, 64]"
        )
        _require(self.receive >= 0, f"mesh.receive={self.receive} must be >= 0; 0 for everything at once")


@dataclasses.dataclass(frozen=True)
class DistributedConfig:
    """Several processes that train together (`parallel/distributed.py`).

    With nothing set: what SLURM, Kubernetes, Open MPI or `experiments.launch` say in the environment, else one
    process. What is set here comes before the environment.
    """

    coordinator: str = ""  # HOST:PORT at which process 0 listens
    processes: int = 0  # how many; 0: from the environment
    process: int = -1  # which one this is, from 0; -1: from the environment
    cluster: str = "auto"  # "none": do not look at the environment
    start_timeout: int = 300  # seconds until all processes must have met
    heartbeat_timeout: int = 20  # seconds of silence after which a process counts as dead and the others exit

    def __post_init__(self):
        _choice("distributed.cluster", self.cluster, ("auto", "none"))
        host, _, port = self.coordinator.rpartition(":")
        ok = not self.coordinator or (bool(host) and port.isdecimal() and 0 < int(port) < 1 << 16)
        _require(ok, f"distributed.coordinator={self.coordinator!r} should be HOST:PORT, as 10.0.0.1:1234")
        _require(self.processes >= 0, f"distributed.processes={self.processes} must be >= 0")
        _require(self.process >= -1, f"distributed.process={self.process} must be >= 0, or -1")
        for name in ("start_timeout", "heartbeat_timeout"):
            value = getattr(self, name)
            _require(value > 0, f"distributed.{name}={value} must be a positive number of seconds")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Length, batch and bookkeeping of a run."""

    steps: int = 300
    batch_size: int = 16  # sequences per step, after the ramp
    grad_accumulation: int = 1
    remat: str = "none"
    loss_chunk: int = 1024  # tokens whose logits are in memory at once
    ema_decay: float = 0.999
    ema_every: int = 10  # steps between updates of the host-side average
    seed: int = 0
    eval_every: int = 100
    eval_windows: int = 64
    checkpoint_every: int = 100
    keep: int = 3
    max_bad_steps: int = 5
    out_dir: str = "runs/tiny"
    sample_tokens: int = 96  # of the completions shown at the end; 0: none

    def __post_init__(self):
        _choice("train.remat", self.remat, ("none", "deepseek", "full"))
        for name in (
            "steps",
            "batch_size",
            "grad_accumulation",
            "loss_chunk",
            "keep",
            "max_bad_steps",
            "ema_every",
        ):
            _require(getattr(self, name) > 0, f"train.{name}={getattr(self, name)} must be positive")
        _require(
            self.batch_size % self.grad_accumulation == 0,
            f"train.batch_size={self.batch_size} must be divisible by grad_accumulation={self.grad_accumulation}",
        )
        _require(0.0 <= self.ema_decay < 1.0, f"train.ema_decay={self.ema_decay} must lie in [0, 1)")


@dataclasses.dataclass(frozen=True)
class Config:
    """The frozen whole of a training run."""

    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    balance: BalanceConfig = dataclasses.field(default_factory=BalanceConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    distributed: DistributedConfig = dataclasses.field(default_factory=DistributedConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    precision: str = "bf16"  # of the linear layers: one of PRECISIONS

    def __post_init__(self):
        _choice("precision", self.precision, PRECISIONS)
        _require(
            self.data.tokenizer is not None or self.model.vocab_size >= self.data.vocab_size,
            f"model.vocab_size={self.model.vocab_size} is smaller than data.vocab_size={self.data.vocab_size}",
        )
        _require(
            self.data.seq_len <= self.model.max_position_embeddings,
            f"data.seq_len={self.data.seq_len} exceeds model.max_position_embeddings="
            f"{self.model.max_position_embeddings}; raise it and set model.rope_scaling",
        )


# --- building dataclasses from mappings -------------------------------------------------------------------


def _dataclass_in(annotation: Any) -> Any:
    """The dataclass in an annotation such as `YarnConfig | None`, or None."""
    options = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    return next((o for o in options if dataclasses.is_dataclass(o)), None)


def build(cls: Any, values: Mapping[str, Any], path: str = "") -> Any:
    """Dataclass `cls` from a mapping; unknown keys raise ValueError with the nearest valid one."""
    hints = typing.get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(cls)]
    kwargs = {}
    for key, value in values.items():
        if key not in names:
            close = difflib.get_close_matches(key, names, n=1)
            hint = f"did you mean {path}{close[0]!s}?" if close else f"valid keys: {', '.join(names)}"
            raise ValueError(f"unknown config key {path}{key}; {hint}")
        nested = _dataclass_in(hints[key])
        if nested is not None and isinstance(value, Mapping):
            value = build(nested, value, f"{path}{key}.")
        else:
            _check_type(f"{path}{key}", value, hints[key])
        kwargs[key] = value
    return cls(**kwargs)


def _check_type(name: str, value: Any, annotation: Any) -> None:
    options = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    if dataclasses.is_dataclass(value) or any(dataclasses.is_dataclass(o) and value is o for o in options):
        return
    for option in options:
        if option is float and isinstance(value, int | float) and not isinstance(value, bool):
            return
        if isinstance(value, option) and not (option is int and isinstance(value, bool)):
            return
    raise ValueError(f"config key {name}={value!r} should be {annotation}, not {type(value).__name__}")


def from_config_dict(cfg: Any) -> Config:
    """The frozen `Config` of an `ml_collections.ConfigDict` or of any nested mapping.

    Raises ValueError naming the key, and the nearest valid one, for unknown keys, wrong types and bad values.
    """
    values = cfg.to_dict() if hasattr(cfg, "to_dict") else dict(cfg)
    return build(Config, values)


def to_dict(config: Any) -> dict[str, Any]:
    """Nested plain dict of a config dataclass: JSON-serialisable, and `build` of it gives it back."""
    return dataclasses.asdict(config)
