"""The state over a pipeline: what each rank gathers and scatters, to the bit, where it lies, and checkpoints."""

import dataclasses
import functools
import importlib
import math

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from deepseek_jax.config import from_config_dict
from deepseek_jax.model.params import Param, tree_map
from deepseek_jax.model.transformer import model_params
from deepseek_jax.model.weights import quantise_weights
from deepseek_jax.parallel.mesh import PIPE, STATE_AXES, abstract_mesh
from deepseek_jax.parallel.pipeline.stages import KINDS, Held, stages
from deepseek_jax.parallel.zero import gather, held_specs, scatter, share_of
from deepseek_jax.precision import preset
from deepseek_jax.training.checkpoint import Checkpointer
from deepseek_jax.training.ema import EMA
from deepseek_jax.training.state import parameter_shares, state_shardings
from tests.parallel.comparison import assert_restored
from tests.parallel.harness import config, mesh_of, put
from tests.shipped import OF_RUNS
from tests.tiny_run import fresh_state

# Two dense and three MoE layers; 128x128 blocks begin and end within devices' parts.
WIDE = {
    "hidden_size": 192,
    "intermediate_size": 320,
    "num_hidden_layers": 5,
    "first_k_dense_replace": 2,
    "num_attention_heads": 3,
    "q_lora_rank": 20,
    "kv_lora_rank": 24,
    "v_head_dim": 12,
    "moe_intermediate_size": 136,
}


def over(pipe, data=1, node=1, local=1, chunks=1, num_stages=0, zero=True, precision="bf16", **model):
    model, mesh = WIDE | {"dtype": "bfloat16"} | model, {"pipe": pipe, "zero": zero}
    cfg = config((data, node, local), model, mesh=mesh, precision=precision)
    return cfg, Held(stages(cfg.model, num_stages or pipe), pipe, chunks)


FP8 = {"precision": "deepseek_fp8"}
NO_MTP = {"num_nextn_predict_layers": 0}
RUNS = {
    "two ranks": over(2),
    "more ranks than layers": over(4, num_hidden_layers=2, first_k_dense_replace=1),
    "dualpipe, data, fp8": over(4, data=2, chunks=2, **FP8, **NO_MTP),
    "dualpipe, node x local, fp8": over(
        2, node=2, local=2, chunks=2, num_hidden_layers=3, first_k_dense_replace=0, **FP8
    ),
    "dualpipe_v, node x local, not divided, fp8": over(
        2, node=2, local=2, chunks=2, num_stages=4, zero=False, **FP8, **NO_MTP
    ),
}


def held_in_slots(tree, held):
    """What the ranks have of whole arrays, one rank after the other along the first dim; NumPy."""

    def of_kind(kind, x):
        layers = held.layers[kind].reshape(-1)
        x = np.asarray(x)
        return np.where((layers >= 0).reshape(-1, *[1] * (x.ndim - 1)), x[layers], np.zeros((), x.dtype))

    return {
        name: jax.tree.map(functools.partial(of_kind, name), group) if name in KINDS else group
        for name, group in tree.items()
    }


def read_specs(shares):
    """Of what `gather` gives, the slots of all ranks in a row."""

    def spec(name, share):
        return P(PIPE, *share.compute[1:]) if name in KINDS else share.compute

    return {name: jax.tree.map(functools.partial(spec, name), group) for name, group in shares.items()}


def assert_on_every_device(got, want, message=""):
    """Copies on several devices as well."""
    assert got.shape == want.shape and got.dtype == want.dtype, message
    for shard in got.addressable_shards:
        np.testing.assert_array_equal(
            np.asarray(shard.data, np.float64), np.asarray(want[shard.index], np.float64), err_msg=message
        )


def small_integers(rng, shape):
    return rng.integers(-8, 9, shape).astype(np.float32)


@functools.cache
def weights(model):
    rng = np.random.default_rng(0)
    return tree_map(lambda p: rng.standard_normal(p.shape, np.float32), model_params(model))


@functools.cache
def quantised_whole(model, precision):
    operands = functools.partial(quantise_weights, declared=model_params(model), policy=preset(precision))
    return jax.device_get(jax.jit(operands)(weights(model)))


class Trip:
    """One program of a run: gathers the parameters, and scatters gradients that each device multiplies by its number."""

    def __init__(self, name):
        self.cfg, self.held = RUNS[name]
        self.mesh, self.policy = mesh_of(self.cfg), preset(self.cfg.precision)
        self.declared, self.shares = model_params(self.cfg.model), parameter_shares(self.cfg, self.mesh)
        self.params, rng = weights(self.cfg.model), np.random.default_rng(1)
        slots = held_in_slots(self.params, self.held)
        self.grads = jax.tree.map(lambda x: small_integers(rng, x.shape), slots)
        for kind in KINDS & self.grads.keys():
            empty = self.held.layers[kind].reshape(-1) < 0
            for g in jax.tree.leaves(self.grads[kind]):
                g[empty] = np.nan  # whatever is there does not count
        self.read = read_specs(self.shares)
        self.read_operands = tree_map(self._operand_spec, self.declared, self.read)

    def _operand_spec(self, p, spec):
        if self.policy is None or p.n_in is None:
            return P()
        return P(*spec[: 2 if "expert" in p.axes else 1])

    def run(self):
        held, layers = held_specs(self.shares), self.held.layers

        def local(params, grads):
            read = gather(params, self.shares, self.declared, self.policy, "float32", layers)
            grads = jax.tree.map(lambda g: g * (1 + jax.lax.axis_index(STATE_AXES)), grads)
            return read, scatter(grads, self.shares, layers)

        spread = jax.shard_map(
            local,
            mesh=self.mesh,
            in_specs=(held, self.read),
            out_specs=((self.read, self.read_operands), held),
            check_vma=False,
        )
        on_mesh = jax.device_put(
            (self.params, self.grads),
            jax.tree.map(lambda spec: NamedSharding(self.mesh, spec), (held, self.read)),
        )
        return jax.jit(spread)(*on_mesh)

    def want_read(self):
        def one(p, w, share):
            if self.policy is not None and p.n_in is not None and share.divided:
                return np.zeros(w.shape, np.float32)  # only differentiated
            return np.asarray(w.astype(share.dtype))

        cast = tree_map(one, self.declared, self.params, self.shares)
        operands = quantised_whole(self.cfg.model, self.cfg.precision)
        return held_in_slots(cast, self.held), held_in_slots(operands, self.held)

    def want_sums(self):
        """Float64: over all devices, and over both copies of a layer."""
        number = {}
        for place, device in np.ndenumerate(self.mesh.devices):
            at = dict(zip(self.mesh.axis_names, place, strict=True))
            number[device] = 1 + np.ravel_multi_index(
                [at[a] for a in STATE_AXES], [self.mesh.shape[a] for a in STATE_AXES]
            )

        def sums(name, w, g, spec):
            total = np.zeros(w.shape)
            for device, index in NamedSharding(self.mesh, spec).devices_indices_map(g.shape).items():
                part, rest = g[index].astype(np.float64) * number[device], index[1:]
                if name not in KINDS:
                    total[index] += part
                    continue
                for layer, of_layer in zip(self.held.layers[name].reshape(-1)[index[0]], part, strict=True):
                    if layer >= 0:
                        total[(layer, *rest)] += of_layer
            return total.astype(np.float32)

        return {
            name: jax.tree.map(functools.partial(sums, name), group, self.grads[name], self.read[name])
            for name, group in self.params.items()
        }


@pytest.mark.parametrize("name", RUNS)
def test_what_ranks_gather_and_scatter(name):
    """Each rank has its slots of the whole parameters, or of the operands of the whole quantised, bit for bit; the sums of
    gradients are those of NumPy, exactly: of integers."""
    trip = Trip(name)
    got, sums = trip.run()
    wanted = (*trip.want_read(), trip.want_sums())
    for found, want in zip((*got, sums), wanted, strict=True):
        for (path, x), y in zip(
            jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(want), strict=True
        ):
            assert_on_every_device(x, y, jax.tree_util.keystr(path))


def test_without_layers_all_comes_whole():
    """As evaluation reads it: every rank all layers."""
    trip = Trip("two ranks")
    local = functools.partial(gather, tree=trip.shares, declared=trip.declared, policy=None, dtype="float32")
    compute = jax.tree.map(lambda share: share.compute, trip.shares)
    spread = jax.shard_map(
        local, mesh=trip.mesh, in_specs=(held_specs(trip.shares),), out_specs=(compute, P()), check_vma=False
    )
    got, _ = jax.jit(spread)(trip.params)
    want = jax.tree.map(lambda w, share: w.astype(share.dtype), trip.params, trip.shares)
    jax.tree.map(assert_on_every_device, got, want)


# --- where it lies ------------------------------------------------------------------------------------------------


def divided(param, **sizes):
    mesh = abstract_mesh(config(mesh=sizes).mesh, math.prod(sizes.values()))
    return share_of("w", param, mesh, {"expert": ("node", "local")}, np.float32).divided


def test_pipe_divides_a_dim_with_the_others_or_one_of_its_own():
    """Never the layers, of which a rank reads some, and never a dim that the forward pass reads divided."""
    both = ("data", "pipe")
    assert divided(Param((8, 24, 5), ("layer", "embed", None)), pipe=4, data=2) == ((1, both),)
    assert divided(Param((8, 6, 5, 16), ("layer", "embed", None, None)), pipe=4, data=2) == ((3, both),)
    assert divided(Param((8, 6, 5, 12), ("layer", "embed", None, None)), pipe=4, data=2) == (
        (1, ("data",)),
        (3, ("pipe",)),
    )
    assert divided(Param((8, 4, 10), ("layer", "embed", None)), pipe=4, data=2) == (
        (2, ("data",)),
        (1, ("pipe",)),
    )
    assert divided(Param((8, 16, 12), ("layer", "expert", "embed")), pipe=4, local=2) == ((2, ("pipe",)),)
    assert divided(Param((8, 4), ("layer", "embed"), "ones"), pipe=4) == ()
    with pytest.raises(
        ValueError,
        match=r"w \(8, 6, 5\): no dim divides over the 8 devices of data=2 x pipe=4, nor two, one of them over pipe; "
        r"change config.mesh.data, or set config.mesh.zero=False",
    ):
        divided(Param((8, 6, 5), ("layer", "embed", None)), pipe=4, data=2)


def shipped(name, **mesh):
    cfg = from_config_dict(importlib.import_module(f"configs.{name}").get_config())
    return dataclasses.replace(cfg, mesh=dataclasses.replace(cfg.mesh, data=2, zero=True, **mesh))


@pytest.mark.parametrize("pipe", [2, 4, 16])
@pytest.mark.parametrize("name", OF_RUNS)
def test_every_config_over_a_pipeline(name, pipe):
    """With two replicas, every matrix lies divided by all devices; only tiny models have some that cannot, which is said
    with names and numbers."""
    cfg = shipped(name, pipe=pipe)
    devices = 2 * pipe * cfg.mesh.node * cfg.mesh.local
    mesh = abstract_mesh(cfg.mesh, devices)
    try:
        shardings = state_shardings(cfg, mesh).params
    except ValueError as error:
        assert pipe == 16 and cfg.model.num_params() < 1e9
        assert f"no dim divides over the {devices} devices of data=2" in str(error) and "pipe=16" in str(
            error
        )
        return

    def check(p, sharding):
        parts = devices if p.init == "normal" else 1
        assert math.prod(p.shape) == parts * math.prod(sharding.shard_shape(p.shape))

    tree_map(check, model_params(cfg.model), shardings)


def test_a_checkpoint_goes_from_one_rank_to_four_and_back(tmp_path):
    """Bit for bit, parameters, moments and all; and to a state that every rank keeps whole."""
    model = {"num_hidden_layers": 3}
    one = config(model=model)
    divided = config((2,), model, mesh={"pipe": 4, "zero": True})
    homes = [divided, config((1, 2), model, mesh={"pipe": 2}), one]
    state = put(one)
    checkpointer = Checkpointer(tmp_path)
    for step, cfg in enumerate(homes, 1):
        checkpointer.save(
            step, state, EMA(state.params, 0.9).state(), {"config": {}, "data": {}, "tokens": 0}
        )
        checkpointer.wait()
        blank = jax.device_put(
            jax.tree.map(np.zeros_like, jax.device_get(fresh_state(one))), state_shardings(cfg, mesh_of(cfg))
        )
        restored = checkpointer.restore(blank)
        assert_restored(restored.state, put(one), blank)
        state = restored.state
    checkpointer.close()
