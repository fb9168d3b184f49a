"""What a batch holds: the inputs of a pass, the labels of each depth, and how many of them count over all devices.

Losses are divided by the *global* number of labels on each device, so that plain sums over devices give global means,
whatever the micro-batches and devices. Without masks a window has t labels, also of an MTP depth, whose last ones are
missing (equation 24). With segments, a loss mask or padding, what counts of each depth is counted.

Dims: b sequence, t token, w window (t + 1 or more tokens), k MTP depth.
"""

import difflib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from deepseek_jax.config import Config
from deepseek_jax.model.layout import Inputs

# Arrays [b, w]. "tokens" int32; and optional
# "segments", "positions" int32: of packed documents, which do not see each other;
# "loss_mask" bool: which tokens count as labels (of a conversation, the answers);
# "padding" bool: what is no token. It goes to no routed expert, counts in no load and no loss. Attention leaves it out
#   only where it is a segment of its own, or comes after all that reads it.
# "routes" integers [b, w, l, k]: the experts that each token goes to in each MoE layer of the main model, chosen by another
#   pass (`model/layout.py: Inputs`); a token's own are in its own column, -1 where the router is to choose.
Batch = Mapping[str, jax.Array]
MASKS = ("segments", "loss_mask", "padding")


_DTYPES = {"segments": jnp.integer, "positions": jnp.integer, "loss_mask": jnp.bool_, "padding": jnp.bool_}


def check(batch: Batch, t: int) -> None:
    """Raises ValueError for arrays of a batch that do not fit each other or windows of t tokens and the next."""
    if "tokens" not in batch:
        raise ValueError(f'a batch has "tokens" [b, {t + 1}]; this one has {sorted(batch)}')
    shape = jnp.shape(batch["tokens"])
    if len(shape) != 2 or shape[1] <= t:
        raise ValueError(
            f'batch["tokens"] has shape {list(shape)}: a window of data.seq_len={t} tokens needs {t + 1} columns, since '
            "the last token is a label"
        )
    for name, x in batch.items():
        kind = _DTYPES.get(name)
        if name == "routes":
            if jnp.ndim(x) != 4 or jnp.shape(x)[:2] != shape or not jnp.issubdtype(x.dtype, jnp.integer):
                raise ValueError(
                    f'batch["routes"] is {x.dtype}{list(jnp.shape(x))}; it should be integers [{shape[0]}, {shape[1]}, MoE '
                    "layers, num_experts_per_tok]"
                )
        elif kind is None:
            close = difflib.get_close_matches(name, (*_DTYPES, "routes"), n=1, cutoff=0.8)
            if close:
                raise ValueError(f"a batch has no {name!r}; did you mean {close[0]!r}?")
        elif jnp.shape(x) != shape or not jnp.issubdtype(x.dtype, kind):
            raise ValueError(
                f"batch[{name!r}] is {x.dtype}{list(jnp.shape(x))}; it should be "
                f"{'bool' if kind is jnp.bool_ else 'int32'}{list(shape)}, as the tokens"
            )


class Totals(NamedTuple):
    """Of a global batch, what its losses are divided by: sequences, and labels of the main model (depth 0) and of each
    MTP depth. room: tokens of the largest batch, which is static. answers: sequences with a label of depth 0."""

    sequences: int | jax.Array
    labels: tuple[int | jax.Array, ...]
    room: int
    answers: int | jax.Array


def totals(
    cfg: Config, batch: Batch, sequences: int, micro_batches: jax.Array | None = None, axes: Any = ()
) -> Totals:
    """Totals of a global batch with room for `sequences`, of which `batch` are this device's rows.

    micro_batches: of the `grad_accumulation` ones that there is room for, the first so many are there; None: all.
    axes: the mesh axes that divide the global batch, inside `shard_map`. Raises ValueError as `check`.
    """
    check(batch, cfg.data.seq_len)
    t, depths, rows = cfg.data.seq_len, 1 + cfg.model.num_nextn_predict_layers, batch["tokens"].shape[0]
    room = sequences * t
    here: int | jax.Array = rows
    there: int | jax.Array = sequences
    if micro_batches is not None:
        here = micro_batches * (rows // cfg.train.grad_accumulation)
        # Float32: times t, an int32 would overflow from 2^31 tokens on.
        there = micro_batches.astype(jnp.float32) * (sequences // cfg.train.grad_accumulation)
    if not any(name in batch for name in MASKS):
        return Totals(there, (there * t,) * depths, room, there)
    present_b1 = jnp.arange(rows)[:, None] < here
    valid = [targets(batch, t, depth)[1] & present_b1 for depth in range(depths)]
    counts = [x.sum() for x in (*valid, with_tokens(batch, t) & present_b1[:, 0], valid[0].any(1))]
    total = lax.psum(jnp.stack(counts), axes) if axes else jnp.stack(counts)
    numbers = tuple(jnp.maximum(total, 1).astype(jnp.float32))
    with_any, answers = numbers[depths:]
    return Totals(with_any if "padding" in batch else there, numbers[:depths], room, answers)


def inputs(batch: Batch, t: int) -> Inputs:
    """The first t tokens of a batch's windows, as the model reads them."""

    def cut(name: str) -> jax.Array | None:
        return batch[name][:, :t] if name in batch else None

    padding = cut("padding")
    return Inputs(
        batch["tokens"][:, :t],
        cut("positions"),
        cut("segments"),
        None if padding is None else ~padding,
        cut("routes"),
    )


def with_tokens(batch: Batch, t: int) -> jax.Array:
    """Which sequences are not just padding: bool [b]."""
    if "padding" in batch:
        return ~batch["padding"][:, :t].all(1)
    return jnp.ones(batch["tokens"].shape[0], bool)


def targets(batch: Batch, t: int, depth: int) -> tuple[jax.Array, jax.Array]:
    """Labels [b, t] of depth 0 (main model) or k (MTP), and which of them count.

    Depth k predicts token i + k + 1 at position i. The last k positions of a window have no label within the window.
    With segments, a label of another document does not count.
    """

    def ahead(x: jax.Array) -> jax.Array:
        return jnp.roll(x[:, : t + 1], -(depth + 1), axis=1)[:, :t]

    valid = jnp.broadcast_to(jnp.arange(t) < t - depth, (batch["tokens"].shape[0], t))
    if "segments" in batch:
        valid &= ahead(batch["segments"]) == batch["segments"][:, :t]
    if "loss_mask" in batch:
        valid &= ahead(batch["loss_mask"])
    if "padding" in batch:
        valid &= ~(ahead(batch["padding"]) | batch["padding"][:, :t])
    return ahead(batch["tokens"]), valid
