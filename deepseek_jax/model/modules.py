"""Flax Linen modules over the pure functions: they declare parameters and call. For notebooks and study.

Dims: b batch, t token, d hidden, v vocabulary.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from deepseek_jax.config import ModelConfig
from deepseek_jax.model.block import block_params
from deepseek_jax.model.layers import logits
from deepseek_jax.model.layout import Inputs, single_device
from deepseek_jax.model.mla import mla, mla_params
from deepseek_jax.model.moe import moe
from deepseek_jax.model.params import declare
from deepseek_jax.model.rope import rope_table
from deepseek_jax.model.transformer import Aux, context, forward, model_params


class MLA(nn.Module):
    """Multi-head Latent Attention over [b, t, d], without norm and residual."""

    cfg: ModelConfig

    @nn.compact
    def __call__(self, x_btd: jax.Array, positions: jax.Array | None = None) -> jax.Array:
        if positions is None:
            positions = jnp.arange(x_btd.shape[1])[None]
        p = declare(self, mla_params(self.cfg), self.cfg.initializer_range)
        return mla(p, self.cfg, x_btd, rope_table(self.cfg, positions))[0]


class DeepSeekMoE(nn.Module):
    """The second half of a MoE block over [b, t, d]: norm, gate, shared and routed experts, residual.

    Returns (x plus the experts' outputs, `BalanceStats`).
    """

    cfg: ModelConfig

    @nn.compact
    def __call__(self, x_btd: jax.Array, bias_e: jax.Array | None = None) -> Any:
        tree = {name: p for name, p in block_params(self.cfg, True).items() if name in ("ffn", "ffn_norm_d")}
        p = declare(self, tree, self.cfg.initializer_range)
        ctx = context(self.cfg, Inputs(jnp.zeros(x_btd.shape[:2], jnp.int32)), single_device())
        return moe(p, self.cfg, x_btd, bias_e, ctx)


class DeepSeekV3(nn.Module):
    """The whole model. `apply({"params": params}, tokens_bt, balance_bias=...) -> (logits_btv, aux)`.

    Logits are float32. `aux.mtp` holds the MTP modules' logits [depth, b, t, v]: depth k at position i
    predicts token i + k + 2 (counting k from 0); its last k + 1 positions are meaningless.
    """

    cfg: ModelConfig
    remat: str = "none"

    @nn.compact
    def __call__(
        self,
        tokens_bt: jax.Array,
        balance_bias: jax.Array | None = None,
        positions: jax.Array | None = None,
        segments: jax.Array | None = None,
    ) -> tuple[jax.Array, Aux]:
        params = declare(self, model_params(self.cfg), self.cfg.initializer_range)
        inputs = Inputs(tokens_bt, positions, segments)
        h_btd, aux = forward(params, self.cfg, inputs, balance_bias, single_device(self.remat))
        mtp_logits = None if aux.mtp is None else logits(params, aux.mtp)
        return logits(params, h_btd), aux._replace(mtp=mtp_logits)
