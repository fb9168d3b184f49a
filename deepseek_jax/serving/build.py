"""An engine for a loaded model."""

from collections.abc import Callable
from typing import Any

from deepseek_jax.model.decoding import decoding_config
from deepseek_jax.parallel.prepared import policy_of
from deepseek_jax.serving.drafting import check_drafts
from deepseek_jax.serving.engine import Engine
from deepseek_jax.serving.one_device import OneDevice
from deepseek_jax.serving.options import Options
from deepseek_jax.serving.over_mesh import OverMesh
from deepseek_jax.serving.programs import Weights, layers_in_pages

DEFAULT = Options()


def weights_of(model: Any, ready: Any) -> Weights:
    """ready: the parameters of `model`, an `inference.model.Model`, as decoding reads them."""
    known = model.config.vocab_size if model.tokenizer is None else model.tokenizer.vocab_size
    return Weights(ready, model.balance_bias, min(known, model.config.vocab_size))


def _device(model: Any, *cache: Any) -> OneDevice:
    if model.mesh is None:
        return OneDevice(*cache)
    return OverMesh(*cache, mesh=model.mesh, policy=policy_of(model.params))


def build(model: Any, options: Options = DEFAULT, said: Callable[[str], None] = lambda text: None) -> Engine:
    """A warm engine: every program that it will ever launch is compiled, and was timed.

    said: hears what is compiled next. Raises ValueError for options that do not go with the model.
    """
    cfg = decoding_config(model.config)
    drafts = check_drafts(cfg, options.drafts, options.invariant)
    pages = options.pages_for(cfg, layers_in_pages(cfg, drafts))
    device = _device(model, cfg, options.sizes(cfg), pages, options.cache == "fp8", drafts)
    device.weights = weights_of(model, model.ready())
    for name in device.warm_up():
        said(name)
    return Engine(device, options)
