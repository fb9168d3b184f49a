"""The step over a pipeline of the eight devices: the run of the same micro-batches without one."""

import dataclasses

import jax
import numpy as np
import pytest

from deepseek_jax.config import Config
from deepseek_jax.parallel.pipeline.pipeline import pipeline_over
from tests.parallel import harness
from tests.parallel.comparison import BOUND, assert_same_step, assert_tracks
from tests.tiny_run import HYPER

STEPS = 4
NUDGE = BOUND / 8


def config(
    pipe, data=1, node=1, tensor=1, micro=4, rows=1, model=None, balance="loss_free", precision="bf16", **mesh
):
    """micro: micro-batches of a device, of `rows` sequences each."""
    model = harness.SHALLOW | {"num_hidden_layers": 3, "first_k_dense_replace": 1} | (model or {})
    train = {"batch_size": data * node * micro * rows, "grad_accumulation": micro}
    train |= {name: mesh.pop(name) for name in ("remat", "frozen") if name in mesh}
    return harness.config(
        (data, node, 1, tensor),
        model,
        train=train,
        mesh={"pipe": pipe} | mesh,
        balance={"mode": balance},
        precision=precision,
    )


def without(cfg: Config) -> Config:
    """The same run on the mesh without the pipeline."""
    plain = {"pipe": 1, "overlap": False, "zero": False, "stage_layers": (), "receive": 0.0}
    mesh = dataclasses.replace(cfg.mesh, **plain)
    return dataclasses.replace(cfg, mesh=mesh, train=dataclasses.replace(cfg.train, remat="none"))


MTP = {"num_nextn_predict_layers": 1}
DUALPIPE = config(2, 2, 2, model=MTP, zero=True, overlap=True)
PACKED = {"packed": True, "padded": True, "ramp": (4, 2, 3, 4)}
RUNS = {
    "DualPipe, overlapped, divided, packed, padded, batches of several sizes": (DUALPIPE, PACKED),
}


@pytest.mark.parametrize("name", RUNS)
def test_the_run_is_that_without_a_pipeline(name):
    """Only the order of sums differs: of copies of layers, of micro-batches, of rows. Clipped by the norm over all ranks."""
    cfg, how = RUNS[name]
    starts = (cfg, 0.0), (without(cfg), 0.0), (without(cfg), NUDGE)
    runs = [harness.run(c, STEPS, nudge, **how) for c, nudge in starts]
    assert_same_step(*runs[:2])
    assert runs[1].history[0].grad_norm > cfg.optimizer.clip_norm
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


# --- what it refuses ----------------------------------------------------------------------------------------------


def chosen(micro=1, batch=64, pipe=4, **mesh):
    cfg = config(pipe, data=2, **mesh)
    train = dataclasses.replace(cfg.train, batch_size=batch, grad_accumulation=micro)
    return pipeline_over(
        dataclasses.replace(cfg, train=train), {"pipe": pipe, "data": 2, "node": 1, "local": 1}
    )


def test_what_is_chosen():
    """A sequence per micro-batch, but at most four micro-batches per rank, of a number that divides the device's rows."""
    assert chosen(pipe=1) is None
    found = [chosen(batch=batch) for batch in (16, 32, 64, 44, 2)]
    assert [p.micro for p in found] == [8, 16, 16, 11, 1]
    assert [p.name for p in found] == ["dualpipe", "dualpipe", "dualpipe", "one_f_one_b", "one_f_one_b"]
    assert (chosen(16).micro, chosen(16).name) == (16, "dualpipe")
    assert [chosen(6, 24).name, chosen(9, 36).name, chosen(12, 48, pipe=3).name] == ["one_f_one_b"] * 3
    v = chosen(8, schedule="dualpipe_v")
    assert (len(v.held.stages), v.held.chunks, v.held.num_ranks) == (8, 2, 4)
    assert chosen(8, weight_queue=3).weight_queue == 3


@pytest.mark.parametrize(
    ("pipe", "micro", "mesh", "message"),
    [
        (
            3,
            12,
            {"schedule": "dualpipe"},
            r"3.*mesh\.pipe=3 with 12 micro-batches on each device: change train\.grad_acc",
        ),
        (
            4,
            6,
            {"schedule": "dualpipe"},
            r"6.*mesh\.pipe=4 with 6 micro-batches .*train\.batch_size, mesh\.schedule or mesh",
        ),
        (4, 9, {"schedule": "dualpipe"}, r"9.*mesh\.pipe=4 with 9 micro-batches"),
        (4, 4, {"schedule": "dualpipe_v"}, r"4.*mesh\.pipe=4 with 4 micro-batches"),
        (
            4,
            8,
            {"stage_layers": (1, 1, 1)},
            r"mesh\.stage_layers=\(1, 1, 1\): 3 stages of 3 layers in all.*3 layers on 4",
        ),
        (
            4,
            8,
            {"stage_layers": (1, 1, 1, 1)},
            r"4 layers in all, and the model has 3 layers on 4 stages; give 4 numbers",
        ),
    ],
)
def test_what_does_not_fit(pipe, micro, mesh, message):
    with pytest.raises(ValueError, match=message) as error:
        chosen(micro, 2 * micro, pipe, **mesh)
    assert "\n" not in str(error.value)
