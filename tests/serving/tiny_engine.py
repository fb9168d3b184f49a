"""A tiny model in an engine, shared by the tests of serving."""

import contextlib
import dataclasses
import functools

import jax

from deepseek_jax import now
from deepseek_jax.inference.model import Model
from deepseek_jax.serving.build import build
from deepseek_jax.serving.engine import Engine
from deepseek_jax.serving.options import Options
from tests.oracle.tiny import V3, weights

CFG = dataclasses.replace(V3, num_hidden_layers=2, max_position_embeddings=512)
OPTIONS = Options(rows=4, chunk=64, pages=16)
SHOWN: dict = {}  # what a screen showed while programs were compiled


@functools.cache
def model(cfg=CFG, seed: int = 4) -> Model:
    params, bias = jax.tree.map(jax.numpy.asarray, weights(cfg, seed=seed))
    return Model(cfg, params, bias)


@functools.cache
def device(options: Options = OPTIONS, cfg=CFG):
    """Programs, compiled once; its pages hold whatever earlier tests left."""
    shown = SHOWN[options, cfg] = []
    with now.shown_by(lambda what: contextlib.nullcontext(shown.append(what))):
        return build(model(cfg), options).device


def engine(options: Options = OPTIONS, cfg=CFG) -> Engine:
    return Engine(device(options, cfg), options)


def run(made: Engine, requests) -> dict[str, list]:
    """The tokens of all requests, submitted at once."""
    out: dict[str, list] = {request.id: [] for request in requests}
    for request in requests:
        made.submit(request)
    while made.has_work:
        for update in made.step():
            out[update.id] += update.tokens
    return out
