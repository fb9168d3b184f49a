"""Experts that move while an engine over eight devices runs.

Fifty moves under load, to any plans: the tokens of one device, in float32, with drafts and without; every row is counted once. Then
a load by Zipf's law over 64 experts, with 8 copies more: how uneven the devices' rows are before and after, by the engine's own
counts and by what the devices really got; and what a turn with a move takes.

    python -m tests.serving.expert_moves
"""

import dataclasses
import time

import jax
import numpy as np

from deepseek_jax.balancing.plan import Plan, identity, loads_of_gpus
from deepseek_jax.model.decoding import decoding_config
from deepseek_jax.model.layout import Inputs, single_device
from deepseek_jax.model.transformer import forward
from deepseek_jax.parallel.exchange.placement import Placement
from deepseek_jax.parallel.prepared import parameter_shardings, preparing
from deepseek_jax.serving.engine import Engine
from deepseek_jax.serving.options import Options
from deepseek_jax.serving.over_mesh import OverMesh
from deepseek_jax.serving.programs import Weights
from deepseek_jax.serving.request import Request
from tests.oracle.tiny import weights
from tests.serving.mesh_engine import CFG, MESHES, SIZES, alone, engine, tight, trace

DEVICES, REDUNDANT = 8, 8
ROUNDS = 4


def any_plan(rng, experts, redundant):
    """Each expert somewhere, some in several slots, the same device's among them."""
    more = rng.integers(0, experts, redundant)
    return rng.permutation(np.concatenate([np.arange(experts), more])).astype(np.int32)


def run_moving(made, requests, moves, seed=0):
    """Tokens of requests that come while others run, and experts move in each turn, `moves` times; and the loads of all."""
    rng, left, made.experts = np.random.default_rng(seed), list(requests), None  # no plans but these
    out = {request.id: [] for request in requests}
    while left or made.has_work:
        for _ in range(rng.integers(0, 6)):
            if left:
                made.submit(left.pop(0))
        for update in made.step():
            out[update.id] += [token.id for token in update.tokens]
        if moves:
            layer = moves % made.device.slots.layers
            made.device.move(layer, any_plan(rng, made.device.cfg.n_routed_experts, REDUNDANT))
            moves -= 1
    assert not moves, f"{moves} moves were left when all was answered"
    return out, np.asarray(made.device.loads())


def under_load(name, drafts):
    made = engine(name, drafts, pages=64, redundant=REDUNDANT)
    requests = tight() + [dataclasses.replace(r, id=f"t{r.id}") for r in trace(0, 80)]
    out, loads_le = run_moving(made, requests, 50)
    want = alone(requests)
    assert out == want, [i for i in out if out[i] != want[i]]
    if not drafts:
        assert loads_le[0].sum() == CFG.num_experts_per_tok * tokens_computed(made, requests, out)
    print(
        f"{name}{' with drafts' * drafts}: 50 moves in {made.stats.steps} turns, tokens of one device",
        flush=True,
    )


def tokens_computed(made, requests, out):
    """Through the model, where none was drafted or lost its pages: all but the last of each, and those found in the cache. Each
    sequence's rows that were launched before its end was known come on top."""
    assert not made.stats.preemptions
    return sum(len(r.prompt) + len(out[r.id]) - 1 for r in requests) - made.stats.cache_hits


# --- a load by Zipf's law -------------------------------------------------------------------------------------------

ZIPF = dataclasses.replace(CFG, n_routed_experts=64, n_group=8, topk_group=8, num_nextn_predict_layers=0)
OPTIONS = Options(rows=SIZES.slots, max_model_len=256, chunk=128, redundant=REDUNDANT, replan=10)


def zipf(rng):
    share = 1 / np.arange(1, ZIPF.n_routed_experts + 1)
    return rng.permutation(share / share.sum())


def bias_for(params, share, rng):
    """Of the router, so that random tokens choose experts in these shares."""
    tokens = rng.integers(0, ZIPF.vocab_size, (16, 128)).astype(np.int32)

    @jax.jit
    def counts(bias):
        return forward(params, ZIPF, Inputs(tokens), bias, single_device(), mtp=False)[1].expert_counts_le

    bias = np.zeros(ZIPF.balance_bias_shape, np.float32)
    for i in range(600):
        got = np.asarray(counts(bias))[0] / (tokens.size * ZIPF.num_experts_per_tok)
        bias[0] += 0.3 / (1 + i / 20) * np.clip(np.log(share) - np.log(got + 1e-4), -1, 1)
    return bias


def skewed():
    """An engine whose router chooses experts by Zipf's law."""
    rng = np.random.default_rng(0)
    params, _ = jax.tree.map(jax.numpy.asarray, weights(ZIPF, seed=4))
    bias = bias_for(params, zipf(rng), rng)
    device = OverMesh(decoding_config(ZIPF), SIZES, 64, mesh=MESHES["heads"], redundant=REDUNDANT)
    ready = preparing(ZIPF, MESHES["heads"])(
        jax.device_put(params, parameter_shardings(ZIPF, MESHES["heads"]))
    )
    device.weights = Weights(ready, bias, ZIPF.vocab_size)
    for _ in device.warm_up():
        pass
    return Engine(device, OPTIONS), rng


class Received:
    """Rows (token, expert) that each device really got, as placements sent them."""

    def __init__(self, slots):
        self.of_device = np.zeros(DEVICES, int)
        self._each = slots // DEVICES

    def __call__(self, ids_nk):
        ids = np.asarray(ids_nk)
        self.of_device += np.bincount(ids[ids >= 0] // self._each, minlength=DEVICES)

    def watching(self, physical):
        def watched(placement, experts_nk, first=0):
            ids_nk = physical(placement, experts_nk, first)
            jax.debug.callback(self, ids_nk)
            return ids_nk

        return watched


def uneven(load_g):
    """Of the fullest device, in means of all."""
    return float(load_g.max() / load_g.mean())


def rounds(made, rng, received):
    """Requests of random tokens: while the plan is the first, while experts move, and after. Of each round, the fullest device:
    without copies, by the engine's counts and the plan at its beginning, and really; and the times of turns without and with a move."""
    device, experts, readings = made.device, made.experts, []
    loads = device.loads
    device.loads = lambda: readings.append(loads()) or readings[-1]
    found, took = [], ([], [])
    for n in range(ROUNDS):
        device.loads(), jax.effects_barrier()
        readings.clear(), received.of_device.fill(0)
        plan, moves = Plan(device.slots.plan.physical_lp.copy()), experts.moves
        for i in range(128):
            made.submit(Request(f"{n}.{i}", rng.integers(0, ZIPF.vocab_size, 100).tolist(), 6))
        while made.has_work:
            before, began = experts.moves, time.perf_counter()
            made.step()
            took[experts.moves - before].append(time.perf_counter() - began)
        device.loads(), jax.effects_barrier()
        counted_le = sum(map(np.asarray, readings))
        assert counted_le.sum() == received.of_device.sum()
        plans = identity(1, ZIPF.n_routed_experts), plan
        by_counts = [uneven(loads_of_gpus(p, counted_le, DEVICES)[0]) for p in plans]
        found.append((*by_counts, uneven(received.of_device)))
        print(
            "round {}: fullest device over mean: without copies {:.2f}, by counts and the plan at its beginning {:.3f}, really "
            "{:.3f}; layers moved: {}".format(n, *found[-1], experts.moves - moves),
            flush=True,
        )
    return found, took


def main() -> None:
    jax.config.update("jax_num_cpu_devices", DEVICES)
    for name, drafts in (("heads", False), ("replicas", False), ("flat", True)):
        under_load(name, drafts)
    received = Received(ZIPF.n_routed_experts + REDUNDANT)
    Placement.physical = received.watching(Placement.physical)
    found, took = rounds(*skewed(), received)
    assert found[0][0] > 2 and max(found[-1][1:]) <= 1.15, found
    for kind, seconds in zip(("without", "with a layer's move"), took, strict=True):
        median, most = 1e3 * np.median(seconds), 1e3 * max(seconds)
        print(f"{len(seconds)} turns {kind}: median {median:.0f} ms, most {most:.0f} ms")


if __name__ == "__main__":
    main()
