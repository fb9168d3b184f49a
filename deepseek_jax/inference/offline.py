"""Requests of a function call: an engine of the size that they need, run until all are answered.

Programs are compiled when they are first launched; sizes are rounded up, so that few are.
"""

import dataclasses
import operator
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from deepseek_jax import now
from deepseek_jax.checks import is_integer, require, shown
from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.inference.text import TextRow
from deepseek_jax.parallel.prepared import generation_mesh
from deepseek_jax.serving.build import cold
from deepseek_jax.serving.engine import Engine
from deepseek_jax.serving.options import Options
from deepseek_jax.serving.request import Request, Token, Update

ROWS = 64  # sequences that run at the same time on a device, at most; more take turns
SHORTEST = 256  # tokens of the longest sequence
ANY_NUMBER = 2**30
GOLDEN = 0x9E3779B9  # between the seeds of rows: 2^32 over the golden ratio, odd, so that they differ


@dataclasses.dataclass(frozen=True)
class Completion:
    """The continuation of one prompt.

    Attributes:
        tokens: ids without the stop token.
        finish_reason: "stop" (a stop token, or a stop string) or "length" (max_new_tokens); None: it was cut short.
        logprobs: log-probability (nats) of each token in the model's own distribution, before any setting of `Sampling`.
        sampled_logprobs: in the distribution that it was drawn from, after all of them; 0 where that is greedy.
        text: of the tokens, up to a stop string; None where the prompt was not text.
    """

    tokens: list[int]
    finish_reason: str | None
    logprobs: list[float]
    sampled_logprobs: list[float]
    text: str | None = None


class _Row:
    """One answer as it comes."""

    def __init__(self, request: Request, text: TextRow | None):
        self.request, self.text = request, text
        self.tokens: list[Token] = []
        self.reason: str | None = None
        self.shown = 0

    def push(self, update: Update) -> bool:
        """Whether a stop string came."""
        if self.text is not None and self.text.ended:
            return False
        self.tokens += update.tokens
        if update.finish_reason is not None:
            self.reason = update.finish_reason
        if self.text is None:
            return False
        self.text.push(t.id for t in update.tokens if t.id not in self.request.stop_ids)
        if self.text.ended:
            self.reason = "stop"
        elif self.reason is not None:
            self.text.close()
        return self.text.ended and update.finish_reason is None

    def completion(self) -> Completion:
        """Up to a stop id, which is left out, or the token that completed a stop string."""
        tokens = self.tokens if self.text is None or not self.text.ended else self.tokens[: self.text.count]
        if tokens and tokens[-1].id in self.request.stop_ids:
            tokens = tokens[:-1]
        ids = [token.id for token in tokens]
        logprobs, sampled = [t.logprob for t in tokens], [t.sampled_logprob for t in tokens]
        return Completion(ids, self.reason, logprobs, sampled, None if self.text is None else self.text.text)


class Rows:
    """The answers of a call as they come; texts with a tokenizer.

    Args:
        before: the ids that the text of each goes on from.
    """

    def __init__(
        self,
        requests: Sequence[Request],
        tokenizer: Tokenizer | None,
        stop: Sequence[str],
        before: Sequence[Sequence[int]],
    ):
        texts = [None if tokenizer is None else TextRow(tokenizer, stop, ids) for ids in before]
        self._rows = {r.id: _Row(r, text) for r, text in zip(requests, texts, strict=True)}
        self._new: list[str] = []  # ids of answers that became whole

    def push(self, updates: Sequence[Update]) -> list[str]:
        """Ids of requests that a stop string ended before the engine did."""
        stopped = []
        for update in updates:
            row = self._rows[update.id]
            before = row.reason
            if row.push(update):
                stopped.append(update.id)
            if before is None and row.reason is not None:
                self._new.append(update.id)
        return stopped

    def finished(self) -> Iterator[tuple[int, Completion]]:
        """Numbers of answers that are whole, and these, each once."""
        new, self._new = self._new, []
        for request_id in new:
            yield int(request_id), self._rows[request_id].completion()

    def new_text(self) -> str:
        """Of the first answer, since the last time."""
        row = next(iter(self._rows.values()))
        text = "" if row.text is None else row.text.text
        new, row.shown = text[row.shown :], len(text)
        return new

    def completions(self) -> list[Completion]:
        return [row.completion() for row in self._rows.values()]


def _power(n: int) -> int:
    return 1 << (n - 1).bit_length()


def options_for(requests: Sequence[Request], positions: int, ranks: int, drafts: bool) -> Options:
    """For a model of so many positions, on so many devices."""
    longest = max(len(request.prompt) + request.max_tokens for request in requests)
    return Options(
        rows=min(ROWS, _power(-(-len(requests) // ranks))),
        max_model_len=min(positions, max(SHORTEST, _power(longest))),
        waiting=ANY_NUMBER,
        drafts=drafts,
    )


def seeds_of(seed: int | Sequence[int], rows: int) -> list[int]:
    """The seed of each row: a stream of its own of one seed for all, the first row's that of the seed itself; or one given for
    each. Raises ValueError for another number of seeds."""
    one = np.ndim(seed) == 0
    seeds: list[Any] = [seed] * rows if one else list(seed)  # type: ignore[arg-type]
    require(all(map(is_integer, seeds)), f"seed={shown(seed)} must be an integer, or one for each prompt")
    require(len(seeds) == rows, f"{len(seeds)} seeds for {rows} prompts: give one seed, or one for each")
    return [(int(s) + one * i * GOLDEN) % 2**32 for i, s in enumerate(seeds)]


class Call(NamedTuple):
    """Requests in an engine of their own. made_for: what its devices were made for: options, and parts of the model."""

    engine: Engine
    made_for: tuple[Any, ...]


class Offline:
    """Answers requests over one model, call by call; what a call compiled, and its cache's memory, serve the next one.

    Nothing of a call's texts is found by the next: the same call has the same result. A call that begins before another has
    ended, as between two pieces of a stream, has devices' state of its own.
    """

    def __init__(self, model: Any):
        self._model = model
        self._idle: tuple[tuple[Any, ...], Any] | None = None  # what devices were made for, and they

    def call(self, requests: Sequence[Request], drafts: bool) -> Call:
        """Raises ValueError as `Request.check`, and for drafts of a model without an MTP module."""
        model = self._model
        require(
            model.mesh is None or jax.process_count() == 1,
            f"generate over a mesh of {jax.process_count()} processes is not done: serve it (experiments.serve), or load the model "
            "without a mesh",
        )
        ranks = 1 if model.mesh is None else generation_mesh(model.config, model.mesh).size
        options = options_for(requests, model.config.max_position_embeddings, ranks, drafts)
        made_for = options, model.params, model.balance_bias, model.tokenizer
        device = self._taken(made_for) or cold(model, options)
        made = Engine(device, options)
        for request in requests:
            made.submit(request)
        return Call(made, made_for)

    def _taken(self, made_for: tuple[Any, ...]) -> Any:
        """The idle devices, if they were made for the same; their memory is free if not."""
        idle, self._idle = self._idle, None
        if idle is None:
            return None
        (options, *parts), device = idle
        same = options == made_for[0] and all(map(operator.is_, parts, made_for[1:]))
        return device if same else None

    def answers(self, call: Call) -> Iterator[list[Update]]:
        """What each turn brought, until all requests are answered. Where the caller leaves off, or is interrupted, the rest of
        the work is dropped, and the devices' state with it: a program may have taken it without giving it back."""
        engine, updates = call.engine, list[Update]()
        with now.doing("reading the prompt"):  # and, where sizes are new, compiling
            while engine.has_work and not any(update.tokens for update in updates):
                updates += engine.step()
        yield updates
        while engine.has_work:
            yield engine.step()
        self._idle = call.made_for, engine.device
