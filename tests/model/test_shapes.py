"""Names of arrays end in their dims, and the dims have the sizes that the legend says. Nothing is computed.

Dims: as in `deepseek_jax/README.md`; m: nope head dim and value head dim together.
"""

import chex
import jax
import jax.numpy as jnp
import pytest

from deepseek_jax.model.layers import logits
from deepseek_jax.model.layout import Inputs, single_device
from deepseek_jax.model.params import abstract
from deepseek_jax.model.transformer import forward, model_params
from tests.oracle.tiny import V2, V3

B, T = 2, 9
MODELS = pytest.mark.parametrize("cfg", [V3, V2], ids=["v3", "v2"])


def sizes(cfg, where: str) -> dict[str, int]:
    """Size of each letter in the array at the dotted path `where`."""
    common = {
        "b": B,
        "t": T,
        "s": T,
        "d": cfg.hidden_size,
        "h": cfg.num_attention_heads,
        "q": cfg.q_lora_rank,
        "c": cfg.kv_lora_rank,
        "r": cfg.qk_rope_head_dim,
        "k": cfg.qk_head_dim,
        "m": cfg.qk_nope_head_dim + cfg.v_head_dim,
        "v": cfg.v_head_dim,
        "e": cfg.n_routed_experts,
        "f": cfg.moe_intermediate_size,
        "l": cfg.num_moe_layers + cfg.num_nextn_predict_layers,
    }
    particular = {
        "wkv_a_dc": {"c": cfg.kv_lora_rank + cfg.qk_rope_head_dim},
        "w_eh_cd": {"c": 2 * cfg.hidden_size},
        "w_embed_vd": {"v": cfg.vocab_size},
        "w_head_dv": {"v": cfg.vocab_size},
        "dense_layers.ffn": {"f": cfg.intermediate_size},
        "shared": {"f": cfg.n_shared_experts * cfg.moe_intermediate_size},
    }
    return common | {k: v for part, own in particular.items() if part in where for k, v in own.items()}


def assert_named(tree, cfg) -> list[str]:
    """Every array's last dims are those that its name ends in; the letters that were compared."""
    seen = []
    for path, x in jax.tree_util.tree_leaves_with_path(tree):
        where = jax.tree_util.keystr(path, simple=True, separator=".")
        letters = where.rpartition("_")[2]
        chex.assert_shape(x, (..., *(sizes(cfg, where)[letter] for letter in letters)))
        seen.append(letters)
    return seen


@MODELS
def test_parameters(cfg):
    params = abstract(model_params(cfg))
    seen = assert_named(params, cfg)
    assert {"dc", "chm", "hvd", "efd", "vd", "dv"} <= set(seen)
    for name, layers in (
        ("dense_layers", cfg.first_k_dense_replace),
        ("moe_layers", cfg.num_moe_layers),
        ("mtp", cfg.num_nextn_predict_layers),
    ):
        chex.assert_tree_shape_prefix(params.get(name, {}), (layers,))


@MODELS
def test_what_a_pass_gives(cfg):
    def run(params, tokens):
        hidden_btd, aux = forward(params, cfg, Inputs(tokens), None, single_device())
        return hidden_btd, logits(params, hidden_btd), aux

    params, tokens = abstract(model_params(cfg)), jax.ShapeDtypeStruct((B, T), jnp.int32)
    hidden_btd, logits_btv, aux = jax.eval_shape(run, params, tokens)
    assert_named({"hidden_btd": hidden_btd, "expert_counts_le": aux.expert_counts_le}, cfg)
    chex.assert_shape(logits_btv, (B, T, cfg.vocab_size))
    chex.assert_tree_shape_prefix(aux.mtp, (cfg.num_nextn_predict_layers, B, T))
    chex.assert_rank((aux.seq_loss, aux.classic_loss), 0)
    chex.assert_type((logits_btv, aux.seq_loss, aux.expert_counts_le), (jnp.float32, jnp.float32, jnp.int32))


def test_a_name_that_says_something_else():
    with pytest.raises(AssertionError, match="has shape"):
        assert_named({"w_up_fd": jnp.zeros((V3.hidden_size, V3.moe_intermediate_size))}, V3)
