"""The training step: what may not change its result, what a bad step leaves alone, and the losses by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.config import MeshConfig
from deepseek_jax.model.layers import head_weight
from deepseek_jax.model.layout import single_device
from deepseek_jax.model.transformer import forward
from deepseek_jax.parallel.mesh import batch_sharding, make_mesh, replicated
from deepseek_jax.training.labels import inputs, totals
from deepseek_jax.training.passes import make_eval_step
from deepseek_jax.training.step import make_train_step
from tests.oracle.tiny import weights
from tests.tiny_run import HYPER, fresh_state, losses, tiny, tokens

# Float32 sums in another order: 6e-8 per operation, over the 128 tokens and some 40 operations that lie in a
# gradient's path, growing like a random walk (x 70), and a factor of 2 for cancellation.
REORDERED = 1e-5


def batch_of(cfg, size=None):
    return {"tokens": tokens(cfg, size=size)}


@functools.cache
def program(devices=1, **sections):
    """(cfg, step, mesh) of a config; one compilation for all tests that use it."""
    cfg = tiny(**{name: dict(values) for name, values in sections.items()})
    mesh = make_mesh(cfg.mesh, jax.devices()[:devices])
    step = make_train_step(cfg, mesh)

    def run(state, batch):
        return step(
            jax.device_put(state, replicated(mesh)), jax.device_put(batch, batch_sharding(mesh)), HYPER
        )

    return cfg, run, mesh


def base(devices=1, accumulation=1):
    return program(
        devices,
        model=(
            ("initializer_range", 0.2),
        ),  # scores large enough that attention's gradients are not all rounding
        optimizer=(("moment_dtype", "float32"),),  # the first moment shows the gradient itself
        train=(("grad_accumulation", accumulation),),
    )


def one_step(devices=1, accumulation=1):
    cfg, step, _ = base(devices, accumulation)
    return step(fresh_state(cfg), batch_of(cfg))


def assert_equal_up_to_order(got, want):
    (state, metrics), (state_1, metrics_1) = got, want
    for name in ("loss", "mtp_loss", "balance_loss", "grad_norm"):
        np.testing.assert_allclose(
            metrics.scalars[name], metrics_1.scalars[name], rtol=REORDERED, err_msg=name
        )
    np.testing.assert_array_equal(metrics.counts_le, metrics_1.counts_le)
    np.testing.assert_array_equal(state.balance_bias, state_1.balance_bias)
    moments, moments_1 = jax.device_get((state.opt_state.mu, state_1.opt_state.mu))
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(moments), jax.tree.leaves(moments_1), strict=True
    ):
        assert np.linalg.norm(x - y) < REORDERED * np.linalg.norm(y), jax.tree_util.keystr(path)


def test_accumulation_over_two_micro_batches_is_one_batch():
    assert_equal_up_to_order(one_step(accumulation=2), one_step())


def test_two_devices_are_one():
    assert_equal_up_to_order(one_step(devices=2), one_step())


def test_batch_that_does_not_divide():
    cfg, _, mesh = base(accumulation=2)
    with pytest.raises(ValueError, match=r"batch of 3 .*1 device shards x grad_accumulation=2; change train"):
        make_train_step(cfg, mesh)(fresh_state(cfg), batch_of(cfg, size=3), HYPER)


# --- bad steps --------------------------------------------------------------------------------------------


def raw(tree):
    """Bytes, so that NaN equals itself and -0.0 differs from 0.0."""
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_bad_step_changes_nothing_and_is_counted(value):
    cfg, step, _ = base()
    state, _ = one_step()
    good = state.params["final_norm"]["scale_d"]
    params = state.params | {"final_norm": {"scale_d": good.at[3].set(value)}}
    state = state.replace(params=params)
    before = raw((state.params, state.opt_state, state.balance_bias))
    for n in (1, 2):
        state, metrics = step(state, batch_of(cfg))
        assert raw((state.params, state.opt_state, state.balance_bias)) == before
        assert not metrics.finite and not np.isfinite(metrics.grad_norm)
        assert (int(state.step), int(state.bad_steps), int(state.skipped)) == (1 + n, n, n)
        assert (int(metrics.bad_steps), int(metrics.skipped)) == (n, n)
    params = state.params | {"final_norm": {"scale_d": jnp.ones_like(state.params["final_norm"]["scale_d"])}}
    state, metrics = step(state.replace(params=params), batch_of(cfg))
    assert metrics.finite and (int(state.step), int(state.bad_steps), int(state.skipped)) == (4, 0, 2)
    assert int(state.opt_state.num_updates) == 2


# --- balancing --------------------------------------------------------------------------------------------


def test_bias_moves_against_the_load_by_exactly_gamma():
    cfg, step, _ = base()
    state = fresh_state(cfg)
    before = np.random.default_rng(1).normal(0, 0.1, state.balance_bias.shape).astype(np.float32)
    state, metrics = step(state.replace(balance_bias=jnp.asarray(before)), batch_of(cfg))
    counts = np.asarray(metrics.counts_le)
    # The MTP module has no token to read ahead at a window's last position (equation 22).
    assert counts.sum(1).tolist() == [4 * n * cfg.model.num_experts_per_tok for n in (32, 31)]
    for layer, row in enumerate(counts):
        for expert, count in enumerate(row):
            over = np.sign(count * row.size - row.sum())
            want = np.float32(before[layer, expert] - HYPER.gamma * np.float32(over))
            assert np.asarray(state.balance_bias)[layer, expert] == want
            assert over == 0 or (want < before[layer, expert]) == (count > row.mean())


@pytest.mark.parametrize("mode", ["classic", "none"])
def test_other_modes_leave_the_bias_alone(mode):
    shallow = (("num_nextn_predict_layers", 0),)
    cfg, step, _ = program(model=shallow, balance=(("mode", mode),))
    state = fresh_state(cfg)
    params, batch = jax.device_get(state.params), batch_of(cfg)
    state, metrics = step(state, batch)
    assert not np.asarray(state.balance_bias).any()
    if mode == "none":
        assert float(metrics.scalars["balance_loss"]) == 0.0
    else:
        run = lambda p: forward(p, cfg.model, inputs(batch, cfg.data.seq_len), None, single_device())  # noqa: E731
        _, aux = jax.jit(run)(params)
        want = cfg.balance.classic_alpha * aux.classic_loss
        np.testing.assert_allclose(metrics.scalars["balance_loss"], want, rtol=REORDERED)
        assert 1.0 <= float(aux.classic_loss) < cfg.model.n_routed_experts


# --- losses by hand ---------------------------------------------------------------------------------------


def deep():
    """Two MTP modules; parameters, a batch of three packed windows and a bias."""
    cfg = tiny(model={"num_nextn_predict_layers": 2}, data={"seq_len": 11})
    params, _ = weights(cfg.model, 3)
    batch = batch_of(cfg, size=3)
    lengths = np.random.default_rng(5).integers(0, 3, batch["tokens"].shape) == 0
    batch["segments"] = np.cumsum(lengths, axis=1).astype(np.int32)
    starts = np.where(lengths, np.arange(lengths.shape[1]), 0)
    batch["positions"] = (np.arange(lengths.shape[1]) - np.maximum.accumulate(starts, 1)).astype(np.int32)
    return cfg, params, batch, np.zeros(cfg.model.balance_bias_shape, np.float32)


def by_hand(hidden, head, batch, depth, sequences):
    """-1/T sum over i of log P_i^k, in a loop; k = `depth`, T the window's inputs (equations 24 and 25), or of packed
    documents the labels that count."""
    windows, segments, total, counted = batch["tokens"], batch.get("segments"), 0.0, 0
    t = windows.shape[1] - 1
    for row in range(len(windows)):
        for i in range(t):
            target = i + depth + 1
            if target > t or (segments is not None and segments[row, i] != segments[row, target]):
                continue
            counted += 1
            logits = hidden[row, i].astype(np.float64) @ head
            total += np.log(np.exp(logits - logits.max()).sum()) + logits.max() - logits[windows[row, target]]
    return total / (t * sequences if segments is None else counted)


@pytest.mark.parametrize("packed", [False, True])
def test_losses_are_the_papers_sums(packed):
    cfg, params, batch, bias = deep()
    if not packed:
        batch = {"tokens": batch["tokens"]}
    sequences = 5  # of which these three are this device's

    @jax.jit
    def run(params):
        hidden, aux = forward(params, cfg.model, inputs(batch, cfg.data.seq_len), bias, single_device())
        return losses(params, cfg, batch, bias, totals(cfg, batch, sequences)), hidden, aux

    got, hidden, aux = jax.device_get(run(params))
    head = np.asarray(head_weight(params), np.float64)
    np.testing.assert_allclose(got["loss"], by_hand(hidden, head, batch, 0, sequences), rtol=REORDERED)
    mtp = [by_hand(aux.mtp[k], head, batch, k + 1, sequences) for k in range(2)]
    np.testing.assert_allclose(got["mtp_loss"], np.mean(mtp), rtol=REORDERED)
    np.testing.assert_allclose(
        got["balance_loss"], cfg.balance.seq_alpha * aux.seq_loss * 3 / 5, rtol=REORDERED
    )


def test_segments_mask_some_labels_and_not_all():
    """The comparison above would also pass on a batch in which no label is masked."""
    _, _, batch, _ = deep()
    crossing = batch["segments"][:, :-1] != batch["segments"][:, 1:]
    assert crossing.any() and not crossing.all()


@pytest.mark.parametrize("chunk", [7, 10_000])
def test_loss_does_not_depend_on_the_chunk(chunk):
    def run(chunk):
        cfg = tiny(
            model={"num_hidden_layers": 1, "first_k_dense_replace": 1, "num_nextn_predict_layers": 0},
            train={"loss_chunk": chunk},
        )
        params, _ = weights(cfg.model, 3)
        batch = batch_of(cfg)
        objective = jax.value_and_grad(lambda p: losses(p, cfg, batch, None, totals(cfg, batch, 4))["loss"])
        return jax.jit(objective)(params)

    (loss, grads), (loss_1, grads_1) = run(chunk), run(48)  # 128 tokens: 48 leaves a remainder
    np.testing.assert_allclose(loss, loss_1, rtol=REORDERED)
    for x, y in zip(jax.tree.leaves(grads), jax.tree.leaves(grads_1), strict=True):
        assert jnp.linalg.norm(x - y) <= REORDERED * jnp.linalg.norm(y)


def test_evaluation_sums_each_window():
    """Summed over windows and divided by the tokens, it is the training step's loss of the same batch."""
    cfg, _, mesh = base()
    state = fresh_state(cfg)
    evaluate = make_eval_step(cfg, mesh)
    nats, labels = evaluate(state.params, state.balance_bias, batch_of(cfg))
    assert nats.shape == labels.shape == (4,) and nats.dtype == labels.dtype == jnp.float32
    assert labels.tolist() == [cfg.data.seq_len] * 4
    np.testing.assert_allclose(
        np.mean(nats) / cfg.data.seq_len, one_step()[1].scalars["loss"], rtol=REORDERED
    )


def packed_in(documents):
    """A batch of the same tokens, windows of 33, in so many documents each."""
    cfg = tiny()
    segments = np.tile(np.arange(33, dtype=np.int32) * documents // 33, (4, 1))
    return cfg, batch_of(cfg) | {
        "segments": segments,
        "positions": np.tile(np.arange(33, dtype=np.int32), (4, 1)),
    }


@pytest.mark.parametrize("documents", [1, 16])
def test_means_do_not_depend_on_how_many_labels_are_masked(documents):
    """A model that knows nothing loses log(vocabulary) per label, of the main model and the MTP module, whether 15 of
    32 labels lie in another document or none."""
    cfg, batch = packed_in(documents)
    params = fresh_state(cfg).params
    params = params | {"head": jax.tree.map(jnp.zeros_like, params["head"])}
    bias = np.zeros(cfg.model.balance_bias_shape, np.float32)
    got = jax.jit(lambda p: losses(p, cfg, batch, bias, totals(cfg, batch, 4)))(params)
    np.testing.assert_allclose([got["loss"], got["mtp_loss"]], np.log(cfg.model.vocab_size), rtol=REORDERED)
    labels = totals(cfg, batch, 4).labels
    assert [int(n) for n in labels] == ([4 * 32, 4 * 31] if documents == 1 else [4 * 17, 4 * 1])
    nats, counted = make_eval_step(cfg, make_mesh(cfg.mesh, jax.devices()[:1]))(params, bias, batch)
    np.testing.assert_allclose(nats.sum() / counted.sum(), np.log(cfg.model.vocab_size), rtol=REORDERED)


# --- the ramp of the batch size -----------------------------------------------------------------------------


def ramped(packed, devices=2):
    """(a step of the first of two micro-batches, the step of a batch that has no more, how often the first compiled)"""
    alike = {"model": {"initializer_range": 0.2}, "optimizer": {"moment_dtype": "float32"}}  # as `base`
    cfg, mesh = (
        tiny(**alike, train={"grad_accumulation": 2}),
        make_mesh(MeshConfig(), jax.devices()[:devices]),
    )
    batch = {"tokens": tokens(cfg)} if not packed else packed_in(5)[1]
    shard = functools.partial(jax.device_put, device=batch_sharding(mesh))
    step = make_train_step(cfg, mesh)

    def state():
        return jax.device_put(fresh_state(cfg), replicated(mesh))

    # Of each device's two rows, the second is not there: nonsense in its place must not matter.
    there = np.arange(4) % 2 == 0
    hyper = HYPER._replace(micro_batches=np.int32(1))
    few = {name: np.where(there[:, None], x, 5) for name, x in batch.items()}
    got = step(state(), shard(few), hyper)
    step(state(), shard(batch), HYPER._replace(micro_batches=np.int32(2)))
    half = tiny(**alike, train={"batch_size": 2})
    want = make_train_step(half, mesh)(state(), shard({name: x[there] for name, x in batch.items()}), HYPER)
    return got, want, step._cache_size()


@pytest.mark.parametrize("packed", [False, True])
def test_a_smaller_batch_runs_in_the_same_program(packed):
    got, want, programs = ramped(packed)
    assert programs == 1
    assert_equal_up_to_order(got, want)


def lowered_lines(layers):
    cfg = tiny(model={"num_hidden_layers": layers})
    state = jax.eval_shape(lambda: fresh_state(cfg))
    step = make_train_step(cfg, make_mesh(cfg.mesh, jax.devices()[:1]))
    return len(step.lower(state, batch_of(cfg), HYPER).as_text().splitlines())


def test_program_of_61_layers_is_about_as_large_as_of_4():
    """Layers are scanned. The compiler's time follows the program's size."""
    few, many = lowered_lines(4), lowered_lines(61)
    assert max(few, many) < 1.5 * min(few, many)
