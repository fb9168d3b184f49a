"""One line that says what a model is."""

import collections
from typing import Any

import jax

from deepseek_jax.config import MeshConfig, ModelConfig
from deepseek_jax.data.tokenizer import Tokenizer


def _count(n: int) -> str:
    """1.2B, 340M, 56k."""
    size, unit = next((s, u) for s, u in ((1e9, "B"), (1e6, "M"), (1e3, "k"), (1, "")) if n >= s or s == 1)
    return f"{n / size:.3g}{unit}"


def describe(cfg: ModelConfig, params: Any, tokenizer: Tokenizer | None, mesh: MeshConfig | None) -> str:
    sizes: dict[str, int] = collections.Counter()
    for x in jax.tree.leaves(params):
        sizes[x.dtype.name] += x.size
    known = "no tokenizer" if tokenizer is None else f"tokenizer of {tokenizer.vocab_size:,} ids"
    axes = [] if mesh is None else [f"{a}={getattr(mesh, a)}" for a in ("data", "node", "local", "tensor")]
    parts = (
        f"{cfg.num_hidden_layers} layers ({cfg.num_moe_layers} with {cfg.n_routed_experts} experts)",
        f"{_count(cfg.num_params())} parameters, {_count(cfg.num_active_params())} active",
        max(sizes, key=sizes.__getitem__),
        f"{cfg.max_position_embeddings:,} positions",
        known,
        *([f"over {', '.join(axes)}"] if axes else []),
    )
    return f"Model({'; '.join(parts)})"
