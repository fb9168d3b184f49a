"""Routes of whole sequences: by the engine, and by the whole forward pass."""

import functools

import jax
import numpy as np

from deepseek_jax.model.layout import Inputs, single_device
from deepseek_jax.model.transformer import forward
from deepseek_jax.serving.results import routes_of


@functools.partial(jax.jit, static_argnums=1)
def _experts(params, cfg, bias, tokens):
    return forward(params, cfg, Inputs(tokens), bias, single_device(), mtp=False)[1].experts_lbtk


def of_the_model(params, cfg, bias, rows) -> list[np.ndarray]:
    """[t - 1, l, k] of each row of t ids: nobody computes the last."""
    tokens = np.zeros((len(rows), -(-max(map(len, rows)) // 64) * 64), np.int32)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = row
    routes = np.moveaxis(np.asarray(_experts(params, cfg, bias, tokens)), 0, 2)
    return [routes[i, : len(row) - 1] for i, row in enumerate(rows)]


def run(made, requests):
    """(ids of prompt and answer, routes of all but the last) of each request, in their order."""
    tokens, prompts = {r.id: [] for r in requests}, {}
    for request in requests:
        made.submit(request)
    while made.has_work:
        for update in (u for u in made.step() if u.id in tokens):
            tokens[update.id] += update.tokens
            if update.routes is not None:
                assert update.id not in prompts
                prompts[update.id] = update.routes
    for request in requests:
        assert len(prompts[request.id]) == len(request.prompt) - 1
    return [
        ([*r.prompt, *(token.id for token in tokens[r.id])], routes_of(prompts[r.id], tokens[r.id]))
        for r in requests
    ]


def assert_same(got, params, cfg, bias) -> None:
    """Routes of the engine are those of the model, token by token: float32 chooses the same unless two experts are within
    rounding of each other, which none of the tests' tokens have."""
    want = of_the_model(params, cfg, bias, [ids for ids, _ in got])
    for (_, routes), one in zip(got, want, strict=True):
        assert routes.dtype == np.int16
        np.testing.assert_array_equal(routes, one)
