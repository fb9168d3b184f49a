"""How far the trainer's log-probabilities are from the sampler's, and what it costs that they are the same bits.

    python -m tests.posttraining.exact_cost [--prompts=8] [--samples=8] [--tokens=48] [--rows=64] [--top_p=1.0]

A model of the size of `configs/tiny.py`, random, answers prompts that begin alike: by an engine as it is, by one whose rows do not
depend on each other, and by the latter once more with the answers given. Beside them, one forward and backward pass of training
over the same samples. Seconds are of CPU, programs compiled before.
"""

import argparse
import dataclasses
import functools
import time

import jax
import jax.numpy as jnp
import numpy as np

from configs import tiny
from deepseek_jax.config import from_config_dict
from deepseek_jax.inference.model import Model
from deepseek_jax.model.layers import head_weight
from deepseek_jax.model.layout import Inputs, single_device
from deepseek_jax.model.loss import token_logprobs
from deepseek_jax.model.transformer import forward
from deepseek_jax.posttraining.exact import exact_logprobs
from deepseek_jax.posttraining.rollouts import Sampling
from deepseek_jax.serving.build import cold
from deepseek_jax.serving.engine import Engine
from deepseek_jax.serving.options import Options
from deepseek_jax.serving.request import Request
from tests.oracle.tiny import weights
from tests.posttraining.samples import drawn

CFG = dataclasses.replace(from_config_dict(tiny.get_config()).model, initializer_range=0.06)
REPEATS = 3


def engine(model: Model, args: argparse.Namespace, invariant: bool) -> Engine:
    options = Options(
        rows=args.rows, max_model_len=256, chunk=256, invariant=invariant, waiting=1 << 30, stall=1e9
    )
    return Engine(cold(model, options), options)


def timed(run):
    """(what it gives, seconds of CPU: the least of some repetitions behind the first)"""
    found, took = run(), []
    for _ in range(REPEATS):
        began = time.process_time()
        found = run()
        took.append(time.process_time() - began)
    return found, min(took)


def windows(prompts, samples, width):
    """Samples as rows of a batch: tokens, and which of them were drawn."""
    tokens, mask = np.zeros((len(samples), width), np.int32), np.zeros((len(samples), width), bool)
    for row, sample in enumerate(samples):
        ids = [*prompts[sample.prompt], *sample.tokens.tolist()]
        tokens[row, : len(ids)] = ids
        mask[row, len(prompts[sample.prompt]) : len(ids)] = True
    return tokens, mask


@functools.partial(jax.jit, static_argnames="temperature")
def trained(params, bias, tokens, mask, kept, temperature):
    """(gradients of the mean, log-probabilities [b, w - 1]) of the trainer's own pass."""

    def value(params):
        h, _ = forward(params, CFG, Inputs(tokens[:, :-1]), bias, single_device(), mtp=False)
        h_nd, labels = h.reshape(-1, h.shape[-1]), tokens[:, 1:].reshape(-1)
        found = token_logprobs(h_nd, head_weight(params), labels, 1024, temperature, kept)
        logp = found.logp.reshape(mask[:, 1:].shape)
        return jnp.where(mask[:, 1:], logp, 0).mean(), logp

    return jax.grad(value, has_aux=True)(params)


@functools.partial(jax.jit, static_argnames="temperature")
def log_probabilities(params, bias, tokens, temperature):
    """[b, w - 1] of the trainer's form, without a gradient."""
    h, _ = forward(params, CFG, Inputs(tokens[:, :-1]), bias, single_device(), mtp=False)
    h_nd, labels = h.reshape(-1, h.shape[-1]), tokens[:, 1:].reshape(-1)
    return token_logprobs(h_nd, head_weight(params), labels, 1024, temperature).logp.reshape(len(tokens), -1)


def what_differs(made: Engine, params, bias, prompts, samples, tokens, mask) -> None:
    """How far apart two ways to compute the same tokens' own log-probabilities are, one thing changed at a time."""

    def whole(tokens):
        return np.asarray(log_probabilities(params, bias, tokens, 1.0))

    together, there = whole(tokens), mask[:, 1:]
    apart = {"one sequence at a time": np.concatenate([whole(row[None]) for row in tokens])}
    longer = np.pad(tokens, ((0, 0), (0, 32)))
    apart["a longer window"] = whole(longer)[:, : tokens.shape[1] - 1]
    decoded, chunks = np.zeros_like(together), np.zeros_like(together)
    for i, sample in enumerate(samples):
        prompt, answer = prompts[sample.prompt], sample.tokens.tolist()
        made.submit(Request(f"d{i}", prompt, len(answer), answer=answer))
        made.submit(Request(f"c{i}", [*prompt, *answer], 1, prompt_logprobs=0))
    out: dict = {}
    while made.has_work:
        for update in made.step():
            row = out.setdefault(update.id, [])
            row += (update.prompt or [])[1:] if update.id[0] == "c" else update.tokens
    for i, sample in enumerate(samples):
        begin = len(prompts[sample.prompt]) - 1
        decoded[i, begin : begin + len(sample.tokens)] = [token.logprob for token in out[f"d{i}"]]
        chunks[i, : len(out[f"c{i}"])] = [token.logprob for token in out[f"c{i}"]]
    apart |= {"chunks over pages": chunks, "decode rows over pages": decoded}
    for name, other in apart.items():
        by = np.abs(other - together)[there]
        print(
            f"  all sequences together, against {name}: up to {by.max():.1e} nats, in the mean {by.mean():.1e}"
        )
    by = np.abs(chunks - decoded)[there]
    print(f"  chunks against decode rows: up to {by.max():.1e} nats, in the mean {by.mean():.1e}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in (("prompts", 8), ("samples", 8), ("tokens", 48), ("rows", 64)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--top_p", type=float, default=1.0)
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    begin = rng.integers(0, CFG.vocab_size, 64).tolist()
    prompts = [
        begin[: 64 * (i % 2)] + rng.integers(0, CFG.vocab_size, 5 + 7 * i).tolist()
        for i in range(args.prompts)
    ]
    params, bias = jax.tree.map(jnp.asarray, weights(CFG, seed=0))
    model, sampling = (
        Model(CFG, params, bias),
        Sampling(args.tokens, (2, 3, 4, 5), 0.7, top_p=args.top_p, kept=args.top_p < 1),
    )
    plain, exact = (engine(model, args, invariant) for invariant in (False, True))

    _, sampled = timed(lambda: drawn(plain, prompts, sampling, args.samples))
    samples, invariantly = timed(lambda: drawn(exact, prompts, sampling, args.samples))
    again, given = timed(lambda: exact_logprobs(exact, prompts, samples, sampling))
    same = all(np.array_equal(x, s.logprobs) for x, s in zip(again, samples, strict=True))

    width = -(-max(len(prompts[s.prompt]) + len(s.tokens) for s in samples) // 32) * 32 + 1
    tokens, mask = windows(prompts, samples, width)
    kept = None
    if sampling.kept:
        kept = np.full((*mask.shape, samples[0].kept.shape[-1]), 2**32 - 1, np.uint32)
        kept[mask] = np.concatenate([s.kept for s in samples])
        kept = kept[:, 1:].reshape(-1, kept.shape[-1])
    (_, logp), training = timed(
        lambda: jax.block_until_ready(trained(params, bias, tokens, mask, kept, sampling.temperature))
    )
    apart = np.abs(np.asarray(logp)[mask[:, 1:]] - np.concatenate([s.logprobs for s in samples]))
    drawn_tokens = sum(len(s.tokens) for s in samples)
    print(
        f"{len(samples)} samples, {drawn_tokens} tokens of {len({len(s.tokens) for s in samples})} lengths; given once more: "
        f"{'the same bits' if same else 'OTHER BITS'}"
    )
    print(f"the trainer's own pass is up to {apart.max():.1e} nats away, in the mean {apart.mean():.1e}")
    normal, whole = sampled + training, invariantly + given + training
    print(
        f"sampling {sampled:.2f} s, with rows that do not depend on each other {invariantly:.2f} s, given once more {given:.2f} s, "
        f"forward and backward {training:.2f} s: {whole / normal:.2f} times the time of a step"
    )
    what_differs(exact, params, bias, prompts, samples, tokens, mask)
    assert same and apart.max() < 1e-4


if __name__ == "__main__":
    main()
