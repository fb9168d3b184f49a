"""What rows look like while they travel: formats, and packing of a token's parts into one message of words.

Report section 3.2.2 and 3.3.3: tokens are dispatched in FP8, one scale per 128 channels beside them, and results
are combined in BF16. The same holds backwards: the gradient of a combine is a dispatch, that of a dispatch a combine.

Dims: n row, d hidden, w 32-bit word.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax

from deepseek_jax.checks import choice
from deepseek_jax.config import COMBINE_FORMATS, DISPATCH_FORMATS
from pallas_kernels.quantize.ops import dequantize, quantize

SCALES = {"fp8": "fp32", "fp8_ue8m0": "ue8m0"}  # format -> kind of scale


@dataclasses.dataclass(frozen=True)
class Wire:
    """Formats of dispatch and combine: "same" as the array at hand, "bf16", or for dispatch "fp8" (E4M3, a float32
    scale per 128 channels) and "fp8_ue8m0" (scales rounded up to powers of two)."""

    dispatch: str = "same"
    combine: str = "same"

    def __post_init__(self):
        choice("wire.dispatch", self.dispatch, DISPATCH_FORMATS)
        choice(
            "wire.combine", self.combine, COMBINE_FORMATS
        )  # partial sums are not quantised (section 3.3.3)


def encode(x_nd: jax.Array, form: str) -> tuple[jax.Array, ...]:
    """The arrays that travel for `x_nd`; row i of each belongs to row i of `x_nd`."""
    if form in SCALES:
        return quantize(x_nd, scale=SCALES[form])
    return (x_nd if form == "same" else x_nd.astype(jnp.bfloat16),)


def decode(parts: Sequence[jax.Array], form: str, dtype: Any) -> jax.Array:
    """The inverse of `encode`, in `dtype`."""
    if form in SCALES:
        q_nd, scale = parts
        return dequantize(q_nd, scale, dtype=dtype)
    return parts[0].astype(dtype)


# --- messages -------------------------------------------------------------------------------------------------

Layout = tuple[tuple[int, Any], ...]  # columns and dtype of each part


def _words(x: jax.Array) -> jax.Array:
    """[n, columns] of any dtype of 1, 2, 4 or 8 bytes -> uint32 [n, w], the last word zero-padded."""
    per = 4 // x.dtype.itemsize
    if per <= 1:
        return lax.bitcast_convert_type(x, jnp.uint32).reshape(len(x), num_words(x.shape[1], x.dtype))
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % per)))
    return lax.bitcast_convert_type(x.reshape(x.shape[0], -1, per), jnp.uint32)


def num_words(columns: int, dtype: Any) -> int:
    """How many 32-bit words a row of `columns` entries takes."""
    return -(-columns * jnp.dtype(dtype).itemsize // 4)


def pack(parts: Sequence[jax.Array]) -> tuple[jax.Array, Layout]:
    """Parts [n, ...] -> one message per row, uint32 [n, w], so that a hop is one collective; and their layout.

    Words, not bytes: rows are gathered and scattered, which is slow by single bytes.
    """
    layout = tuple((p.shape[1], p.dtype) for p in parts)
    return jnp.concatenate([_words(p) for p in parts], axis=1), layout


def unpack(message_nw: jax.Array, layout: Layout) -> tuple[jax.Array, ...]:
    """The inverse of `pack`; rows of zeros come out as zeros."""
    parts, start = [], 0
    for columns, dtype in layout:
        stop = start + num_words(columns, dtype)
        words = message_nw[:, start:stop]
        if jnp.dtype(dtype).itemsize == 8:
            words = words.reshape(len(words), columns, 2)
        x = lax.bitcast_convert_type(words, dtype)
        parts.append(x.reshape(x.shape[0], -1)[:, :columns])
        start = stop
    return tuple(parts)


@flax.struct.dataclass
class Message:
    """Rows as they travel: words uint32 [n, w], and how to read them."""

    words_nw: jax.Array
    layout: Layout = flax.struct.field(pytree_node=False)
    form: str = flax.struct.field(pytree_node=False)
    dtype: Any = flax.struct.field(pytree_node=False)

    def with_words(self, words_nw: jax.Array) -> "Message":
        """The same rows elsewhere."""
        return Message(words_nw, self.layout, self.form, self.dtype)


def write(values: tuple[jax.Array, ...], form: str) -> Message:
    """One message per row of `values`: the first [n, d] in `form`, the others [n, ...] as they are."""
    words_nw, layout = pack((*encode(values[0], form), *values[1:]))
    return Message(words_nw, layout, form, values[0].dtype)


def read(message: Message) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, jax.Array] | None]:
    """(values that were written; the first as it travelled, if that was in FP8)."""
    parts = unpack(message.words_nw, message.layout)
    if message.form not in SCALES:
        return (decode(parts[:1], message.form, message.dtype), *parts[1:]), None
    return (decode(parts[:2], message.form, message.dtype), *parts[2:]), (parts[0], parts[1])
