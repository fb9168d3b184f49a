"""From how many tokens on it pays to run a program's rows in two halves, by bandwidths (report section 3.4).

Each half reads every weight of the layers, so a pass in two halves reads them once more; at best the whole exchange is
hidden for that. So it pays, if ever, from as many tokens of a device on as travel in the time in which memory gives its
weights of a layer:

    tokens = (bytes of weights / memory) / (bytes of a token's rows between nodes / NIC + inside a node / NVLink)

DeepSeek-V3 in FP8: 12 tokens on 18 nodes of 8 (EP144), where a token has a place for each node, 30 on 8 nodes, and inside a
single node, over NVLink, 506. It is a bound: as many tokens may compute for too short a time to hide what travels.
"""

import math

import jax
import jax.numpy as jnp

from deepseek_jax.config import MeshConfig, ModelConfig
from deepseek_jax.model.block import block_params
from deepseek_jax.model.params import Param
from deepseek_jax.model.platform import on_cpu
from deepseek_jax.parallel.exchange.wire import SCALES
from deepseek_jax.precision.policy import Policy
from pallas_kernels.blocks import BLOCK

# Bytes a second of an H100 and its links, as they are reached.
MEMORY, NIC, NVLINK = 2.8e12, 40e9, 150e9


def overlap_from(asked: int | str, cfg: ModelConfig, mesh: MeshConfig, policy: Policy | None) -> int | None:
    """Tokens of a device from which on rows are halved, as `Options.overlap` asks; None: never."""
    if asked == "off" or (asked == "auto" and on_cpu()):
        return None
    return pays_from(cfg, mesh, policy) if asked == "auto" else int(asked)


def pays_from(cfg: ModelConfig, mesh: MeshConfig, policy: Policy | None) -> int | None:
    """The bound above. policy: of weights in FP8. None: nothing travels."""
    travels = _exchange(cfg, mesh, policy)
    return math.ceil(_weights(cfg, mesh, policy) / travels) if travels else None


def _weights(cfg: ModelConfig, mesh: MeshConfig, policy: Policy | None) -> float:
    """Seconds to read a MoE layer's weights on a device."""
    ranks, wide = mesh.node * mesh.local * mesh.tensor, jnp.dtype(cfg.dtype).itemsize

    def read(p: Param) -> float:
        one = 1 if policy is not None and p.n_in is not None else wide
        return math.prod(p.shape) * one / (ranks if p.axes[0] == "expert" else 1)

    params = jax.tree.leaves(block_params(cfg, is_moe=True), is_leaf=lambda x: isinstance(x, Param))
    return sum(map(read, params)) / MEMORY


def _exchange(cfg: ModelConfig, mesh: MeshConfig, policy: Policy | None) -> float:
    """Seconds that a token's rows of a layer take on the links of a device, there and back."""
    if not cfg.n_routed_experts or mesh.experts == "replicated":
        return 0.0
    inside, wide = mesh.local * mesh.tensor, jnp.dtype(cfg.dtype).itemsize
    sent = ("same", "same") if policy is None else (policy.dispatch, policy.combine)
    named = (mesh.dispatch, mesh.combine)
    out, back = (form if name == "auto" else name for form, name in zip(sent, named, strict=True))
    each = cfg.hidden_size * (_bytes(out, wide) + _bytes(back, wide)) + 8 * cfg.num_experts_per_tok
    hops = ((mesh.node - 1) / NIC, min(cfg.num_experts_per_tok, mesh.node * inside) * (inside > 1) / NVLINK)
    return each * sum(hops)


def _bytes(form: str, wide: int) -> float:
    """Of a channel."""
    return 1 + 4 / BLOCK if form in SCALES else 2 if form == "bf16" else wide
