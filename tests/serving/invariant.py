"""Invariant mode: tokens and log-probabilities under load are, bit for bit, those of each request alone, with drafts and without.

    python -m tests.serving.invariant [--traces=40]

Prompts begin alike, end at pages or beside them, and go on with earlier answers, so that some are found in the cache; requests
are greedy or drawn, more than there are slots, and some leave.
"""

import argparse
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.model.decoding import prepare
from deepseek_jax.serving.engine import Engine
from deepseek_jax.serving.one_device import OneDevice
from deepseek_jax.serving.options import Options
from deepseek_jax.serving.programs import Weights
from deepseek_jax.serving.request import Request
from deepseek_jax.serving.sampling import Sampling
from deepseek_jax.serving.sizes import Sizes
from tests.oracle.tiny import V3, mostly_agreeing

CFG = dataclasses.replace(V3, num_hidden_layers=2, num_nextn_predict_layers=1, max_position_embeddings=512)
SLOTS, PAGES = 4, 20


@functools.cache
def device(drafts: bool) -> OneDevice:
    """Programs are compiled when they are launched first."""
    made = OneDevice(CFG, Sizes(SLOTS, 512, 64, fixed=True), PAGES, drafts=drafts)
    params, bias = jax.tree.map(jnp.asarray, mostly_agreeing(CFG, 1, 0.3))
    made.weights = Weights(prepare(params, CFG), bias, CFG.vocab_size)
    return made


def engine(drafts: bool) -> Engine:
    """With an empty cache, over pages that hold whatever was there before."""
    options = Options(rows=SLOTS, max_model_len=512, chunk=64, invariant=True, drafts=drafts, waiting=1000)
    return Engine(device(drafts), options)


def prompts(rng: np.random.Generator, n: int, said: list[list[int]]) -> list[list[int]]:
    begin = rng.integers(0, CFG.vocab_size, 192).tolist()
    found = []
    for _ in range(n):
        kept = int(rng.choice([0, 63, 64, 65, 128, 130, 192]))
        more = int(rng.choice([0, 0, 1, 20, 64]))
        found.append(begin[:kept] + rng.integers(0, CFG.vocab_size, more + (kept == 0)).tolist())
    return found + [[*text, 1] for text in said]


def wave(rng: np.random.Generator, name: str, texts: list[list[int]]) -> list[Request]:
    return [
        Request(
            f"{name}{i}",
            text,
            int(rng.integers(1, 80)),
            Sampling(temperature=float(rng.choice([0, 1]))),
            seed=i,
            logprobs=0,
        )
        for i, text in enumerate(texts)
    ]


def run(
    made: Engine, requests: list[Request], rng: np.random.Generator, leave: float
) -> dict[str, list[tuple]]:
    """(id, log-probability, that in the distribution drawn from) of each token, by request; those who left are left out."""
    left, out = list(requests), {request.id: [] for request in requests}  # type: ignore[var-annotated]
    gone = {request.id for request in requests if rng.random() < leave}
    while left or made.has_work:
        for _ in range(int(rng.integers(0, 4))):
            if left:
                made.submit(left.pop(0))
        for update in made.step():
            out[update.id] += [(token.id, token.logprob, token.sampled_logprob) for token in update.tokens]
            if update.id in gone and len(out[update.id]) > 3:
                made.abort(update.id)
    return {name: tokens for name, tokens in out.items() if name not in gone}


def check(seed: int, drafts: bool, n: int = 8) -> Engine:
    """A trace of two waves; the second goes on with answers of the first."""
    rng, under_load = np.random.default_rng(seed), engine(drafts)
    first = wave(rng, "a", prompts(rng, n, []))
    got = run(under_load, first, rng, 0.2)
    said = [[*r.prompt, *(token for token, *_ in got[r.id])] for r in first if r.id in got]
    second = wave(rng, "b", prompts(rng, n // 2, said[: n // 2]))
    got |= run(under_load, second, rng, 0.2)
    for request in (*first, *second):
        if request.id in got:
            alone = run(engine(drafts), [request], rng, 0)
            assert got[request.id] == alone[request.id], (seed, drafts, request.id)
    return under_load


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--traces", type=int, default=40)
    args = parser.parse_args()
    tokens = hits = accepted = 0
    for seed in range(args.traces):
        for drafts in (False, True):
            stats = check(seed, drafts).stats
            tokens, hits = tokens + stats.generated, hits + stats.cache_hits
            accepted += stats.accepted
    print(
        f"{2 * args.traces} traces, {tokens} tokens, {hits} found in the cache, {accepted} drafts accepted: equal bits"
    )


if __name__ == "__main__":
    main()
