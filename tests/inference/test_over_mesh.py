"""Generation over a mesh of eight devices: the tokens and logits of one device."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import deepseek_jax
from deepseek_jax.config import MeshConfig
from deepseek_jax.inference import driver, sampling
from deepseek_jax.inference import generate as one_device
from deepseek_jax.inference import model as model_file
from deepseek_jax.inference.batch import Request, make_batch, pad_prompts
from deepseek_jax.inference.driver import complete
from deepseek_jax.inference.generate import generate, plain
from deepseek_jax.inference.over_mesh import (
    generate_over_mesh,
    over_mesh,
    programs,
)
from deepseek_jax.inference.sampling import Sampling
from deepseek_jax.model.cache import view_after_padding
from deepseek_jax.model.decoding import ONE_DEVICE, decode, prepare
from deepseek_jax.model.layers import logits
from deepseek_jax.parallel.layout import few_tokens
from deepseek_jax.parallel.mesh import TOKEN_AXES
from deepseek_jax.parallel.prepared import generation_mesh, parameter_shardings
from experiments.mesh_flag import parse_mesh
from tests.inference.checkpoint import save_checkpoint, save_run
from tests.oracle.tiny import weights
from tests.parallel.comparison import BOUND, difference
from tests.tiny_run import tiny

CFG = dataclasses.replace(tiny().model, num_nextn_predict_layers=0)  # a dense and a MoE layer, 8 experts
RNG = np.random.default_rng(11)
# More than devices, not a multiple of them: rows fill the batch. The first ends where a bucket does.
PROMPTS = [RNG.integers(0, CFG.vocab_size, n).tolist() for n in (32, 1, 12, 5, 20, 3, 8, 2, 17, 9)]
NEW = 6
MESHES = {
    "two hops": MeshConfig(data=1, node=2, local=4),
    "tensor": MeshConfig(data=1, node=2, local=2, tensor=2),
}


@functools.cache
def model():
    return weights(CFG, seed=4)


def over(name, prompts=PROMPTS, **options):
    params, bias = model()
    return generate_over_mesh(params, CFG, prompts, NEW, MESHES[name], balance_bias=bias, **options)


def alone(prompts=PROMPTS, **options):
    params, bias = model()
    return generate(params, CFG, prompts, NEW, balance_bias=bias, **options)


@pytest.mark.parametrize("name", MESHES)
def test_greedy_tokens_are_those_of_one_device(name):
    want = alone()
    assert over(name) == want
    assert len({tuple(row) for row in want}) == len(PROMPTS)  # the rows do not simply agree


def prefilled(name, programs=programs):
    """Latents, and log-probabilities of the chosen tokens, over a mesh; of the prompts on one device."""
    params, bias = model()
    request, fill = Request(PROMPTS, NEW), [[0]] * (-len(PROMPTS) % 8)
    padded, padded_1 = (pad_prompts([*PROMPTS, *more], CFG.vocab_size) for more in (fill, []))
    put, run = jax.device_put(params, parameter_shardings(CFG, MESHES[name])), programs(CFG, MESHES[name])
    got = run.prefill(put, padded, make_batch(request, CFG, padded), bias)
    want = one_device._prefill(params, CFG, padded_1, make_batch(request, CFG, padded_1), bias)
    return got, want


@pytest.mark.parametrize("name", [*MESHES, "tensor, in pieces"])
def test_logits_of_the_prefill_are_those_of_one_device(name, monkeypatch):
    """Float32, the same operations summed in another order: see `test_experts_mesh` for the bound. In pieces, over a mesh."""
    got, want = prefilled(name.split(",")[0])
    if name not in MESHES:
        monkeypatch.setattr(one_device, "PIECE", 32)
        got, _ = prefilled("tensor", programs.__wrapped__)
    n, pad_b = len(PROMPTS), pad_prompts(PROMPTS, CFG.vocab_size).pad_b
    real = np.arange(want.cache.c_bsc.shape[2])[None] >= pad_b[:, None]
    np.testing.assert_array_equal(got.token_b[:n], want.token_b)
    assert difference(got.out.logprob_bn[:n], want.out.logprob_bn) < BOUND
    for x, y in zip(got.cache, want.cache, strict=True):
        assert difference(np.asarray(x)[:, :n][:, real], np.asarray(y)[:, real]) < BOUND


def test_logits_of_a_decoding_step_are_those_of_one_device():
    """By the low-latency exchange, from a cache that the tensor parallel prefill made."""
    params, bias = model()
    got, want = prefilled("tensor")
    run, slots, at = programs(CFG, MESHES["tensor"]), 96, 64
    put = jax.device_put(params, parameter_shardings(CFG, MESHES["tensor"]))

    def step(ready, cache, token_b, layout):
        view = view_after_padding(cache, jnp.int32(at), 1, jnp.zeros_like(token_b))
        h_btd, _ = decode(ready, CFG, token_b[:, None], view, bias, layout)
        return logits(ready, h_btd[:, 0])

    ready = run.prepare(put)
    mesh = generation_mesh(CFG, MESHES["tensor"])
    spread = jax.shard_map(
        lambda *args: step(*args, few_tokens(CFG, MESHES["tensor"], mesh)),
        mesh=mesh,
        in_specs=(jax.tree.map(lambda x: x.sharding.spec, ready), P(TOKEN_AXES), P(TOKEN_AXES)),
        out_specs=P(TOKEN_AXES),
        check_vma=False,
    )
    tokens, n = jnp.arange(16, dtype=jnp.int32), len(PROMPTS)
    got = jax.jit(spread)(ready, run.grow(got, slots).cache, tokens)
    alone = jax.jit(lambda *args: step(*args, ONE_DEVICE))
    want = alone(prepare(params, CFG), one_device._grow(want, CFG, slots).cache, tokens[:n])
    assert difference(got[:n], want) < BOUND


def test_a_row_that_ends_does_not_stop_the_others():
    rows = alone()
    stop = next(t for t in rows[0] if any(t not in row for row in rows[1:]))
    assert over("tensor", stop_ids=[stop]) == alone(stop_ids=[stop])
    first = [row[0] for row in rows]
    assert over("tensor", stop_ids=first) == [[]] * len(PROMPTS)


def test_draws_are_those_of_one_device():
    """A row's stream is its own, wherever it is decoded; log-probabilities and reasons come along."""
    params, bias = model()
    request = Request(PROMPTS, NEW, Sampling(1.0, top_k=50, repetition_penalty=1.1), seed=5)
    want = complete(plain(params, CFG, bias), CFG, request)[0]
    got = complete(over_mesh(params, CFG, bias, mesh=MESHES["two hops"]), CFG, request)[0]
    for x, y in zip(got, want, strict=True):
        assert (x.tokens, x.finish_reason) == (y.tokens, y.finish_reason)
        np.testing.assert_allclose(x.logprobs, y.logprobs, atol=1e-4)
        np.testing.assert_allclose(x.sampled_logprobs, y.sampled_logprobs, atol=1e-4)


def test_nothing_but_counts_is_gathered_while_decoding():
    params, bias = model()
    run = programs(CFG, MESHES["tensor"])
    request, put = (
        Request([[0]] * 16, NEW),
        jax.device_put(params, parameter_shardings(CFG, MESHES["tensor"])),
    )
    prompts = pad_prompts(request.prompts, CFG.vocab_size)
    batch = make_batch(request, CFG, prompts)
    ready = jax.eval_shape(run.prepare, put)
    state = jax.eval_shape(run.prefill, put, prompts, batch, bias)
    state = jax.eval_shape(functools.partial(run.grow, slots=96), state)
    text = run.advance.lower(ready, batch, bias, state, 1).as_text()
    gathered = re.findall(r'"stablehlo.all_gather".*?-> tensor<([\dxa-z]+)>', text, re.DOTALL)
    assert gathered == ["4x4xi32"]  # how many rows each device of a node has for each
    assert "all_to_all" in text


def test_a_program_for_each_step_draws_the_same(monkeypatch):
    """As on GPUs, where the host launches the steps without waiting: no loop, and no branch over the settings."""
    params, bias = model()
    request = Request(PROMPTS, NEW, Sampling(1.0, top_k=50), seed=5)
    want = complete(over_mesh(params, CFG, bias, mesh=MESHES["two hops"]), CFG, request)[0]
    for file in (driver, sampling):
        monkeypatch.setattr(file, "on_cpu", lambda: False)
    programs.cache_clear()
    got = complete(over_mesh(params, CFG, bias, mesh=MESHES["two hops"]), CFG, request)[0]
    programs.cache_clear()
    assert [row.tokens for row in got] == [row.tokens for row in want]


def test_experts_are_spread_and_the_rest_is_whole():
    shardings = parameter_shardings(CFG, MESHES["tensor"])["moe_layers"]
    assert shardings["ffn"]["experts"]["w_up_edf"].spec == P(None, ("node", "local", "tensor"))
    assert shardings["attn"]["wo_hvd"].spec == shardings["ffn"]["shared"]["w_up_df"].spec == P()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    path = tmp_path_factory.mktemp("over_mesh")
    return {"hf": save_checkpoint(path / "hf"), "run": save_run(path / "run")}


@pytest.mark.parametrize("kind", ["hf", "run"])
def test_a_checkpoint_is_loaded_onto_its_mesh(kind, folders, monkeypatch):
    """Each device reads its part; `generate` goes over the mesh."""
    mesh, seen = MESHES["tensor"], []
    loaded = deepseek_jax.load(folders[kind], mesh=mesh)
    assert jax.tree.map(lambda x: x.sharding, loaded.params) == parameter_shardings(loaded.config, mesh)
    w = loaded.params["moe_layers"]["ffn"]["experts"]["w_up_edf"]
    assert {shard.data.shape[1] for shard in w.addressable_shards} == {1}
    monkeypatch.setattr(
        model_file, "over_mesh", lambda *args, mesh: seen.append(mesh) or over_mesh(*args, mesh=mesh)
    )
    one = deepseek_jax.load(folders[kind])
    assert loaded.generate([[1, 2]], 3) == one.generate([[1, 2]], 3) and seen == [mesh]
    with pytest.raises(ValueError, match=r"speculative decoding runs on one device"):
        loaded.generate([[1, 2]], 1, speculative=True)
    with pytest.raises(ValueError, match=r"give one of mesh and shardings"):
        deepseek_jax.load(folders[kind], mesh=mesh, shardings=parameter_shardings(loaded.config, mesh))


# --- the command's flag -----------------------------------------------------------------------------------------


def test_the_flag_names_axes_and_formats():
    assert parse_mesh("") is None
    assert parse_mesh("node=2,local=4") == MESHES["two hops"]
    assert parse_mesh("data=0,tensor=2,dispatch=fp8,receive=8") == MeshConfig(
        data=0, tensor=2, dispatch="fp8", receive=8
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("node", r"--mesh=node: 'node' should be KEY=VALUE, as node=2,local=4"),
        ("nodes=2", r"unknown config key mesh.nodes; did you mean mesh.node\?"),
        ("node=two", r"mesh.node=two should be an integer"),
        ("local=0", r"mesh.local=0 must be positive"),
    ],
)
def test_mistakes_in_the_flag(text, message):
    with pytest.raises(ValueError, match=message):
        parse_mesh(text)


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        (MeshConfig(data=1, pipe=2), r"mesh.pipe=2 is for training"),
        (MeshConfig(data=1, node=2, overlap=True), r"mesh.overlap=True is for training"),
        (MeshConfig(data=1, node=16), r"needs 16 devices and 8 are at hand"),
        (MeshConfig(data=1, local=3), r"8 of 'expert' do not divide over 3 devices of local=3"),
        (MeshConfig(data=1, tensor=4), r"2 of 'heads' do not divide over 4 devices of tensor=4"),
    ],
)
def test_meshes_that_do_not_fit(mesh, message):
    params, bias = model()
    with pytest.raises(ValueError, match=message):
        generate_over_mesh(params, CFG, PROMPTS, NEW, mesh, balance_bias=bias)
