"""Generation over a mesh of eight devices: the tokens and logits of one device."""

import dataclasses
import functools
import re

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import deepseek_jax
from deepseek_jax import Model
from deepseek_jax.config import MeshConfig
from deepseek_jax.model.platform import as_on_gpus
from deepseek_jax.parallel.prepared import generation_mesh, parameter_shardings
from deepseek_jax.serving import over_mesh
from deepseek_jax.serving.build import cold
from deepseek_jax.serving.options import Options
from deepseek_jax.serving.plans import decode_plan
from experiments.mesh_flag import named_by_the_flag, parse_mesh
from tests.inference.checkpoint import save_checkpoint, save_run
from tests.oracle.tiny import weights
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
def model(name=None):
    return Model(CFG, *weights(CFG, seed=4), mesh=MESHES.get(name))


def over(name, prompts=PROMPTS, **options):
    return model(name).generate(prompts, NEW, **options)


def alone(prompts=PROMPTS, **options):
    return over(None, prompts, **options)


@pytest.mark.parametrize("name", MESHES)
def test_greedy_tokens_are_those_of_one_device(name):
    want = alone()
    assert over(name) == want
    assert len({tuple(row) for row in want}) == len(PROMPTS)  # the rows do not simply agree


def test_a_row_that_ends_does_not_stop_the_others():
    rows = alone()
    stop = next(t for t in rows[0] if any(t not in row for row in rows[1:]))
    assert over("tensor", stop_ids=[stop]) == alone(stop_ids=[stop])
    first = [row[0] for row in rows]
    assert over("tensor", stop_ids=first) == [[]] * len(PROMPTS)


DRAWN = {"temperature": 1.0, "top_k": 50, "repetition_penalty": 1.1, "seed": 5, "logprobs": True}


def test_draws_are_those_of_one_device():
    """A row's stream is its own, wherever it is decoded; log-probabilities and reasons come along."""
    for x, y in zip(over("two hops", **DRAWN), alone(**DRAWN), strict=True):
        assert (x.tokens, x.finish_reason) == (y.tokens, y.finish_reason)
        np.testing.assert_allclose(x.logprobs, y.logprobs, atol=1e-4)
        np.testing.assert_allclose(x.sampled_logprobs, y.sampled_logprobs, atol=1e-4)


def test_nothing_but_counts_is_gathered_while_decoding():
    device = cold(model("tensor"), Options(rows=2))
    plan = device._placed(decode_plan(16, device.words))
    text = device._run.decode.lower(device.weights, device._state, plan, None, None).as_text()
    gathered = re.findall(r'"stablehlo.all_gather".*?-> tensor<([\dxa-z]+)>', text, re.DOTALL)
    assert gathered == ["4x4xi32"]  # how many rows each device of a node has for each
    assert "all_to_all" in text


def test_a_program_for_each_step_draws_the_same():
    """As on GPUs, where the host launches the steps without waiting: no loop, and no branch over the settings."""
    want = over("two hops", **DRAWN)
    over_mesh.programs.cache_clear()
    with as_on_gpus():
        got = Model(CFG, *weights(CFG, seed=4), mesh=MESHES["two hops"]).generate(PROMPTS, NEW, **DRAWN)
    over_mesh.programs.cache_clear()
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
def test_a_checkpoint_is_loaded_onto_its_mesh(kind, folders):
    """Each device reads its part; `generate` goes over the mesh."""
    mesh = MESHES["tensor"]
    loaded = deepseek_jax.load(folders[kind], mesh=mesh)
    assert jax.tree.map(lambda x: x.sharding, loaded.params) == parameter_shardings(loaded.config, mesh)
    w = loaded.params["moe_layers"]["ffn"]["experts"]["w_up_edf"]
    assert {shard.data.shape[1] for shard in w.addressable_shards} == {1}
    one = deepseek_jax.load(folders[kind])
    assert loaded.generate([[1, 2]], 3) == one.generate([[1, 2]], 3)
    assert loaded._offline._idle[1].ranks == 8
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
        ("nodes=2", r"^unknown --mesh=nodes; did you mean --mesh=node\?"),
        ("node=two", r"^--mesh=node=two should be an integer"),
        ("local=0", r"^--mesh=local=0 must be positive"),
        ("experts=flatt", r"^--mesh=experts='flatt' is not one of .* did you mean 'flat'"),
    ],
)
def test_mistakes_in_the_flag(text, message):
    with pytest.raises(ValueError, match=message):
        parse_mesh(text)


def test_what_does_not_fit_the_devices_is_said_of_the_flag():
    words = r"needs 64 devices and 8 are at hand; change --mesh$"
    with pytest.raises(ValueError, match=words), named_by_the_flag():
        generation_mesh(tiny().model, MeshConfig(data=1, node=8, local=8))


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
    params, bias = weights(CFG, seed=4)
    with pytest.raises(ValueError, match=message):
        Model(CFG, params, bias, mesh=mesh).generate(PROMPTS, NEW)
