"""The architecture of one model, with DeepSeek's names, and the counts derived from it.

`ModelConfig` describes any model of the family (DeepSeek-V3/R1/V3.1, V2, V2-Lite, Moonlight, Kimi-K2).
Sources: technical report sections 2 and 4; the published config.json of each model.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from deepseek_jax.checks import choice, ranges, require

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float8_e4m3fn": 1}


# The largest values are far beyond any model, and small enough that whatever takes time or memory by them still ends.
_WIDTH, _LAYERS, _EXPERTS, _LENGTH = 1 << 20, 10_000, 100_000, 1 << 30


@dataclasses.dataclass(frozen=True)
class YarnConfig:
    """YaRN context extension of RoPE (report section 4.3; `rope_scaling` of config.json)."""

    factor: float = 40.0  # longest context over the one trained with
    original_max_position_embeddings: int = 4096  # the context trained with
    beta_fast: float = 32.0  # rotations within it from which a channel stays as it is
    beta_slow: float = 1.0  # rotations within it below which a channel is interpolated
    mscale: float = 1.0  # logits grow with 0.1 mscale ln(factor) + 1, ...
    mscale_all_dim: float = 1.0  # ... and this is the part that the softmax scale takes

    def __post_init__(self):
        ranges("rope_scaling", self, "original_max_position_embeddings", 1, _LENGTH)
        ranges("rope_scaling", self, "factor", 1, 1e6)
        ranges("rope_scaling", self, "beta_fast beta_slow", 1e-6, 1e6)
        ranges("rope_scaling", self, "mscale mscale_all_dim", 0, 1e6)
        require(
            self.beta_slow <= self.beta_fast,
            f"rope_scaling.beta_slow={self.beta_slow} must not exceed rope_scaling.beta_fast={self.beta_fast}",
        )


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Architecture of one model; every default is DeepSeek-V3's (report section 4.2)."""

    vocab_size: int = 129280  # rows of the embedding and the head; at least the tokenizer's ids
    hidden_size: int = 7168  # channels of the residual stream
    num_hidden_layers: int = 61  # layers of the main model, dense ones included
    first_k_dense_replace: int = 3  # the first layers, whose FFN is dense
    intermediate_size: int = 18432  # inner channels of a dense FFN
    # --- Multi-head Latent Attention (section 2.1.1)
    num_attention_heads: int = 128  # heads; each has its own keys and values, expanded from the latent
    q_lora_rank: int | None = 1536  # None: full-rank queries (V2-Lite)
    kv_lora_rank: int = 512  # channels of the latent that keys and values share: the cache
    qk_nope_head_dim: int = 128  # channels of a query or key without position
    qk_rope_head_dim: int = 64  # channels with position; the key's are shared by all heads
    v_head_dim: int = 128  # channels of a value
    rope_theta: float = 10000.0  # base of the rotary frequencies
    rope_scaling: YarnConfig | None = None  # YaRN; None: plain rotary embedding
    max_position_embeddings: int = 4096  # longest sequence
    # --- DeepSeekMoE (section 2.1.2)
    moe_intermediate_size: int = 2048  # inner channels of one expert
    n_routed_experts: int = 256  # experts of a MoE layer to choose from
    n_shared_experts: int = 1  # experts of a MoE layer that every token takes
    num_experts_per_tok: int = 8  # experts that a token is routed to
    n_group: int = 8  # groups of experts; a token's experts come from a few of them
    topk_group: int = 4  # groups that a token may take experts from
    scoring_func: str = "sigmoid"  # V2: "softmax", which has no correction bias
    norm_topk_prob: bool = True  # the chosen experts' weights are divided by their sum
    routed_scaling_factor: float = 2.5  # and multiplied by this
    # --- Multi-Token Prediction (section 2.2)
    num_nextn_predict_layers: int = 1  # MTP modules: tokens predicted beyond the next one
    # --- everything else
    rms_norm_eps: float = 1e-6  # added to the mean square
    initializer_range: float = 0.006  # standard deviation of the first weights
    tie_word_embeddings: bool = False  # the head is the embedding's transpose
    dtype: str = "float32"  # compute dtype; master parameters are float32

    def __post_init__(self):
        require(self.q_lora_rank != 0, "q_lora_rank=0: use None")
        ranks = "kv_lora_rank" if self.q_lora_rank is None else "q_lora_rank kv_lora_rank"
        ranges("", self, f"hidden_size {ranks}", 1, _WIDTH)
        ranges("", self, "vocab_size", 1, 1 << 26)
        ranges("", self, "num_hidden_layers", 1, _LAYERS)
        ranges("", self, "first_k_dense_replace", 0, _LAYERS)
        ranges("", self, "intermediate_size moe_intermediate_size", 0, 1 << 24)
        ranges("", self, "num_attention_heads qk_nope_head_dim qk_rope_head_dim v_head_dim", 1, 1 << 16)
        ranges("", self, "max_position_embeddings", 1, _LENGTH)
        ranges("", self, "n_routed_experts num_experts_per_tok", 0, _EXPERTS)
        ranges("", self, "n_group topk_group", 1, _EXPERTS)
        ranges("", self, "n_shared_experts", 0, 1000)
        ranges("", self, "num_nextn_predict_layers", 0, 100)
        ranges("", self, "rope_theta", 2, 1e15)
        ranges("", self, "routed_scaling_factor initializer_range", 0, 1e6)
        ranges("", self, "rms_norm_eps", 0, 1)
        choice("scoring_func", self.scoring_func, ("sigmoid", "softmax"))
        choice("dtype", self.dtype, ("float32", "bfloat16"))
        require(self.qk_rope_head_dim % 2 == 0, f"qk_rope_head_dim={self.qk_rope_head_dim} must be even")
        require(
            0 <= self.first_k_dense_replace <= self.num_hidden_layers,
            f"first_k_dense_replace={self.first_k_dense_replace} must lie in [0, num_hidden_layers={self.num_hidden_layers}]",
        )
        dense, moe = self.first_k_dense_replace > 0, self.num_moe_layers or self.num_nextn_predict_layers
        require(
            not dense or self.intermediate_size > 0,
            f"intermediate_size={self.intermediate_size} must be positive",
        )
        if moe:
            self._check_moe()

    def _check_moe(self):
        e, g, k = self.n_routed_experts, self.n_group, self.num_experts_per_tok
        require(e > 0 and k > 0, f"n_routed_experts={e} and num_experts_per_tok={k} must be positive")
        require(
            self.moe_intermediate_size > 0,
            f"moe_intermediate_size={self.moe_intermediate_size} must be positive",
        )
        require(e % g == 0, f"n_routed_experts={e} must be divisible by n_group={g}")
        require(self.topk_group <= g, f"topk_group={self.topk_group} must lie in [1, n_group={g}]")
        require(
            k <= self.topk_group * (e // g),
            f"num_experts_per_tok={k} exceeds the {self.topk_group * (e // g)} experts of topk_group={self.topk_group} groups",
        )

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
        choice("dtype", dtype, tuple(DTYPE_BYTES))
        if dtype == "float8_e4m3fn":
            per_layer = self.kv_lora_rank + 4 * -(-self.kv_lora_rank // 128) + 2 * self.qk_rope_head_dim
        else:
            per_layer = (self.kv_lora_rank + self.qk_rope_head_dim) * DTYPE_BYTES[dtype]
        return per_layer * self.num_hidden_layers

    # --- Hugging Face config.json: the two functions of `hf/config.py`, which puts them here ------------------

    from_hf: ClassVar[Callable[[Mapping[str, Any]], "ModelConfig"]]
    to_hf: ClassVar[Callable[["ModelConfig"], dict[str, Any]]]
