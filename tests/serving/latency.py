"""What a long prompt does to the others' tokens, and what a known prefix is worth, by hand on an idle machine:

    python -m tests.serving.latency

A prompt of 4,000 tokens joins eight sequences that are being decoded: of the seconds between two messages to a client the 99th
percentile is at most three times the median, over the whole run. And of a prompt whose first 90% lie in the prefix cache, the
first token comes within 0.3 times the time that it takes cold.
"""

import dataclasses
import random
import statistics
import time

import jax

from deepseek_jax.config import ModelConfig
from deepseek_jax.inference.model import Model
from deepseek_jax.model.params import initialise
from deepseek_jax.model.transformer import model_params
from deepseek_jax.serving.build import build
from deepseek_jax.serving.engine import Engine
from deepseek_jax.serving.options import Options
from deepseek_jax.serving.request import Request
from experiments.bench_serve import ARCHITECTURE
from experiments.serving_load import quantile

LONG, SHORT, ANSWER, DECODING = 4000, 64, 1500, 8
TRIES = 5


def _engine() -> Engine:
    cfg = dataclasses.replace(ModelConfig(**ARCHITECTURE), max_position_embeddings=8192)  # type: ignore[arg-type]
    params = initialise(jax.random.key(0), model_params(cfg), cfg.initializer_range)
    model = Model(cfg, params, jax.numpy.zeros(cfg.balance_bias_shape))
    return build(model, Options(rows=DECODING + 1, max_model_len=8192))


def _prompt(seed: int, tokens: int) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(3, ARCHITECTURE["vocab_size"]) for _ in range(tokens)]  # type: ignore[call-overload]


def joining(engine: Engine, long: int = LONG) -> tuple[list[float], list[float]]:
    """Seconds between two messages of the eight, over the run, and while the long prompt is computed."""
    for i in range(DECODING):
        engine.submit(Request(str(i), _prompt(i, SHORT), ANSWER))
    heard: dict[str, float] = {}
    gaps, during, joined, first = [], [], 0.0, 0.0
    tokens = 0
    while engine.has_work:
        updates, at = engine.step(), time.perf_counter()
        for update in updates:
            if update.tokens and update.id == "long":
                first = first or at
            elif update.tokens:
                tokens += len(update.tokens)
                if update.id in heard:
                    gaps.append(at - heard[update.id])
                    if joined and not first:
                        during.append(gaps[-1])
                heard[update.id] = at
        if not joined and tokens >= DECODING * ANSWER // 4:
            joined = at
            engine.submit(Request("long", _prompt(99, long), 16))
    return gaps, during


def first_token(engine: Engine, prompt: list[int], salt: str) -> float:
    began, seconds = time.perf_counter(), 0.0
    engine.submit(Request("one", prompt, 2, salt=salt))
    while engine.has_work:
        if any(update.tokens for update in engine.step()):
            seconds = seconds or time.perf_counter() - began
    return seconds


def warm_and_cold(engine: Engine, tokens: int = 2000) -> tuple[float, float]:
    """Medians of the seconds to the first token, of prompts that share 90% and of the same ones cold."""
    shared = _prompt(1000, tokens * 9 // 10)
    first_token(engine, shared, "warm")
    prompts = [shared + _prompt(2000 + i, tokens // 10) for i in range(TRIES)]
    cold = statistics.median(first_token(engine, prompt, f"cold {i}") for i, prompt in enumerate(prompts))
    return statistics.median(first_token(engine, prompt, "warm") for prompt in prompts), cold


def main() -> None:
    engine = _engine()
    joining(engine, 200)
    gaps, during = joining(engine)
    median, most = statistics.median(gaps), quantile(gaps, 0.99)
    print(
        f"a prompt of {LONG} tokens joins {DECODING} sequences: between messages {1e3 * median:.1f} ms (median), "
        f"{1e3 * most:.1f} ms (p99, {most / median:.2f}x), {1e3 * quantile(during, 0.99):.1f} ms (p99 while it is computed, "
        f"{len(during)} messages)"
    )
    warm, cold = warm_and_cold(engine)
    print(
        f"first token of 2,000 tokens: cold {1e3 * cold:.0f} ms, 90% known {1e3 * warm:.0f} ms, {warm / cold:.2f}x"
    )
    assert most <= 3 * median and warm <= 0.3 * cold


if __name__ == "__main__":
    main()
