"""An engine for a loaded model."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from deepseek_jax import now
from deepseek_jax.checks import require
from deepseek_jax.model.decoding import decoding_config
from deepseek_jax.parallel.prepared import policy_of
from deepseek_jax.parallel.processes.together import is_first, lowest
from deepseek_jax.parallel.slots import bytes_in_slots
from deepseek_jax.serving.drafting import check_drafts
from deepseek_jax.serving.engine import Engine
from deepseek_jax.serving.one_device import OneDevice
from deepseek_jax.serving.options import Options
from deepseek_jax.serving.over_mesh import OverMesh
from deepseek_jax.serving.overlap import overlap_from
from deepseek_jax.serving.processes import Following, Leading
from deepseek_jax.serving.programs import Weights, layers_in_pages

DEFAULT = Options()


def weights_of(model: Any, ready: Any) -> Weights:
    """ready: the parameters of `model`, an `inference.model.Model`, as decoding reads them."""
    known = model.config.vocab_size if model.tokenizer is None else model.tokenizer.vocab_size
    return Weights(ready, model.balance_bias, min(known, model.config.vocab_size))


def _silent(text: str) -> None: ...


def cold(model: Any, options: Options, say: Callable[[str], None] = _silent) -> Any:
    """The devices that `model` is for, with its weights; nothing is compiled yet. Raises ValueError as `build`."""
    cfg = decoding_config(model.config)
    drafts = check_drafts(cfg, options.drafts, options.invariant)
    redundant = options.redundant if model.plan is None else model.plan.redundant
    require(
        options.redundant in (None, redundant),
        f"redundant={options.redundant}: the model was loaded with {redundant}; leave one of them out",
    )
    require(
        model.plan is None or not options.invariant,
        "invariant=True: which copy of an expert a token goes to depends on others; load the model without redundant experts",
    )
    require(
        options.redundant is None or model.mesh is not None,
        f"redundant={options.redundant}: experts are spread over the devices of a mesh, and move among them: give a mesh, or leave "
        "redundant out",
    )
    ready = jax.block_until_ready(model.ready(keep=redundant is None))
    to_come = 0 if redundant is None or model.plan is not None else bytes_in_slots(ready, cfg, redundant)
    pages = options.pages_for(cfg, layers_in_pages(cfg, drafts), to_come)
    if model.mesh is not None:  # of one device, the other processes know nothing
        pages = lowest(pages)
    sizes, cache = options.sizes(cfg), (pages, options.cache == "fp8", drafts)
    device: Any
    if model.mesh is None:
        device = OneDevice(cfg, sizes, *cache)
    else:
        over: dict[str, Any] = {"mesh": model.mesh, "policy": policy_of(model.params)}
        overlap = overlap_from(options.overlap, cfg, **over)
        sizes = dataclasses.replace(sizes, overlap=overlap)
        over["redundant"] = options.redundant if model.plan is None else model.plan
        if jax.process_count() == 1:
            device = OverMesh(cfg, sizes, *cache, **over)
        else:
            device = (Leading if is_first() else Following)(cfg, sizes, *cache, **over, say=say)
    device.weights = weights_of(model, ready)
    return device


def build(model: Any, options: Options = DEFAULT, say: Callable[[str], None] = _silent) -> Engine:
    """A warm engine: every program that it will ever launch is compiled, and was timed; what is compiled, a screen shows
    (`now.py`). Of several processes, this is the first; the others call `follow`.

    say: hears which process died, before this one ends. Raises ValueError for options that do not go with the model.
    """
    device = cold(model, options, say)
    steps = device.warm_up()
    name = next(steps, None)
    while name is not None:
        with now.doing(name):
            name = next(steps, None)
    return Engine(device, options)


def follow(model: Any, options: Options = DEFAULT, say: Callable[[str], None] = _silent) -> None:
    """What processes but the first do instead of `build`, with the same model and options: they launch what its engine does,
    until it is closed."""
    cold(model, options, say).follow()
