"""Samples of an engine, for tests of what is learned from them."""

import numpy as np

from deepseek_jax.posttraining.rollouts import Sample, Sampling
from deepseek_jax.serving import sampling as serving
from deepseek_jax.serving.engine import Engine
from deepseek_jax.serving.request import Request


def drawn(made: Engine, prompts: list[list[int]], sampling: Sampling, n: int = 3) -> list[Sample]:
    """n samples of each prompt, all at once; some end with STOP."""
    asked = [
        Request(
            f"{at}.{i}",
            prompt,
            sampling.max_tokens,
            serving.Sampling(sampling.temperature, sampling.top_p, sampling.top_k),
            seed=100 * at + i,
            stop_ids=sampling.stop_ids,
            kept=sampling.kept,
        )
        for at, prompt in enumerate(prompts)
        for i in range(n)
    ]
    out: dict = {request.id: [] for request in asked}
    for request in asked:
        made.submit(request)
    while made.has_work:
        for update in made.step():
            out[update.id] += update.tokens
    return [
        Sample(
            int(name.partition(".")[0]),
            np.array([t.id for t in tokens], np.int32),
            np.array([t.sampled_logprob for t in tokens], np.float32),
            "stop" if tokens[-1].id in sampling.stop_ids else "length",
            tokens[0].version,
            kept=np.stack([t.kept for t in tokens]) if sampling.kept else None,
        )
        for name, tokens in out.items()
    ]
