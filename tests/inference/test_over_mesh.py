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
from deepseek_jax.inference import generate as one_device
from deepseek_jax.inference import model as model_file
from deepseek_jax.inference.generate import generate, pad_prompts, stop_array
from deepseek_jax.inference.over_mesh import (
    generate_over_mesh,
    generation_mesh,
    parameter_shardings,
    programs,
)
from deepseek_jax.inference.sampling import Sampling
from deepseek_jax.model.decoding import decode, prepare, prepare_cache
from deepseek_jax.model.experts import decode_experts
from deepseek_jax.model.layers import logits
from deepseek_jax.model.mla import LatentCache
from deepseek_jax.parallel.low_latency import low_latency_experts
from deepseek_jax.parallel.mesh import TOKEN_AXES
from experiments.generate import parse_mesh
from tests.inference.checkpoint import save_checkpoint, save_run
from tests.oracle.tiny import weights
from tests.parallel.test_experts_mesh import BOUND, difference
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


def prefilled(name):
    """Logits and cache of the prompts, and of what fills the batch, over a mesh; of the prompts on one device."""
    params, bias = model()
    fill = [[0]] * (-len(PROMPTS) % 8)
    padded, padded_1 = pad_prompts([*PROMPTS, *fill]), pad_prompts(PROMPTS)
    slots = one_device.slots_for(padded.tokens_bt.shape[1], NEW)
    put = jax.device_put(params, parameter_shardings(CFG, MESHES[name]))
    got = programs(CFG, MESHES[name]).prefill(put, padded, bias, slots)
    return got, one_device._prefill(params, CFG, padded_1, bias, slots)


@pytest.mark.parametrize("name", MESHES)
def test_logits_of_the_prefill_are_those_of_one_device(name):
    """Float32, the same operations summed in another order: see `test_experts_mesh` for the bound."""
    (logits_bv, cache), (want_bv, want) = prefilled(name)
    n = len(PROMPTS)
    assert difference(logits_bv[:n], want_bv) < BOUND
    for x, y in zip(cache, want, strict=True):
        assert difference(x[:, :n], y) < BOUND


def test_logits_of_a_decoding_step_are_those_of_one_device():
    """By the low-latency exchange, from a cache that the tensor parallel prefill made."""
    params, bias = model()
    (_, cache), (_, cache_1) = prefilled("tensor")
    devices, specs = generation_mesh(CFG, MESHES["tensor"]), parameter_shardings(CFG, MESHES["tensor"])

    def step(params, cache, token_b, experts):
        ready, slots = prepare(params, CFG), jnp.arange(cache.c_bsc.shape[2])
        at = jnp.full((len(token_b), 1), 32)
        mask = jnp.broadcast_to(slots <= 32, (len(token_b), 1, len(slots)))
        cache = prepare_cache(cache, CFG)
        h_btd, _ = decode(ready, CFG, token_b[:, None], cache, 32, at, mask, bias, experts)
        return logits(params, h_btd[:, 0])

    spread = jax.shard_map(
        lambda *args: step(*args, low_latency_experts()),
        mesh=devices,
        in_specs=(jax.tree.map(lambda s: s.spec, specs), P(None, TOKEN_AXES), P(TOKEN_AXES)),
        out_specs=P(TOKEN_AXES),
        check_vma=False,
    )
    tokens = jnp.arange(16, dtype=jnp.int32)
    got = jax.jit(spread)(params, cache, tokens)
    n = len(PROMPTS)
    want = jax.jit(lambda *args: step(*args, decode_experts))(params, cache_1, tokens[:n])
    assert difference(got[:n], want) < BOUND


def test_a_row_that_ends_does_not_stop_the_others():
    rows = alone()
    stop = next(t for t in rows[0] if any(t not in row for row in rows[1:]))
    assert over("tensor", stop_ids=[stop]) == alone(stop_ids=[stop])
    first = [row[0] for row in rows]
    assert over("tensor", stop_ids=first) == [[]] * len(PROMPTS)


def test_nothing_but_counts_is_gathered_while_decoding():
    params, bias = model()
    b, v = 16, CFG.vocab_size
    rows = (
        jnp.zeros((b, v)),
        LatentCache(*(jnp.zeros((2, b, 64, n)) for n in (CFG.kv_lora_rank, CFG.qk_rope_head_dim))),
        jnp.zeros((b,), jnp.int32),
        jnp.zeros((b,), bool),
    )
    loop = programs(CFG, MESHES["tensor"]).loop
    text = loop.lower(
        params, rows, jnp.int32(32), bias, stop_array(()), jax.random.key(0), Sampling(), NEW, v
    ).as_text()
    gathered = re.findall(r'"stablehlo.all_gather".*?-> tensor<([\dxa-z]+)>', text, re.DOTALL)
    assert gathered == [f"8x{CFG.n_routed_experts}xi32"]  # how many tokens each device has for each expert
    assert "all_to_all" in text


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
        model_file, "generate_over_mesh", lambda *args, **kwargs: seen.append(args[4]) or [[5]]
    )
    assert loaded.generate([[1, 2]], 1) == [[5]] and seen == [mesh]
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
        ("node=two", r"config key mesh.node='two' should be .*int"),
        ("local=0", r"mesh.local=0 must be >= 1"),
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
