"""Decoding over pages on a mesh of eight devices, each with rows and pages of its own: the states of one device."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from deepseek_jax.config import MeshConfig
from deepseek_jax.model import decoding
from deepseek_jax.model.cache import empty_pages, paged_view
from deepseek_jax.model.decoding import ONE_DEVICE, decode, mtp_decode, prepare
from deepseek_jax.parallel.layout import many_tokens
from deepseek_jax.parallel.mesh import TOKEN_AXES, make_mesh
from deepseek_jax.parallel.prepared import (
    generation_mesh,
    parameter_shardings,
    parameter_specs,
    preparing,
    ready_specs,
)
from deepseek_jax.parallel.tensor import Divided
from deepseek_jax.precision import preset
from deepseek_jax.precision.product import from_blocks
from tests.oracle.tiny import weights
from tests.parallel.comparison import BOUND, difference
from tests.tiny_run import tiny

# A MoE layer and an MTP module, 8 experts.
CFG = dataclasses.replace(tiny().model, num_hidden_layers=1, first_k_dense_replace=0)
PAGE, T, EACH, DEVICES, B = 8, 16, 5, 8, 2  # EACH: pages of a device, of B rows; the last is nobody's
TABLE = np.tile(np.array([[3, 0], [2, 1]], np.int32), (DEVICES, 1))
RNG = np.random.default_rng(3)
# Tokens of each row in a chunk of 16: of all lengths, none among them, and no row at all on two devices.
NEW = np.where(np.arange(16) // B % 4 == 3, 0, np.resize([12, 0, 5, 1, 9, 7], 16)).astype(np.int32)
TOKENS = RNG.integers(0, CFG.vocab_size, (16, T + 1)).astype(np.int32)
ROWS, PAGES = P(TOKEN_AXES), P(None, TOKEN_AXES)
MESH = MeshConfig(data=1, node=2, local=2, tensor=2)


def empty(pages):
    """For main model and MTP module; what was not written must not be looked at."""
    return tuple(
        jnp.full_like(empty_pages(CFG, n, pages, page=PAGE), jnp.nan) for n in (CFG.num_hidden_layers, 1)
    )


def chunk(ready, bias, pages, table, lengths, tokens, new, layout):
    """States of the main model and of the MTP module after the tokens of each row, and the pages of both."""
    t = tokens.shape[1] - 1
    main, mtp = (paged_view(x, table, lengths, t, new) for x in pages)
    h, main, _ = decode(ready, CFG, tokens[:, :t], main, bias, layout)
    drafts, mtp, _ = mtp_decode(ready, CFG, h, tokens[:, 1:], mtp, bias, layout)
    return jnp.stack([h, drafts], axis=1), (main.pages_lpsw, mtp.pages_lpsw)


def run(step, pages, table):
    """States [b, 2, t, d] where a token is, and pages."""
    h, pages = step(pages, table, NEW, TOKENS, NEW)
    there = np.arange(T)[None] >= T - NEW[:, None]
    return np.moveaxis(np.asarray(h), 1, 2)[there], [np.asarray(x) for x in pages]


@functools.cache
def model():
    return weights(CFG, seed=4)


@functools.cache
def alone():
    """On one device, which has the pages of all."""
    params, bias = model()
    step = jax.jit(functools.partial(chunk, prepare(params, CFG), bias, layout=ONE_DEVICE))
    offset = np.repeat(np.arange(DEVICES, dtype=np.int32) * EACH, B)[:, None]
    return run(step, empty(DEVICES * EACH), TABLE + offset)


def over_mesh():
    (params, bias), devices = model(), generation_mesh(CFG, MESH)
    ready = preparing(CFG, MESH)(jax.device_put(params, parameter_shardings(CFG, MESH)))
    of_ready = ready_specs(CFG, parameter_specs(CFG, MESH, devices))

    def step(ready, pages, table, lengths, tokens, new):
        t = tokens.shape[1] - 1
        return chunk(ready, bias, pages, table, lengths, tokens, new, many_tokens(CFG, MESH, devices, t))

    specs = dict(
        in_specs=(of_ready, (PAGES, PAGES), ROWS, ROWS, ROWS, ROWS), out_specs=(ROWS, (PAGES, PAGES))
    )
    rows = jax.shard_map(step, mesh=devices, check_vma=False, **specs)
    return run(functools.partial(jax.jit(rows), ready), empty(DEVICES * EACH), TABLE)


def test_chunks_over_pages_are_those_of_one_device(monkeypatch):
    """By the exchange for many tokens, heads and tokens divided over two devices, in the expanded form, which costs fewer FLOPs.
    The pages are one device's, and what was not written stays as it was."""
    monkeypatch.setattr(decoding, "CPU", 0)
    got, pages = over_mesh()
    want, one = alone()
    assert difference(got, want) < BOUND
    for x, y in zip(pages, one, strict=True):
        np.testing.assert_array_equal(np.isnan(x), np.isnan(y))
        assert difference(np.nan_to_num(x), np.nan_to_num(y)) < BOUND


def test_heads_of_weights_in_fp8():
    """Each of two devices has the blocks of its heads, of queries' outputs and of the output projection's inputs."""
    rng = np.random.default_rng(0)

    def stored(outputs, inputs, shape):
        q = rng.standard_normal((outputs, inputs)).astype(jnp.float8_e4m3fn)
        scale = rng.uniform(1, 2, (-(-outputs // 128), -(-inputs // 128))).astype(np.float32)
        return from_blocks(jnp.asarray(q), jnp.asarray(scale), shape, preset("deepseek_fp8"))

    weights = {"wq_b_qhk": stored(4 * 64, 40, (40, 4, 64)), "wo_hvd": stored(72, 4 * 128, (4, 128, 72))}
    mesh = make_mesh(MeshConfig(data=1, tensor=2), jax.devices()[:2])

    def parts(weights):
        mine = Divided().ready_heads(weights)
        return {name: w.array(jnp.float32)[None] for name, w in mine.items()}

    over = jax.jit(jax.shard_map(parts, mesh=mesh, in_specs=P(), out_specs=P("tensor"), check_vma=False))
    got = over(weights)
    for name, dim in (("wq_b_qhk", 1), ("wo_hvd", 0)):
        want = np.split(np.asarray(weights[name].array(jnp.float32)), 2, axis=dim)
        np.testing.assert_array_equal(got[name], np.stack(want))
    with pytest.raises(
        ValueError, match=r"2 devices of tensor would have 96 columns each, no multiple of the 128"
    ):
        over({"wq_b_qhk": stored(4 * 48, 40, (40, 4, 48))})
