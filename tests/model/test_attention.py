"""Training over more tokens than a block of the attention, against dense attention that JAX differentiates."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.model import mla
from deepseek_jax.model.layers import linear
from deepseek_jax.training.labels import totals
from pallas_kernels.mla_attention.fallback import BLOCK
from tests.parallel.comparison import difference
from tests.parallel.harness import SHALLOW
from tests.tiny_run import fresh_state, gradients, tiny, tokens

T = BLOCK + 88
CFG = tiny(
    model=SHALLOW | {"max_position_embeddings": T},
    data={"seq_len": T},
    train={"batch_size": 1, "loss_chunk": T},
)
# As `comparison.BOUND`, with sums over all T tokens: errors of sqrt(20 + T) * 6e-8 on each side, and half as much again
# for sums that cancel, twice.
BOUND = 2.5 * math.sqrt(2) * 6e-8 * math.sqrt(20 + T)


def dense(qkv, segments_bt, wo_hvd):
    """The attention in one piece."""
    q, k, v = qkv
    seen = jnp.tril(jnp.ones((T, T), bool))[None] & (segments_bt[:, :, None] == segments_bt[:, None])
    score = jnp.where(seen[:, None], jnp.einsum("bhtk,bhsk->bhts", q, k), -jnp.inf)
    o = jnp.einsum("bhts,bhsv->bthv", jax.nn.softmax(score, axis=-1), v)
    return linear(o, wo_hvd, n_in=2)


def trained():
    """Gradients of pre-training on a document of 333 tokens and its successor."""
    segments = (np.arange(T + 1)[None] >= 333).astype(np.int32)
    positions = np.arange(T + 1, dtype=np.int32)[None] - 333 * segments
    batch = {"tokens": tokens(CFG), "segments": segments, "positions": positions}
    state = fresh_state(CFG)
    run = jax.jit(lambda *args: gradients(args[0], None, CFG, *args[1:], totals(CFG, args[1], 1)))
    return run(state.params, batch, state.balance_bias)


def test_training_over_blocks_is_training_with_dense_attention(monkeypatch):
    got = trained()
    monkeypatch.setattr(mla, "core_output", dense)
    want = trained()
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True):
        assert difference(x, y) < BOUND, jax.tree_util.keystr(path)
        assert np.asarray(y).any()
