"""The step over a pipeline of the eight devices: the run of the same micro-batches without one."""

import dataclasses

import chex
import jax
import numpy as np
import pytest

from deepseek_jax.training.checkpoint import Checkpointer
from deepseek_jax.training.ema import EMA
from deepseek_jax.training.state import state_shardings
from deepseek_jax.training.step import make_eval_step
from tests.parallel import harness
from tests.parallel.comparison import BOUND, assert_same_step, assert_tracks, difference
from tests.parallel.pipeline.runs import MTP, config, without
from tests.tiny_run import HYPER

STEPS = 4
NUDGE = BOUND / 8


DUALPIPE = config(2, 2, 2, model=MTP, stage_layers=(2, 1), zero=True, overlap=True)
PACKED = {"packed": True, "padded": True, "ramp": (4, 2, 3, 4)}


def test_the_run_is_that_without_a_pipeline():
    """Overlapped, divided, with packed and padded sequences and batches of several sizes, clipped by the norm over all
    ranks. Only the order of sums differs: of copies of layers, of micro-batches, of rows."""
    starts = (DUALPIPE, 0.0), (without(DUALPIPE), 0.0), (without(DUALPIPE), NUDGE)
    runs = [harness.run(cfg, STEPS, nudge, **PACKED) for cfg, nudge in starts]
    assert_same_step(*runs[:2])
    assert runs[1].history[0].grad_norm > DUALPIPE.optimizer.clip_norm
    assert_tracks(*runs, 2 * HYPER.gamma, list(runs[1].history[0].scalars))


# --- bad steps ----------------------------------------------------------------------------------------------------


def on_every_device(tree):
    """Bytes of each array's part on each device: NaN equals itself."""
    return [[np.asarray(s.data).tobytes() for s in x.addressable_shards] for x in jax.tree.leaves(tree)]


def test_a_bad_step_changes_nothing_on_any_rank():
    """One of a layer that a single stage has; the next step, on other weights, is taken."""
    good = harness.put(DUALPIPE)
    bad = harness.put(DUALPIPE)
    w = bad.params["moe_layers"]["attn_norm_d"]
    bad.params["moe_layers"]["attn_norm_d"] = jax.device_put(w.at[-1, 3].set(np.nan), w.sharding)
    want = on_every_device((bad.params, bad.opt_state, bad.balance_bias))
    batch, step = harness.batch_on(DUALPIPE, 0, True, True), harness.program(DUALPIPE, True, True, True).step
    state, metrics = step(bad, batch, harness.hyper(4))
    assert on_every_device((state.params, state.opt_state, state.balance_bias)) == want
    assert not metrics.finite and not np.isfinite(metrics.grad_norm)
    for x in (state.bad_steps, state.skipped, metrics.bad_steps):
        assert [int(shard.data) for shard in x.addressable_shards] == [1] * 8
    state, metrics = step(state.replace(params=good.params), batch, harness.hyper(4))
    assert metrics.finite and (int(state.step), int(state.bad_steps), int(state.skipped)) == (2, 0, 1)


# --- evaluation ---------------------------------------------------------------------------------------------------


def test_evaluation_is_that_without_a_pipeline():
    """Of three windows on each device: numbers as they come, odd too."""
    windows, found = 12, []
    for cfg in (DUALPIPE, without(DUALPIPE)):
        state = harness.put(cfg)
        train = dataclasses.replace(cfg.train, batch_size=windows, grad_accumulation=1)
        batch = harness.batch_on(dataclasses.replace(cfg, train=train), 3, packed=True, padded=True)
        step = make_eval_step(cfg, harness.mesh_of(cfg))
        found.append(step(state.params, state.balance_bias, batch))
    (nats, counts), (want, want_counts) = found
    np.testing.assert_array_equal(counts, want_counts)
    assert nats.shape == (windows,) and difference(nats, want) < BOUND


# --- checkpoints --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", [DUALPIPE, without(DUALPIPE)], ids=["a pipeline's", "one without"])
def test_a_run_goes_on_on_another_mesh(source, tmp_path):
    """On its own the rest of the run is the same bit by bit; on the other it tracks."""
    checkpointer, whole = Checkpointer(tmp_path), harness.run(source, STEPS, **PACKED)
    first = jax.device_put(whole.first, state_shardings(source, harness.mesh_of(source)))
    checkpointer.save(1, first, EMA(first.params, 0.9).state(), {"config": {}, "data": {}, "tokens": 0})
    checkpointer.wait()
    for target in (DUALPIPE, without(DUALPIPE)):
        state, step = (
            checkpointer.restore(harness.put(target)).state,
            harness.program(target, True, True, True).step,
        )
        for i in range(1, STEPS):
            batch = harness.batch_on(target, i, packed=True, padded=True)
            state, metrics = step(state, batch, harness.hyper(PACKED["ramp"][i]))
            for name, value in whole.history[i].objective.items():
                assert difference(metrics.objective[name], value) < BOUND, (i, name)
            np.testing.assert_array_equal(metrics.counts_le, whole.history[i].counts_le)
        np.testing.assert_array_equal(state.balance_bias, whole.last.balance_bias)
        if target == source:
            chex.assert_trees_all_equal(state, whole.last)
    checkpointer.close()
