"""200 traces of requests over meshes of eight devices, each beside one device: greedy tokens, in chunks, from the
prefix cache, with and without drafts.

    python -m tests.serving.mesh_traces [--traces=200]
"""

import argparse
import collections
import itertools

import jax

from tests.serving.mesh_engine import MESHES, alone, engine, run, trace

EACH = 12  # requests of a trace


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--traces", type=int, default=200)
    args = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", 8)
    counts: collections.Counter = collections.Counter()
    kinds = itertools.cycle(itertools.product(MESHES, (False, True)))
    for seed, (name, drafts) in zip(range(args.traces), kinds, strict=False):
        made = engine(name, drafts)
        requests = trace(seed, EACH)
        got, want = run(made, requests, seed), alone(requests)
        assert got == want, (seed, name, [i for i in got if got[i] != want[i]])
        for scheduler in made.schedulers:
            pool = scheduler.pool
            assert (pool.held, pool.free + pool.cached) == (0, pool.pages), (seed, name)
        stats = made.stats
        counts.update(traces=1, tokens=stats.generated, hits=stats.cache_hits, preemptions=stats.preemptions)
        if seed % 10 == 9:
            print(dict(counts), flush=True)


if __name__ == "__main__":
    main()
