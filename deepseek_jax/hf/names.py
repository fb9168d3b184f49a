"""`leaves` maps each leaf of the parameter tree to the tensors of a Hugging Face checkpoint that make it up.

A leaf stacks one tensor per layer, or per layer and expert, on leading axes. Matrices are [out, in] in the
checkpoint and [in..., out...] here; the embedding and the norms are as they are. Rotary dimensions are
interleaved pairs on both sides. The correction biases are rows of `balance_bias`, and each MTP module carries
copies of the embedding and of the output head, which this model shares.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np
from flax.traverse_util import unflatten_dict

from deepseek_jax.config import ModelConfig
from deepseek_jax.model.params import Param
from deepseek_jax.model.transformer import model_params

_TOP = {
    "embed.w_embed_vd": "model.embed_tokens.weight",
    "final_norm.scale_d": "model.norm.weight",
    "head.w_head_dv": "lm_head.weight",
}
_BLOCK = {
    "attn_norm_d": "input_layernorm.weight",
    "attn.wq_dhk": "self_attn.q_proj.weight",
    "attn.wq_a_dq": "self_attn.q_a_proj.weight",
    "attn.q_norm_q": "self_attn.q_a_layernorm.weight",
    "attn.wq_b_qhk": "self_attn.q_b_proj.weight",
    "attn.wkv_a_dc": "self_attn.kv_a_proj_with_mqa.weight",
    "attn.kv_norm_c": "self_attn.kv_a_layernorm.weight",
    "attn.wkv_b_chm": "self_attn.kv_b_proj.weight",
    "attn.wo_hvd": "self_attn.o_proj.weight",
    "ffn_norm_d": "post_attention_layernorm.weight",
    "ffn.w_gate_df": "mlp.gate_proj.weight",
    "ffn.w_up_df": "mlp.up_proj.weight",
    "ffn.w_down_fd": "mlp.down_proj.weight",
    "ffn.gate.w_gate_de": "mlp.gate.weight",
    "ffn.experts.w_gate_edf": "mlp.experts.{}.gate_proj.weight",
    "ffn.experts.w_up_edf": "mlp.experts.{}.up_proj.weight",
    "ffn.experts.w_down_efd": "mlp.experts.{}.down_proj.weight",
    "ffn.shared.w_gate_df": "mlp.shared_experts.gate_proj.weight",
    "ffn.shared.w_up_df": "mlp.shared_experts.up_proj.weight",
    "ffn.shared.w_down_fd": "mlp.shared_experts.down_proj.weight",
}
_MTP = {
    "enorm_d": "enorm.weight",
    "hnorm_d": "hnorm.weight",
    "w_eh_cd": "eh_proj.weight",
    "norm_d": "shared_head.norm.weight",
} | {f"block.{ours}": theirs for ours, theirs in _BLOCK.items()}

_TWO_INPUT_DIMS = ("wo_hvd",)
# Matrices that DeepSeek's FP8 layout leaves in BF16, besides the embedding (report section 3.3.1).
_NEVER_FP8 = ("w_head_dv", "w_gate_de", "w_eh_cd")

_LAYER = re.compile(r"model\.layers\.(\d{1,9})\.")

Index = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One leaf of the parameter tree.

    path: keys joined by dots. shape: with the stacked axes in front. stack: those axes, one tensor each.
    hf_shape: of one tensor in the checkpoint. transposed: whether the tensor is [out, in]. split: how many
    dims of a piece are input dims.
    """

    path: str
    shape: tuple[int, ...]
    stack: tuple[int, ...]
    hf_shape: tuple[int, ...]
    transposed: bool
    split: int
    first_layer: int
    template: str

    @property
    def piece_shape(self) -> tuple[int, ...]:
        """Shape of one tensor in this model's layout."""
        return self.shape[len(self.stack) :]

    @property
    def may_be_fp8(self) -> bool:
        return self.transposed and not self.path.endswith(_NEVER_FP8)

    def indices(self) -> Iterator[Index]:
        """Every index into the stacked axes; a single empty one if there are none."""
        return itertools.product(*map(range, self.stack))

    def name(self, index: Index) -> str:
        """Checkpoint name of the tensor at `index`."""
        if not index:
            return self.template
        return self.template.format(self.first_layer + index[0], *index[1:])

    def from_hf(self, w: np.ndarray) -> np.ndarray:
        """Tensor of the checkpoint -> piece of this leaf (a view)."""
        return w.T.reshape(self.piece_shape) if self.transposed else w

    def to_hf(self, x: np.ndarray) -> np.ndarray:
        """Piece of this leaf -> tensor of the checkpoint (a view)."""
        return x.reshape(self.hf_shape[::-1]).T if self.transposed else x


def leaves(cfg: ModelConfig) -> dict[str, Leaf]:
    """Every leaf of the parameter tree by its path, in the order of the tree."""
    flat = jax.tree_util.tree_flatten_with_path(model_params(cfg), is_leaf=lambda x: isinstance(x, Param))[0]
    found = (_leaf(cfg, [str(k.key) for k in keys], param) for keys, param in flat)
    return {leaf.path: leaf for leaf in found}


def _leaf(cfg: ModelConfig, keys: list[str], param: Param) -> Leaf:
    path = ".".join(keys)
    stack = tuple(itertools.takewhile(lambda axis: axis in ("layer", "expert"), param.axes))
    n = len(stack)
    piece = param.shape[n:]
    transposed = len(piece) > 1 and path != "embed.w_embed_vd"
    split = 2 if keys[-1] in _TWO_INPUT_DIMS else 1
    hf_shape = (math.prod(piece[split:]), math.prod(piece[:split])) if transposed else piece
    template, first = _template(cfg, keys)
    return Leaf(path, param.shape, param.shape[:n], hf_shape, transposed, split, first, template)


def _template(cfg: ModelConfig, keys: list[str]) -> tuple[str, int]:
    """(checkpoint name with places for layer and expert, first layer's number)."""
    layers = {
        "dense_layers": (_BLOCK, 0),
        "moe_layers": (_BLOCK, cfg.first_k_dense_replace),
        "mtp": (_MTP, cfg.num_hidden_layers),
    }
    if keys[0] not in layers:
        return _TOP[".".join(keys)], 0
    table, first = layers[keys[0]]
    return "model.layers.{}." + table[".".join(keys[1:])], first


def bias_names(cfg: ModelConfig) -> list[str]:
    """Checkpoint name of each row of `balance_bias`; empty for softmax gating."""
    if not cfg.has_balance_bias:
        return []
    first = cfg.first_k_dense_replace
    rows = cfg.balance_bias_shape[0]
    return [f"model.layers.{first + row}.mlp.gate.e_score_correction_bias" for row in range(rows)]


def shared_copies(cfg: ModelConfig) -> dict[str, str]:
    """Tensors of the MTP modules that repeat one of the main model's: copy -> original."""
    head = "model.embed_tokens.weight" if cfg.tie_word_embeddings else "lm_head.weight"
    copies = {}
    for layer in range(cfg.num_hidden_layers, cfg.num_hidden_layers + cfg.num_nextn_predict_layers):
        copies[f"model.layers.{layer}.embed_tokens.weight"] = "model.embed_tokens.weight"
        copies[f"model.layers.{layer}.shared_head.head.weight"] = head
    return copies


def mtp_of(cfg: ModelConfig, names: Iterable[str]) -> set[str]:
    """The names that belong to MTP modules: layers behind those of the main model."""
    found = ((name, _LAYER.match(name)) for name in names)
    return {name for name, match in found if match and int(match[1]) >= cfg.num_hidden_layers}


def get(tree: Any, path: str) -> Any:
    """The leaf of a nested dict at a dotted path."""
    for key in path.split("."):
        tree = tree[key]
    return tree


def unflatten(flat: dict[str, Any]) -> dict[str, Any]:
    """Nested dict of a dict with dotted paths."""
    return unflatten_dict(flat, sep=".")
