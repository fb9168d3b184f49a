"""`Rollouts` on the serving engine: built once, its weights replaced from step to step.

All samples are in one queue, and as many run at the same time as the engine has rows; samples of a prompt share the pages that it
fills, of 64 tokens, and compute the rest of it each.
Weights of a training mesh are arranged as decoding reads them by one program, so that no other program is compiled anew
when they come.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from deepseek_jax.checks import require
from deepseek_jax.config import MeshConfig, ModelConfig
from deepseek_jax.model.decoding import decoding_config, prepare
from deepseek_jax.parallel.mesh import replicated
from deepseek_jax.parallel.prepared import WHOLE, generation_mesh, parameter_specs, preparing
from deepseek_jax.posttraining.exact import exact_logprobs
from deepseek_jax.posttraining.rollouts import Sample, Sampling, seed_of_sample, seeds_of_prompts
from deepseek_jax.serving import sampling as serving
from deepseek_jax.serving.engine import Engine
from deepseek_jax.serving.one_device import OneDevice
from deepseek_jax.serving.options import Options
from deepseek_jax.serving.over_mesh import OverMesh
from deepseek_jax.serving.programs import Weights, layers_in_pages
from deepseek_jax.serving.request import Request, Token, Update
from deepseek_jax.serving.results import routes_of


class Parameters(NamedTuple):
    """What an engine is loaded with: of a `TrainState`, as it lies on the mesh."""

    params: Any
    balance_bias: Any


class EngineRollouts:
    """On the devices of one process, or, of several, on the first device of each.

    Args:
        cfg: the model's.
        mesh: on which the parameters lie that `load` is given. over: by which config, whose experts the engine spreads as training
            does; its pipeline and ZeRO are training's alone.
        options: of the engine.
        num_ids: ids from there on are never drawn: the tokenizer's size.
    """

    def __init__(self, cfg: ModelConfig, mesh: Mesh, over: MeshConfig, options: Options, num_ids: int):
        self._cfg, self._mesh, self._options, self._num_ids = cfg, mesh, options, num_ids
        several = mesh.size > 1 and jax.process_count() == 1
        # Of each device, rows of its own; what the other axes leave are replicas of the experts.
        alone = dataclasses.replace(over, pipe=1, data=0, zero=False, overlap=False)
        self._over = alone if several else None
        self._at = tuple(mesh.devices.flat)
        self._engine: Engine | None = None

    @property
    def engine(self) -> Engine:
        require(self._engine is not None, "there are no weights to sample with: load some first")
        assert self._engine is not None
        return self._engine

    def load(self, params: Parameters, version: int) -> None:
        """All processes of the mesh call it. The first time, the engine is built; it compiles programs as it needs them."""
        weights = self._arranged(params)
        if self._engine is None:
            self._engine = Engine(self._device(weights), self._options, version)
        else:
            self._engine.load(weights, version)

    def sample(
        self, prompts: Sequence[Sequence[int]], n: int, sampling: Sampling, seed: int | Sequence[int]
    ) -> list[Sample]:
        """As `Rollouts.sample`. No page of an earlier call is found: with the same weights, the same call has the same bits."""
        self.engine.load(self.engine.device.weights, self.engine.version)
        seeds = seeds_of_prompts(seed, len(prompts))
        numbered = [(at, i) for at in range(len(prompts)) for i in range(n)]
        asked = [
            _request(f"{at}.{i}", prompts[at], sampling, seed_of_sample(seeds[at], i)) for at, i in numbered
        ]
        answers = _answers(self.engine, asked)
        return [_sample(at, answers[request.id]) for (at, _), request in zip(numbered, asked, strict=True)]

    def again(self, pairs: Sequence[tuple[list[int], Sample]], sampling: Sampling) -> list[np.ndarray]:
        """Log-probabilities of the tokens of (prompt, sample) pairs by the weights as they are, in the bits of the programs that
        drew them: `exact.exact_logprobs`, with its errors."""
        samples = [sample._replace(prompt=i) for i, (_, sample) in enumerate(pairs)]
        return exact_logprobs(self.engine, [prompt for prompt, _ in pairs], samples, sampling)

    def close(self) -> None:
        if self._engine is not None:
            self._engine.close()

    @functools.cached_property
    def _arrange(self) -> Callable[[Any, Any], Any]:
        decoding = decoding_config(self._cfg)

        def arranged(params: Any, bias: Any) -> Any:
            # Copies: the training step consumes its state.
            return jax.tree.map(jnp.copy, (prepare(params, decoding), bias))

        return jax.jit(arranged, out_shardings=replicated(self._mesh))

    def _arranged(self, params: Parameters) -> Weights:
        """Over the mesh, or whole on the first device of this process."""
        if self._over is not None:
            devices = generation_mesh(self._cfg, self._over, self._at)
            specs = parameter_specs(self._cfg, self._over, devices)
            put = functools.partial(NamedSharding, devices)
            where = jax.tree.map(put, specs, is_leaf=lambda x: isinstance(x, PartitionSpec))
            ready = preparing(self._cfg, self._over, self._at)(jax.device_put(params.params, where))
            bias = jax.device_put(params.balance_bias, put(WHOLE), may_alias=False)
        else:
            held = self._arrange(params.params, params.balance_bias)
            ready, bias = jax.tree.map(lambda x: x.addressable_data(0), held)
        return Weights(ready, bias, min(self._num_ids, self._cfg.vocab_size))

    def _device(self, weights: Weights) -> OneDevice:
        cfg, options = decoding_config(self._cfg), self._options
        pages = options.pages_for(cfg, layers_in_pages(cfg, drafts=False))
        cache = (options.sizes(cfg), pages, options.cache == "fp8")
        if self._over is None:
            device = OneDevice(cfg, *cache)
        else:
            device = OverMesh(cfg, *cache, mesh=self._over, at=self._at)
        device.weights = weights
        return device


def _request(request_id: str, prompt: Sequence[int], sampling: Sampling, seed: int) -> Request:
    drawn = serving.Sampling(sampling.temperature, sampling.top_p, sampling.top_k)
    return Request(
        request_id,
        prompt,
        sampling.max_tokens,
        drawn,
        seed=seed,
        stop_ids=sampling.stop_ids,
        kept=sampling.kept,
        routes=sampling.routes,
    )


class _Answer:
    """As it comes. routes: of the prompt, where asked for."""

    def __init__(self) -> None:
        self.tokens: list[Token] = []
        self.routes: Any = None
        self.reason: str | None = None

    def push(self, update: Update) -> None:
        self.tokens += update.tokens
        self.routes = update.routes if self.routes is None else self.routes
        self.reason = update.finish_reason


def _answers(engine: Engine, asked: Sequence[Request]) -> dict[str, _Answer]:
    """Of all requests, by their ids. Raises ValueError for one that can never run; none is left in the engine then."""
    for request in asked:
        request.check(engine.device.cfg.vocab_size, engine.device.sizes.max_model_len)
    answers = {request.id: _Answer() for request in asked}
    try:
        for request in asked:
            engine.submit(request)
        while engine.has_work:
            for update in engine.step():
                require(update.error is None, f"sample {update.id}: {update.error}")
                answers[update.id].push(update)
    except BaseException:
        for request in asked:
            engine.abort(request.id)
        while engine.has_work:
            engine.step()
        raise
    return answers


def _sample(prompt: int, answer: _Answer) -> Sample:
    tokens = answer.tokens
    assert answer.reason is not None
    kept = [token.kept for token in tokens if token.kept is not None]
    return Sample(
        prompt=prompt,
        tokens=np.array([token.id for token in tokens], np.int32),
        logprobs=np.array([token.sampled_logprob for token in tokens], np.float32),
        finish_reason=answer.reason,
        version=tokens[0].version,
        routes=None if answer.routes is None else routes_of(answer.routes, tokens),
        kept=np.stack(kept) if kept else None,
    )
