"""The executor's programs, traced and not run: their products, and what waits in rings.

Oracle: the step without a pipeline, traced as well. 17 tokens, so that no activation has the size of a weight.
"""

import collections
import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import pytest
from jax.interpreters import partial_eval

from deepseek_jax.parallel.mesh import abstract_mesh, named_devices
from deepseek_jax.parallel.pipeline.executor import Program, Steps
from deepseek_jax.training import pipelined
from deepseek_jax.training.step import abstract_state, make_train_step
from tests.parallel.pipeline.runs import MTP, config, without
from tests.programs import equations, flops
from tests.tiny_run import HYPER

T = 17


def traced(cfg):
    """The step's program, without what nobody reads."""
    mesh = abstract_mesh(cfg.mesh, named_devices(cfg.mesh))
    batch = {"tokens": jax.ShapeDtypeStruct((cfg.train.batch_size, T + 1), jnp.int32)}
    jaxpr = make_train_step(cfg, mesh).trace(abstract_state(cfg, mesh), batch, HYPER).jaxpr.jaxpr
    return partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))[0]


class Traced(NamedTuple):
    cfg: Any
    steps: Steps
    products: dict[Program, int]  # FLOPs of each program


@functools.cache
def over_pipeline(remat):
    """DualPipe over two ranks of two devices each, with a queue of weight gradients."""
    cfg = config(2, node=2, model=MTP, stage_layers=(2, 1), overlap=True, weight_queue=1, remat=remat)
    cfg = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, seq_len=T))
    made = []

    class Seen(Steps):
        def __init__(self, *args):
            super().__init__(*args)
            made.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipelined, "Steps", Seen)
        program = traced(cfg)
    (steps,) = made
    (switch,) = (
        e
        for e in equations(program)
        if e.primitive.name == "cond" and len(e.params["branches"]) == len(steps.programs)
    )
    products = dict(zip(steps.programs, map(flops, switch.params["branches"]), strict=True))
    return Traced(cfg, steps, products)


def parts(products):
    """Products of forwards, whole backwards, split ones, and weight gradients of each stage."""
    found = [{}, {}, {}, {}]
    for p, n in products.items():
        held = (p.forward, p.backward, p.weights)
        if sum(h is not None for h in held) == 1:
            kind = 0 if p.forward else 3 if p.weights else 2 if p.split else 1
            found[kind][next(h for h in held if h)] = n
    return found


@pytest.mark.parametrize("remat", ["none", "full"])
def test_no_product_is_done_twice(remat):
    """A backward and its weight gradients apart have the products of both at once, a pair those of its halves, and all
    stages together those of the step without a pipeline."""
    cfg, _, products = over_pipeline(remat)
    forward, whole, split, weights = parts(products)
    backward = collections.defaultdict(list)
    for found in (whole, {held: n + weights[held] for held, n in split.items()}):
        for held, n in found.items():
            backward[held].append(n)
    for p, n in products.items():
        if p.forward and p.backward:
            backward[p.backward].append(n - forward[p.forward])
    assert sorted(map(len, backward.values())) == [1, 2]
    for n, *others in backward.values():
        assert others == pytest.approx([n] * len(others), rel=0.02)
    backward = {held: n for held, (n, *_) in backward.items()}
    ahead, back = sum(forward.values()), sum(backward.values())
    one = flops(traced(without(cfg, remat=cfg.train.remat))) / cfg.train.grad_accumulation
    assert ahead + back == pytest.approx(one, abs=0.02 * back)


def test_no_weight_waits():
    """What a forward keeps for its backward, and a split backward for weight gradients: activations alone."""
    _, steps, _ = over_pipeline("none")
    weights = {w.size for w in jax.tree.leaves(steps.stages.gathered.params) if w.ndim > 2}
    kept = [s for forms in (steps.kept, steps.cuts) for form in forms.values() for s in form.shapes]
    assert kept and not weights & {s.size for s in kept}
    slots = {w.size // len(w) for w in jax.tree.leaves(steps.stages.gathered.params) if w.ndim > 2}
    assert not slots & {s.size for s in kept}


def test_a_recomputed_layer_keeps_its_input_and_the_plan():
    """Of floats, the stream of each layer alone; the last stage has it after its layers, too."""
    cfg, steps, _ = over_pipeline("full")
    stream = T * cfg.model.hidden_size
    for (_, content), form in steps.kept.items():
        assert form.elements["float32"] == stream * (content.dense + content.moe + content.last)
