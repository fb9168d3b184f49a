"""200 traces of requests over meshes of eight devices, each beside one device: greedy tokens, in chunks, from the
prefix cache, with drafts, without, and with them where they pay.

    python -m tests.serving.mesh_traces [--traces=200] [--fp8] [--overlap]

With --overlap the rows of every program are in two halves, and the engine says so of each step.
With --fp8 the cache is in FP8, and one device's engine with such a cache says what is right, each request alone. A latent
between two values of FP8 may be rounded otherwise where sums are in another order: then a token may be another one, but
only one that was as likely up to what a step of E4M3, 1/16 of a value, makes of one latent in many.
"""

import argparse
import collections
import functools
import itertools

import jax

from deepseek_jax.model.decoding import decoding_config, prepare
from deepseek_jax.serving.engine import Engine
from deepseek_jax.serving.one_device import OneDevice
from deepseek_jax.serving.programs import Weights
from deepseek_jax.serving.request import TOP, Request
from tests.serving import mesh_engine
from tests.serving.mesh_engine import CFG, MESHES, OPTIONS, SIZES, alone, engine, run, tokens, trace

EACH = 12  # requests of a trace
NEAR = 0.05  # nats between two tokens that are as likely up to rounding


@functools.cache
def one_device() -> OneDevice:
    params, bias = mesh_engine.model()
    made = OneDevice(decoding_config(CFG), SIZES, 2 * SIZES.pages_each, fp8=True)
    made.weights = Weights(prepare(params, CFG), bias, CFG.vocab_size)
    return made


def in_fp8(made: Engine, requests: list[Request], seed: int) -> collections.Counter:
    """Checks a trace with a cache in FP8; counts requests that are equal to the end, and others."""
    asked = [Request(r.id, r.prompt, r.max_tokens, logprobs=TOP) for r in requests]
    got, counts = tokens(made, asked, seed), collections.Counter()
    for request in asked:
        want = tokens(Engine(one_device(), OPTIONS), [request])[request.id]
        pairs = enumerate(zip(got[request.id], want, strict=True))
        at = next((i for i, (a, b) in pairs if a.id != b.id), None)
        counts["equal" if at is None else "near"] += 1
        if at is not None:
            right, said = want[at], dict(want[at].top).get(got[request.id][at].id, -99.0)
            assert right.logprob - said < NEAR, (seed, request.id, at, right, got[request.id][at])
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--traces", type=int, default=200)
    parser.add_argument("--fp8", action="store_true", help="the cache in FP8")
    parser.add_argument("--overlap", action="store_true", help="rows in two halves")
    args = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", 8)
    counts: collections.Counter = collections.Counter()
    kinds = itertools.cycle(itertools.product(MESHES, (False, True, "auto")))
    for seed, (name, drafts) in zip(range(args.traces), kinds, strict=False):
        made = engine(name, drafts, fp8=args.fp8, overlap=1 if args.overlap else None)
        requests = trace(seed, EACH)
        if args.fp8:
            counts += in_fp8(made, requests, seed)
        else:
            got, want = run(made, requests, seed), alone(requests)
            assert got == want, (seed, name, drafts, [i for i in got if got[i] != want[i]])
        for scheduler in made.schedulers:
            pool = scheduler.pool
            assert (pool.held, pool.free + pool.cached) == (0, pool.pages), (seed, name, drafts)
        stats = made.stats
        assert stats.in_two == (stats.steps if args.overlap else 0), (seed, stats)
        counts.update(traces=1, in_two=stats.in_two, steps=stats.steps)
        counts.update(tokens=stats.generated, hits=stats.cache_hits, preemptions=stats.preemptions)
        counts.update(drafts=stats.drafts, accepted=stats.accepted)
        if seed % 3 == 2:
            print(dict(counts), flush=True)


if __name__ == "__main__":
    main()
