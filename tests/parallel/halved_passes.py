"""A pass over pages in two halves over eight devices, beside all rows at once: for a test, and all kinds of it:

python -m tests.parallel.halved_passes                     # 36 cases
python -m tests.parallel.halved_passes flat fp8=True       # those that say so of themselves

Weights in FP8 are compared with all rows at once only: on one device no dispatch gives tokens scales that are powers of two.
"""

import dataclasses
import functools
import math
import sys
import tempfile
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import PartitionSpec as P

import deepseek_jax
from deepseek_jax import hf
from deepseek_jax.config import MeshConfig
from deepseek_jax.model import decoding
from deepseek_jax.model.cache import empty_pages, paged_view
from deepseek_jax.model.decoding import ONE_DEVICE, decode, prepare
from deepseek_jax.parallel import prepared
from deepseek_jax.parallel.exchange.dispatcher import Ragged
from deepseek_jax.parallel.exchange.low_latency import LowLatency
from deepseek_jax.parallel.layout import few_tokens, halved, many_tokens
from deepseek_jax.parallel.mesh import TOKEN_AXES, named_devices
from deepseek_jax.parallel.prepared import (
    generation_mesh,
    parameter_shardings,
    parameter_specs,
    preparing,
    ready_specs,
)
from deepseek_jax.precision import preset
from deepseek_jax.serving.over_mesh import wire_of
from tests.oracle.tiny import weights
from tests.parallel.comparison import BOUND, difference
from tests.tiny_run import tiny

MESHES = {
    "one": MeshConfig(data=1),  # whose exchange is with itself: fast to compile
    "heads": MeshConfig(data=1, node=2, local=2, tensor=2),
    "rounds": MeshConfig(data=1, node=2, local=4, receive=1.0),
    "one node": MeshConfig(data=4, node=1, local=2),
    "flat": MeshConfig(data=1, node=4, local=2, experts="flat"),
}
PAGE, EACH = 8, 13  # EACH: pages of a device; the last is nobody's
ROWS, PAGES = P(TOKEN_AXES), P(None, TOKEN_AXES)
WIDE = {"hidden_size": 256, "initializer_range": 0.08}  # two blocks of FP8
FAST = {"xla_backend_optimization_level": 0}  # to compile; the numbers are the same to rounding


class Case(NamedTuple):
    """So many `rows` of `tokens` new tokens on each device, fewer in some of them, behind others that pages hold."""

    mesh: str
    kind: str  # of exchange: for "few" tokens, or for "many"
    rows: int
    tokens: int
    layers: int = 2
    dense: int = 0  # of these
    scanned: bool = False
    fp8: bool = False  # weights and dispatch

    @property
    def devices(self) -> int:
        return named_devices(MESHES[self.mesh])

    @property
    def bound(self) -> float:
        """In FP8 a value that differs by BOUND is rounded to the next of E4M3 where it lies so near to the middle of two, 1/16 of it
        apart at least: one in 1 / (16 BOUND), by 1/8 of it at most, in each of the eight products of a layer. The error of their
        gates becomes 1.28 times as large in SwiGLU."""
        one = math.sqrt(16 * BOUND) / 8
        return 1.28 * one * math.sqrt(8 * self.layers) if self.fp8 else BOUND


CASES = (
    *(Case(mesh, "few", rows, t, 3, 1) for mesh in MESHES for rows, t in ((4, 2), (3, 1), (1, 16))),
    *(Case(mesh, "many", rows, t, 3, 1) for mesh in MESHES for rows, t in ((2, 16), (3, 4), (1, 24))),
    Case("heads", "few", 4, 2, 5, 1, True),
    Case("heads", "many", 1, 16, 5, 1, True),
    # Not of rounds: in halves, a token's results come in others, and what comes in one is rounded to BF16.
    *(Case(mesh, "few", 3, 4, 3, 1, fp8=True) for mesh in ("rounds", "flat")),
    *(Case(mesh, "many", 3, 4, 3, 1, fp8=True) for mesh in ("one node", "flat")),
)


class Pass(NamedTuple):
    """What a pass reads, of all devices' rows; `pages` hold latents where a sequence has tokens before, and else NaN."""

    tokens: np.ndarray
    new: np.ndarray
    lengths: np.ndarray
    table: np.ndarray
    pages: np.ndarray


def config(case: Case):
    return dataclasses.replace(
        tiny().model,
        num_hidden_layers=case.layers,
        first_k_dense_replace=case.dense,
        num_nextn_predict_layers=0,
        **(WIDE if case.fp8 else {}),
    )


def stored_in_fp8(cfg, params, bias):
    """As a checkpoint in FP8 has them."""
    with tempfile.TemporaryDirectory() as folder:
        hf.save(f"{folder}/checkpoint", cfg, params, bias, format="fp8")
        return deepseek_jax.load(f"{folder}/checkpoint", dtype="float32", keep_fp8=True).params


def inputs(case: Case) -> Pass:
    """Rows of all lengths, the longest first, as the engine has them, and on two devices none at all."""
    cfg, rng, b = config(case), np.random.default_rng(3), case.rows * case.devices
    row, device = np.arange(b) % case.rows, np.arange(b) // case.rows
    new = np.where(device % 4 == 3, 0, np.maximum(0, case.tokens - 3 * row - device % 2)).astype(np.int32)
    lengths = np.where(new > 0, rng.integers(0, 10, b) + new, 0).astype(np.int32)
    of_row = (EACH - 1) // case.rows
    table = np.tile(np.arange(case.rows * of_row, dtype=np.int32).reshape(case.rows, -1), (case.devices, 1))
    x = np.array(empty_pages(cfg, case.layers, EACH * case.devices, page=PAGE))
    x[:] = np.nan
    for i in range(b):
        slot = np.arange(lengths[i] - new[i])
        page = device[i] * EACH + table[i, slot // PAGE]
        x[:, page, slot % PAGE] = rng.normal(size=(case.layers, len(slot), x.shape[-1]))
    tokens = rng.integers(0, cfg.vocab_size, (b, case.tokens)).astype(np.int32)
    return Pass(tokens, new, lengths, table, x)


def step(ready, cfg, bias, layout, at: Pass):
    view = paged_view(at.pages, at.table, at.lengths, at.tokens.shape[1], at.new)
    h, view, chosen = decode(ready, cfg, at.tokens, view, bias, layout)
    counts_le = jax.lax.psum(chosen.counts_le, TOKEN_AXES) if layout.mesh else chosen.counts_le
    return h, view.pages_lpsw, counts_le, chosen.experts_btlk


def alone(case: Case):
    """On one device, which has the pages of all."""
    cfg, at = config(case), inputs(case)
    params, bias = weights(cfg, seed=4)
    offset = np.repeat(np.arange(case.devices, dtype=np.int32) * EACH, case.rows)[:, None]
    run = jax.jit(
        functools.partial(step, prepare(params, cfg, whole=False), cfg, bias, ONE_DEVICE),
        compiler_options=FAST,
    )
    return run(at._replace(table=at.table + offset))


def over_devices(case: Case, in_halves: bool):
    cfg, mesh = config(case), MESHES[case.mesh]
    (params, bias), devices = weights(cfg, seed=4), generation_mesh(cfg, mesh)
    if case.fp8:
        params = stored_in_fp8(cfg, params, bias)
    ready = preparing(cfg, mesh)(jax.device_put(params, parameter_shardings(cfg, mesh)))
    few, wire = case.kind == "few", wire_of(preset("deepseek_fp8") if case.fp8 else None)
    layout = few_tokens(cfg, mesh, devices, wire)
    if not few:
        layout = many_tokens(cfg, mesh, devices, case.tokens, wire)
    if case.devices == 1:
        layout = dataclasses.replace(layout, dispatcher=LowLatency() if few else Ragged(mode="flat"))
    run = jax.shard_map(
        lambda ready, at: step(ready, cfg, bias, halved(layout) if in_halves else layout, at),
        mesh=devices,
        in_specs=(ready_specs(cfg, parameter_specs(cfg, mesh, devices)), Pass(ROWS, ROWS, ROWS, ROWS, PAGES)),
        out_specs=(ROWS, PAGES, P(), ROWS),
        check_vma=False,
    )
    return jax.jit(run, compiler_options=FAST)(ready, inputs(case))


def differ(case: Case, got, want) -> tuple[float, float]:
    """Of the states of tokens that count, and of pages, which are written in the same places."""
    there = np.arange(case.tokens)[None] >= case.tokens - inputs(case).new[:, None]
    (h, pages, *chosen), (h_want, pages_want, *chosen_want) = (tuple(map(np.asarray, x)) for x in (got, want))
    np.testing.assert_array_equal(chosen[0], chosen_want[0])
    np.testing.assert_array_equal(chosen[1][there], chosen_want[1][there])
    written = np.isfinite(pages_want)
    assert there.any() and np.isfinite(h[there]).all()
    np.testing.assert_array_equal(np.isfinite(pages), written)
    return difference(h[there], h_want[there]), difference(pages[written], pages_want[written])


def main(words: Sequence[str]) -> None:
    jax.config.update("jax_num_cpu_devices", 8)
    for case in (case for case in CASES if all(word in str(case) for word in words)):
        decoding.unrolled = prepared.unrolled = lambda cfg, case=case: not case.scanned
        got, whole = (over_devices(case, in_halves) for in_halves in (True, False))
        found = {"all rows at once": differ(case, got, whole)}
        if not case.fp8:
            found["one device"] = differ(case, got, alone(case))
        shown = "; ".join(f"from {name} states {h:.1e}, pages {x:.1e}" for name, (h, x) in found.items())
        print(f"{case}: {shown}", flush=True)
        assert max(map(max, found.values())) < case.bound, case


if __name__ == "__main__":
    main(sys.argv[1:])
