"""Random traces of requests through a prefill and a decode server, beside one that does both, token for token:

    python -m tests.serving.apart_traces [--traces=100]

Prompts begin alike, are found in the caches of either side, go in chunks, and are of one token; some are greedy, others
sampled, with grammar and log-probabilities; some are cancelled at any time. Pages are few. By kinds: bytes by the connection
or directly from device to device, cache in float32 or FP8, drafts, and data parallel attention over a mesh of eight devices
on either side. After each trace nothing is held on either side, and from the warm-up on nothing is compiled.
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
from deepseek_jax.serving.transfer.deadlines import Deadlines
from tests.serving import mesh_engine
from tests.serving.drafting_requests import SETTINGS, SIZES, Even
from tests.serving.two_servers import TwoServers, not_held, plain

EACH, NEW, LONGEST = 10, 24, 256


def beside_mesh(_):
    """One device with the weights of the engines over a mesh."""
    made = OneDevice(decoding_config(mesh_engine.CFG), mesh_engine.SIZES, 7)
    params, bias = mesh_engine.model()
    made.weights = Weights(prepare(params, mesh_engine.CFG), bias, mesh_engine.CFG.vocab_size)
    return Engine(made, mesh_engine.OPTIONS)


def over_mesh(name):
    return lambda _: mesh_engine.engine(name, pages=6)


def few(name):
    return plain(name, pages=7, sizes=SIZES)


def fp8(name):
    return plain(f"{name} of fp8", pages=7, fp8=True, sizes=SIZES)


# Prefill, decode, whether directly, and who does both.
KINDS = {
    "socket": (few, few, False, few),
    "direct": (few, few, True, few),
    "fp8": (fp8, fp8, False, fp8),
    "mesh decodes": (beside_mesh, over_mesh("replicas"), False, beside_mesh),
    "mesh prefills": (over_mesh("heads"), beside_mesh, True, beside_mesh),
}


class Kind:
    """Servers of a kind, with warm programs; they stay, with their caches, from trace to trace."""

    def __init__(self, prefill, decode, direct, together):
        engines = prefill(f"prefill {direct}"), decode(f"decode {direct}"), together(f"together {direct}")
        for engine in engines:
            for _ in engine.device.warm_up():
                pass
        self.together, self.vocab = engines[2], int(engines[2].device.weights.num_ids)
        self.servers = TwoServers(engines[1], engines[0], direct=direct, deadlines=Deadlines())

    def alone(self, requests):
        """Their tokens, one after the other, from one engine."""
        for request in requests:
            tokens = []
            self.together.submit(request)
            while self.together.has_work:
                tokens += [token for update in self.together.step() for token in update.tokens]
            yield tokens
        assert not_held(self.together)

    def check_free(self):
        end = time.monotonic() + 10
        while not (free := self.servers.free() and not self.servers.server.requests):
            assert time.monotonic() < end
            time.sleep(0.01)
        return free


def trace(rng, vocab):
    begin = np.random.default_rng(int(rng.integers(4))).integers(0, vocab, 200).tolist()
    for i in range(EACH):
        kept = int(rng.choice([0, 0, 64, 70, 130, 191, 192, 193]))
        prompt = begin[:kept] + rng.integers(0, vocab, rng.integers(1, 100)).tolist()
        sampling = SETTINGS[rng.integers(len(SETTINGS))] if rng.random() < 0.5 else Sampling(0.0)
        asks = 2 if rng.random() < 0.15 else None
        grammar = Even() if rng.random() < 0.1 and vocab == 60 else None  # its mask has so many ids
        new = int(rng.integers(1, NEW))
        yield Request(
            str(i), prompt[: LONGEST - NEW], new, sampling, seed=i, prompt_logprobs=asks, grammar=grammar
        )


def run(thread, requests, rng, cancels):
    """Their tokens, and which were cancelled; they come while others run."""
    heard, out, cancelled = queue.SimpleQueue(), {r.id: [] for r in requests}, set()
    waiting, going = list(requests), set()
    while waiting or going:
        for request in waiting[: int(rng.integers(0, 4))]:
            thread.submit(request, heard.put)
            going.add(request.id)
            waiting.remove(request)
        if going and rng.random() < cancels:
            cancelled.add(name := sorted(going)[rng.integers(len(going))])
            thread.abort(name)
        try:
            update = heard.get(timeout=0.02)
        except queue.Empty:
            continue
        assert update.error is None, update
        out[update.id] += update.tokens
        going -= {update.id} if update.finish_reason else set()
    return out, cancelled


def compare(got, want, of):
    """Up to where one of them was cancelled; log-probabilities are sums of float32 in another order."""
    for n, (mine, other) in enumerate(zip(got, want, strict=False)):
        both = [(token.id, token.logprob, token.sampled_logprob) for token in (mine, other)]
        assert mine.id == other.id and abs(mine.logprob - other.logprob) < 1e-3, (of, n, both)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--traces", type=int, default=100)
    parser.add_argument("--kinds", nargs="*", default=list(KINDS))
    args = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", 8)
    lowered: list = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, *_, **__: lowered.append(name) if "jaxpr_to_mlir" in name else None
    )
    counts, kinds = collections.Counter(), {}
    for seed, name in zip(range(args.traces), itertools.cycle(args.kinds), strict=False):
        kind = kinds.setdefault(name, None) or Kind(*KINDS[name])
        kinds[name] = kind
        rng = np.random.default_rng(seed)
        requests = list(trace(rng, kind.vocab))
        want = dict(zip((request.id for request in requests), kind.alone(requests), strict=True))
        lowered.clear()
        got, cancelled = run(kind.servers.decode, requests, rng, cancels=0.03)
        kind.check_free()
        assert not lowered, (seed, name, lowered)
        for request in requests:
            i = request.id
            assert i in cancelled or len(got[i]) == len(want[i]), (seed, name, i)
            compare(got[i], want[i], (seed, name, i, len(request.prompt), request.sampling))
        counts.update(traces=1, requests=len(requests), cancelled=len(cancelled))
        if seed % 10 == 9:
            print(dict(counts), flush=True)
    for name, kind in kinds.items():
        traffic, stats = kind.servers.decode.engine.traffic, kind.servers.decode.engine.stats
        print(
            f"{name}: {traffic.requests} prompts, {traffic.pages} pages, {dict(traffic.failed)}, MB/s "
            f"{ {way: round(rate) for way, rate in traffic.rates().items()} }, tokens found {stats.cache_hits}, by prefill "
            f"{kind.servers.prefill.engine.stats.cache_hits}, preempted {stats.preemptions}, drafts accepted {stats.accepted}"
        )
        kind.servers.__exit__()


if __name__ == "__main__":
    main()
