"""MLA in the expanded form over a paged cache, for a prompt's chunk, and when it takes less time than the absorbed one.

Absorbed, a pair of a new and a cached token costs each head 2 c + r multiplications. Expanded, it costs n + r + v, after
c (n + v) of each cached token: in DeepSeek-V3 1,088 against 320 and 131,072. Both forms give the same but for rounding.

Dims: b sequence, t new token, s cached token, d hidden, h heads, k query and key width, v value width; of the model's
widths, c latent, n nope, r rope.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from deepseek_jax.config import ModelConfig
from deepseek_jax.model.attention import core_inputs
from deepseek_jax.model.cache import PagedView
from deepseek_jax.model.layers import Params, linear
from deepseek_jax.model.mla import Low, Rope, expand_latents, queries
from deepseek_jax.model.platform import on_cpu
from deepseek_jax.model.rope import softmax_scale
from pallas_kernels.mla_attention.ops import mla_attention

# FLOPs in the time of a byte: of products and attention in BF16 on an H100, 600 TFLOPS, by copies, 2.8 TB/s; and in float32
# on two CPU cores, 200 GFLOP/s by 10 GB/s.
H100, CPU = 215, 20
# Tokens, of all sequences, that are expanded at a time: in BF16, keys and values of 128 heads take 0.34 GB. On a CPU as few as
# the attention takes: a loop costs nothing there, and goes no further than the longest sequence.
EXPANDED, EXPANDED_ON_CPU = 4096, 1


def expands(cfg: ModelConfig, t: int, s: int, flops_per_byte: float) -> bool:
    """Whether t new tokens of a sequence, the last of s, cost less in the expanded form.

    Counted per head: FLOPs, and bytes that a kernel does not keep to itself, written once and read once or twice. In
    DeepSeek-V3 on an H100, a whole prompt is expanded, and behind a long prefix a chunk of some 490 tokens or more.
    """
    c, n, r, v = cfg.kv_lora_rank, cfg.qk_nope_head_dim, cfg.qk_rope_head_dim, cfg.v_head_dim
    byte, pairs = flops_per_byte * jnp.dtype(cfg.dtype).itemsize, t * (s - (t - 1) / 2)
    up = 2 * c * (n + v)  # of a cached token; of a new one, absorbed, its query and its output
    absorbed = 2 * pairs * (2 * c + r) + t * (up + byte * (6 * c + 2 * r))
    expanded = (
        2 * pairs * (n + r + v) + s * (up + byte * (4 * n + 4 * v + 2 * r)) + 2 * t * byte * (n + r + v)
    )
    return bool(expanded < absorbed)


class _Seen(NamedTuple):
    """Attention to the keys so far: out float32 [b, h, t, v], log-sum-exp [b, h, t], -inf of no key."""

    out: jax.Array
    lse: jax.Array

    def merged(self, new: "_Seen") -> "_Seen":
        """Attention to both parts of the keys."""
        lse = jnp.logaddexp(self.lse, new.lse)
        base = jnp.where(lse == -jnp.inf, 0, lse)
        old, weight = jnp.exp(self.lse - base)[..., None], jnp.exp(new.lse - base)[..., None]
        return _Seen(self.out * old + new.out * weight, lse)


class AsTheyAre(NamedTuple):
    """Queries of keys that are expanded from latents [b, t, h, k]."""

    q_bthk: jax.Array

    def attend(self, p: Params, cfg: ModelConfig, view: PagedView, i: int | jax.Array) -> jax.Array:
        """See `mla_over_pages`."""
        return mla_over_pages(p, cfg, self.q_bthk, view, i)


def queries_as_they_are(p: Params, cfg: ModelConfig, low: Low, rope: Rope) -> AsTheyAre:
    """Of the heads whose weights there are."""
    return AsTheyAre(queries(p, cfg, low, rope))


def mla_over_pages(
    p: Params,
    cfg: ModelConfig,
    q_bthk: jax.Array,
    view: PagedView,
    i: int | jax.Array,
) -> jax.Array:
    """t new tokens, of which there are the `queries`, attend over pages that already hold them, in layer i. Returns [b, t, d],
    the sum over the heads whose weights there are; what it holds for a token that does not count means nothing.

    `p` comes from `mla.absorb`. Cached tokens are expanded some thousands at a time, to the end of the longest sequence: the
    table may have room for many more. On a GPU a host waits once for each time, some 20 us of 600.
    """
    b, t = q_bthk.shape[:2]
    pages, blocks = _blocks(view, b, t)
    slots = pages * view.pages_lpsw.shape[2]

    def attend(j: int | jax.Array) -> _Seen:
        k_bshk, v_bshv = expand_latents(p, view.read(i, j * pages, pages, cfg))
        qkv = core_inputs(q_bthk, k_bshk, v_bshv, softmax_scale(cfg))
        out, lse = mla_attention(*qkv, None, view.lengths - t - j * slots)
        return _Seen(out.astype(jnp.float32), jnp.where(lse == jnp.inf, -jnp.inf, lse))

    seen = attend(0)
    if blocks > 1:
        end = jnp.minimum(-(-jnp.max(view.lengths) // slots), blocks)
        seen = lax.fori_loop(1, end, lambda j, seen: seen.merged(attend(j)), seen)
    o_bthv = jnp.swapaxes(seen.out, 1, 2).astype(q_bthk.dtype)
    return linear(o_bthv, p["wo_hvd"], n_in=2)


def _blocks(view: PagedView, b: int, t: int) -> tuple[int, int]:
    """(pages of a block, blocks), about equal, of at least t tokens, as the attention wants."""
    n, page = view.block_table.shape[1], view.pages_lpsw.shape[2]
    expanded = EXPANDED_ON_CPU if on_cpu() else EXPANDED
    blocks = -(-n // max(1, expanded // (b * page), -(-t // page)))
    pages = max(-(-n // blocks), -(-t // page))
    return pages, -(-n // pages)
