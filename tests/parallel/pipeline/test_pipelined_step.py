"""The step over a pipeline of the eight devices: the run of the same micro-batches without one."""

import dataclasses

import chex
import jax
import numpy as np
import pytest

from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.training.checkpoint import Checkpointer
from deepseek_jax.training.ema import EMA
from deepseek_jax.training.passes import make_eval_step
from deepseek_jax.training.state import state_shardings
from deepseek_jax.training.step import abstract_state, make_train_step
from tests.parallel import harness
from tests.parallel.comparison import BOUND, assert_same_step, assert_tracks, difference
from tests.parallel.pipeline.runs import MTP, config, without
from tests.tiny_run import HYPER

NUDGE = BOUND / 8

DUALPIPE = config(2, 2, 2, model=MTP, stage_layers=(2, 1), zero=True, overlap=True)
RAMP = (4, 2, 3, 4, 1, 4, 3, 4, 2, 4)  # micro-batches in each step
STEPS = len(RAMP)
PACKED = {"packed": True, "padded": True, "ramp": RAMP}


def test_the_run_is_that_without_a_pipeline():
    """Overlapped, divided, with packed and padded sequences and batches of several sizes, clipped by the norm over all
    ranks. Only the order of sums differs: of copies of layers, of micro-batches, of rows."""
    starts = (DUALPIPE, 0.0), (without(DUALPIPE), 0.0), (without(DUALPIPE), NUDGE)
    runs = [harness.run(cfg, STEPS, nudge, **PACKED) for cfg, nudge in starts]
    assert_same_step(*runs[:2])
    run, one, near = (r.history for r in runs)
    assert one[0].grad_norm > DUALPIPE.optimizer.clip_norm
    assert_tracks(*runs, 2 * HYPER.gamma, list(one[0].objective))
    # Of the first order in what the weights are apart, which is not bounded by what one step rounds.
    apart = [max(map(difference, norms(other), norms(one))) for other in (run, near)]
    assert apart[0] < apart[1] < 1e-4


def norms(history):
    return [metrics.grad_norm for metrics in history]


def test_a_model_in_bf16_has_gradients_in_float32():
    """Traced only: what `check.py` compares of it takes longer. Weights of one input are joined, and do not add to sums."""
    cfg = config(2, 2, 2, model=MTP | {"dtype": "bfloat16"}, zero=True, overlap=True)
    mesh = make_mesh(cfg.mesh)
    tokens = jax.ShapeDtypeStruct((cfg.train.batch_size, cfg.data.seq_len + 1), np.int32)
    before = abstract_state(cfg, mesh)
    state, metrics = jax.eval_shape(make_train_step(cfg, mesh), before, {"tokens": tokens}, harness.hyper(4))
    chex.assert_trees_all_equal_shapes_and_dtypes(state.params, before.params)
    assert metrics.grad_norm.dtype == np.float32


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


def save(checkpointer, step, state):
    checkpointer.save(step, state, EMA(state.params, 0.9).state(), {"config": {}, "data": {}, "tokens": 0})
    checkpointer.wait()


def go_on(cfg, state, steps, ramp):
    """(state, metrics of each of the steps)"""
    step, history = harness.program(cfg, True, True, True).step, []
    for i in steps:
        batch = harness.batch_on(cfg, i, packed=True, padded=True)
        state, metrics = step(state, batch, harness.hyper(ramp[i]))
        history.append(jax.device_get(metrics))
    return state, history


@pytest.mark.parametrize("source", [DUALPIPE, without(DUALPIPE)], ids=["a pipeline's", "one without"])
def test_a_run_goes_on_on_another_mesh(source, tmp_path):
    """On its own the rest of the run is the same bit by bit; on the other it tracks."""
    checkpointer, whole = Checkpointer(tmp_path), harness.run(source, STEPS, **PACKED)
    save(checkpointer, 1, jax.device_put(whole.first, state_shardings(source, harness.mesh_of(source))))
    for target in (DUALPIPE, without(DUALPIPE)):
        restored = checkpointer.restore(harness.put(target)).state
        state, history = go_on(target, restored, range(1, STEPS), RAMP)
        for i, (metrics, want) in enumerate(zip(history, whole.history[1:], strict=True)):
            for name, value in want.objective.items():
                assert difference(metrics.objective[name], value) < BOUND, (i, name)
            np.testing.assert_array_equal(metrics.counts_le, want.counts_le)
        np.testing.assert_array_equal(state.balance_bias, whole.last.balance_bias)
        if target == source:
            chex.assert_trees_all_equal(state, whole.last)
    checkpointer.close()


def test_a_run_goes_from_four_ranks_to_one_and_back(tmp_path):
    """With steps before, between and after, it tracks the run that never was over a pipeline."""
    one = without(DUALPIPE)
    four = config(4, node=2, micro=8, model=MTP, stage_layers=(1, 1, 1, 0), schedule="one_f_one_b")
    checkpointer, state, history = Checkpointer(tmp_path), harness.put(four), []
    for cfg, micro in ((four, 8), (one, 4), (four, 8)):
        if history:
            save(checkpointer, len(history), state)
            state = checkpointer.restore(harness.put(cfg)).state
        steps = range(len(history), len(history) + 2)
        state, more = go_on(cfg, state, steps, [micro] * steps.stop)
        history += more
    checkpointer.close()
    whole = {"packed": True, "padded": True, "ramp": (4,) * len(history)}
    want, near = (harness.run(one, len(history), nudge, **whole) for nudge in (0.0, NUDGE))
    run = harness.Run(want.first, state, history)
    assert_tracks(run, want, near, 2 * HYPER.gamma, list(history[0].objective))
