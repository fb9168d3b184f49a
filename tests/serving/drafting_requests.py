"""A tiny model whose MTP module mostly agrees with it, and requests, for tests of drafts."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.serving.request import Request
from deepseek_jax.serving.sampling import Sampling
from tests.oracle.tiny import V3, mostly_agreeing
from tests.serving.mesh_engine import FewSizes

CFG = dataclasses.replace(V3, num_hidden_layers=2, num_nextn_predict_layers=1, max_position_embeddings=256)
SIZES = FewSizes(slots=4, max_model_len=256, chunk=64)
PAGES, NEW = 8, 24
RNG = np.random.default_rng(1)
BEGIN = RNG.integers(0, 60, 64).tolist()
PROMPTS = [
    RNG.integers(0, 60, 50).tolist(),
    [*BEGIN, 7, 8, 9],
    [*BEGIN, 11, 8, 9],
    RNG.integers(0, 60, 120).tolist(),
    [3],
    RNG.integers(0, 60, 63).tolist(),
]


@functools.cache
def model():
    return jax.tree.map(jnp.asarray, mostly_agreeing(CFG, 1, 0.3))


SETTINGS = [
    Sampling(1.0),
    Sampling(0.8, top_p=0.9),
    Sampling(1.3, top_k=5, min_p=0.05),
    Sampling(1.0, repetition_penalty=1.5, presence_penalty=0.5, frequency_penalty=0.3),
    Sampling(0.0, repetition_penalty=2.0),
    Sampling(1.0, logit_bias={5: 2.0, 9: -5.0}),
]


class Even:
    """Allows even ids."""

    def mask(self):
        return np.full(-(-CFG.vocab_size // 32), 0x55555555, np.uint32)

    def accept(self, token):
        return token % 2 == 0

    def rollback(self, tokens):
        raise AssertionError("nothing is taken back")


def mixed():
    """All settings, each with its seed; a row with a minimum length and one with a grammar among them."""
    made = [
        Request(str(i), PROMPTS[i % 2], NEW, sampling, seed=i, logprobs=2)
        for i, sampling in enumerate(SETTINGS)
    ]
    stops = tuple(range(0, 60, 3))
    made += [Request("least", [1, 2], NEW, Sampling(1.0), min_tokens=7, stop_ids=stops)]
    return [*made, Request("even", [1, 2], NEW, Sampling(1.0), grammar=Even())]
