"""Splits the last two dims of an array into blocks of 128 and joins them again; lays out their scales.

An extent that is no multiple of the block is treated as if it were zero-padded to the next multiple and cut again
afterwards (the convention of DeepSeek-V3's published weights), so a scale array has `ceil(extent / block)` entries.
"""

import jax
import jax.numpy as jnp

BLOCK = 128
ROW_TILE = (1, BLOCK)  # activations and gradients: one scale per token and 128 channels
COLUMN_TILE = (BLOCK, 1)  # operands of the weight gradient: one scale per channel and 128 tokens
SQUARE_BLOCK = (BLOCK, BLOCK)  # weights

Block = tuple[int, int]


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def round_up(a: int, b: int) -> int:
    return cdiv(a, b) * b


def num_blocks(shape: tuple[int, ...], block: Block) -> tuple[int, ...]:
    """Returns the shape of the scales of an array of `shape` quantised in `block`: the last two dims are divided up."""
    return (*shape[:-2], cdiv(shape[-2], block[0]), cdiv(shape[-1], block[1]))


def pad_last2(x: jax.Array, multiples: Block) -> jax.Array:
    """Pads the last two dims with zeros up to multiples."""
    pad = [(0, round_up(n, m) - n) for n, m in zip(x.shape[-2:], multiples, strict=True)]
    if not any(after for _, after in pad):
        return x
    return jnp.pad(x, [(0, 0)] * (x.ndim - 2) + pad)


def split_blocks(x: jax.Array, block: Block) -> jax.Array:
    """Splits [..., M, K] into [..., ceil(M/bm), bm, ceil(K/bk), bk], padded with zeros where it is ragged."""
    x = pad_last2(x, block)
    *lead, m, k = x.shape
    return x.reshape(*lead, m // block[0], block[0], k // block[1], block[1])


def merge_blocks(tiles: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Undoes `split_blocks`: joins the blocks to an array of `shape` and cuts the padding off."""
    *lead, mb, bm, kb, bk = tiles.shape
    return tiles.reshape(*lead, mb * bm, kb * bk)[..., : shape[-2], : shape[-1]]


def expand_scale(scale: jax.Array, block: Block, shape: tuple[int, ...]) -> jax.Array:
    """Repeats the scale of each block for each element of an array of `shape`."""
    rows = jnp.repeat(scale, block[0], axis=-2) if block[0] > 1 else scale
    full = jnp.repeat(rows, block[1], axis=-1) if block[1] > 1 else rows
    return full[..., : shape[-2], : shape[-1]]


def check_quantized(
    op: str, name: str, q: jax.Array, scale: jax.Array, ndim: int | None, *blocks: Block
) -> None:
    """Raises ValueError unless `q` is E4M3, of `ndim` dims where that is given, and `scale` has the shape that one of
    `blocks` needs."""
    if q.dtype != jnp.float8_e4m3fn or ndim not in (None, q.ndim):
        dims = "" if ndim is None else f" of {ndim} dims"
        raise ValueError(f"{op}: {name} is {q.dtype}{list(q.shape)}; expected float8_e4m3fn{dims}")
    needed = [num_blocks(q.shape, block) for block in blocks]
    if scale.shape not in needed:
        either = " or ".join(map(str, needed))
        raise ValueError(f"{op}: {name}_scale has shape {scale.shape}; {name} {q.shape} needs {either}")
