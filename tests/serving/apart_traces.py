"""Random traces of requests through a prefill and a decode server, beside one that does both, token for token:

    python -m tests.serving.apart_traces [--traces=100]

Prompts begin alike, are found in the caches of either side, go in chunks, and are of one token; some are greedy, others
sampled, with grammar and log-probabilities; some are cancelled at any time. Pages are few. By kinds: bytes by the connection
or directly from device to device, cache in float32 or FP8, with drafts always, and data parallel attention over a mesh of eight devices
on either side. After each trace nothing is held on either side.
"""

import argparse
import collections
import itertools
import queue
import time

import jax
import numpy as np

from deepseek_jax.model.decoding import decoding_config, prepare
from deepseek_jax.serving.engine import Engine
from deepseek_jax.serving.one_device import OneDevice
from deepseek_jax.serving.programs import Weights
from deepseek_jax.serving.request import Request
from deepseek_jax.serving.sampling import Sampling
from tests.serving import mesh_engine, two_servers
from tests.serving.test_drafting import SETTINGS, Even
from tests.serving.two_servers import TwoServers, not_held, plain

EACH = 10  # requests of a trace


def over_mesh(name):
    return mesh_engine.engine(name, pages=6)


def beside_mesh():
    """One device with the weights of the engines over a mesh."""
    made = OneDevice(decoding_config(mesh_engine.CFG), mesh_engine.SIZES, 6)
    params, bias = mesh_engine.model()
    made.weights = Weights(prepare(params, mesh_engine.CFG), bias, mesh_engine.CFG.vocab_size)
    return Engine(made, mesh_engine.OPTIONS)


def few():
    return plain(pages=7)


KINDS = {
    "socket": (few, few, False),
    "direct": (few, few, True),
    "fp8": (lambda: plain(7, fp8=True), lambda: plain(7, fp8=True), False),
    "mesh decodes": (beside_mesh, lambda: over_mesh("replicas"), False),
    "mesh prefills": (lambda: over_mesh("heads"), beside_mesh, True),
}


def trace(rng, vocab, new):
    begin = np.random.default_rng(int(rng.integers(4))).integers(0, vocab, 200).tolist()
    for i in range(EACH):
        kept = int(rng.choice([0, 0, 64, 70, 130, 191, 192, 193]))
        longest = 250 - new - kept
        more = rng.integers(0, vocab, rng.integers(1, max(2, min(100, longest)))).tolist()
        prompt = (begin[:kept] + more)[: 256 - new]
        sampling = SETTINGS[rng.integers(len(SETTINGS))] if rng.random() < 0.5 else Sampling(0.0)
        asks = 2 if rng.random() < 0.15 else None
        grammar = Even() if rng.random() < 0.1 else None
        yield Request(
            str(i), prompt, int(rng.integers(1, new)), sampling, seed=i, prompt_logprobs=asks, grammar=grammar
        )


def run(thread, requests, rng, cancels=0.0):
    """Their tokens, and which were cancelled; submitted while others run."""
    heard, out, cancelled = queue.SimpleQueue(), {r.id: [] for r in requests}, set()
    waiting, open_ = list(requests), set()
    while waiting or open_:
        for request in waiting[: int(rng.integers(0, 4))]:
            thread.submit(request, heard.put)
            open_.add(request.id)
            waiting.remove(request)
        if open_ and rng.random() < cancels:
            cancelled.add(name := sorted(open_)[rng.integers(len(open_))])
            thread.abort(name)
        try:
            update = heard.get(timeout=0.02)
        except queue.Empty:
            continue
        assert update.error is None, update
        out[update.id] += [token.id for token in update.tokens]
        open_ -= {update.id} if update.finish_reason else set()
    return out, cancelled


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--traces", type=int, default=100)
    args = parser.parse_args()
    counts = collections.Counter()
    made, reference = {}, {}
    for seed, name in zip(range(args.traces), itertools.cycle(KINDS), strict=False):
        prefill, decode, direct = KINDS[name]
        if name not in made:
            made[name] = TwoServers(decode(), prefill(), direct=direct, deadlines=two_servers.Deadlines())
        servers, vocab = made[name], 60 if name in ("socket", "direct", "fp8") else mesh_engine.CFG.vocab_size
        rng = np.random.default_rng(seed)
        requests = list(trace(rng, vocab, 24))
        got, cancelled = run(servers.decode, requests, rng, cancels=0.05)
        key = prefill if "mesh" not in name else beside_mesh
        together = reference.get(name) or (beside_mesh() if "mesh" in name else key())
        reference[name] = together
        want = {
            r.id: [t.id for t in tokens]
            for r, tokens in zip(requests, alone(together, requests), strict=True)
        }
        for request in requests:
            mine, other = got[request.id], want[request.id]
            whole = request.id not in cancelled
            assert mine == (other if whole else other[: len(mine)]), (seed, name, request.id, mine, other)
        end = time.monotonic() + 10
        while not (servers.free() and servers.server.requests == 0) and time.monotonic() < end:
            time.sleep(0.01)
        assert servers.free() and servers.server.requests == 0, (seed, name)
        counts.update(traces=1, requests=len(requests), cancelled=len(cancelled))
        if seed % 10 == 9:
            print(dict(counts), flush=True)
    for name, servers in made.items():
        traffic, stats = servers.decode.engine.traffic, servers.decode.engine.stats
        print(
            f"{name}: {traffic.requests} prompts, {traffic.pages} pages, {dict(traffic.failed)} failed, "
            + ", ".join(f"{way} {rate:.0f} MB/s" for way, rate in traffic.rates().items()),
            f"hits {stats.cache_hits}, preempted {stats.preemptions}, prefill's hits {servers.prefill.engine.stats.cache_hits}",
        )
        servers.__exit__()


def alone(engine, requests):
    """Their tokens, one after the other."""
    for request in requests:
        tokens = []
        engine.submit(request)
        while engine.has_work:
            tokens += [token for update in engine.step() for token in update.tokens]
        yield tokens
    assert not_held(engine)


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 8)
    main()
