"""What is asked of the engine, and what it answers: tokens, no text."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from deepseek_jax.checks import is_integer, require, shown
from deepseek_jax.serving.sampling import Sampling

TOP = 20  # alternatives of a token, at most


class Grammar(Protocol):
    """What a constrained answer may go on with. The engine calls it on the host, in the order of the tokens.

    error: why the answer had to end before it was one; None: it did not.
    """

    error: str | None

    def mask(self) -> np.ndarray:
        """Which ids may come next, one bit each: uint32 [ceil(vocab_size / 32)], bit i % 32 of word i // 32."""
        ...

    def accept(self, token: int) -> bool:
        """Goes on past a token; False, and unchanged, if it may not come here."""
        ...

    def rollback(self, tokens: int) -> None:
        """Takes the last so many accepted tokens back."""
        ...


class Export(Protocol):
    """Takes the pages of a prompt that is computed for another server.

    end: tokens of the prompt that are computed; the token behind them is known. sent: pages that were taken, or that the
    other server has; the engine counts it up.
    """

    end: int
    sent: int

    def take(self, first: int, count: int, block: Any) -> None:
        """Pages first, first + 1, ... of the prompt, of which `block` holds so many (`one_device.py: OneDevice.export`). Is
        called on the engine's thread."""
        ...


@dataclasses.dataclass(frozen=True)
class Request:
    """One sequence to go on with; of n samples of a prompt each is a request of its own, and they share its pages.

    Attributes:
        id: of the request, unique among those that are not ended.
        prompt: token ids.
        max_tokens: new tokens at most.
        min_tokens: before so many, no stop id is drawn.
        seed: what is drawn depends on it, the position and the distribution alone.
        stop_ids: end the sequence; the stop id is the last of its tokens.
        logprobs: None, or how many alternatives of each token to give (0 to TOP) beside its own log-probability.
        prompt_logprobs: the same for the tokens of the prompt, but the first; the prompt is then computed whole.
        grammar: restricts what is drawn.
        salt: prompts share pages only if theirs is the same.
        priority: smaller ones run first, and take the slots of larger ones, which wait again.
        kept: give the ids that each token of the answer was drawn from.
        answer: max_tokens token ids that are taken instead of drawn ones, each with the log-probabilities, kept ids and experts
            that it has where it is drawn, by the same programs.
        routes: give the experts of all tokens but the last. The prompt is computed here, and shares pages with those of requests
            that ask the same, as far as they were computed as prompts.
        prefill: "host:port" of the server that is to compute the prompt (`transfer/`), where one was chosen.
        export: the prompt is computed for another server, which is sent its pages; nothing is drawn.
    """

    id: str
    prompt: Sequence[int]
    max_tokens: int
    sampling: Sampling = Sampling()
    min_tokens: int = 0
    seed: int = 0
    stop_ids: Sequence[int] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    grammar: Grammar | None = None
    salt: str = ""
    priority: int = 0
    kept: bool = False
    answer: Sequence[int] | None = None
    routes: bool = False
    prefill: str | None = None
    export: Export | None = None

    @property
    def page_salt(self) -> str:
        """Prompts share pages only if theirs is the same."""
        return f"{self.salt}\0routes" if self.routes else self.salt

    def check(self, vocab_size: int, max_model_len: int) -> None:
        """Raises ValueError for what can never run."""
        require(len(self.prompt) > 0, "the prompt has no token: give at least one")
        require(all(map(is_integer, self.prompt)), f"prompt={shown(list(self.prompt[:8]))} must be token ids")
        for token in (min(self.prompt), max(self.prompt)):
            require(0 <= token < vocab_size, f"token id {token} lies outside [0, vocab_size={vocab_size})")
        for name, least in (("max_tokens", 1), ("min_tokens", 0)):
            value = getattr(self, name)
            require(
                is_integer(value) and value >= least, f"{name}={shown(value)} must be an integer >= {least}"
            )
        require(
            len(self.prompt) + self.max_tokens <= max_model_len,
            f"prompt of {len(self.prompt)} tokens + max_tokens={self.max_tokens} exceeds the "
            f"{max_model_len} tokens that a sequence may have",
        )
        require(is_integer(self.seed), f"seed={shown(self.seed)} must be an integer")
        self._check_answer(vocab_size)
        require(
            not self.routes or self.export is None,
            "routes of a prompt that is computed for another server go nowhere: leave routes out",
        )
        stops = f"stop_ids={shown(self.stop_ids)} must be token ids"
        require(all(map(is_integer, self.stop_ids)), stops)
        biased = max(dict(self.sampling.logit_bias), default=0)
        require(
            biased < vocab_size, f"logit_bias has token id {biased}, outside [0, vocab_size={vocab_size})"
        )
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            good = value is None or (is_integer(value) and 0 <= value <= TOP)
            require(good, f"{name}={shown(value)} must be an integer from 0 to {TOP}")

    def _check_answer(self, vocab_size: int) -> None:
        if self.answer is None:
            return
        good = all(is_integer(token) and 0 <= token < vocab_size for token in self.answer)
        require(
            good, f"answer={shown(list(self.answer[:8]))} must be token ids below vocab_size={vocab_size}"
        )
        require(
            len(self.answer) == self.max_tokens,
            f"answer of {len(self.answer)} tokens with max_tokens={self.max_tokens}: they must be as many",
        )


class Token(NamedTuple):
    """One token of an answer.

    logprob: nats, in the model's own distribution, before temperature, penalties, bias and masks; sampled_logprob: in the
    distribution that it was drawn from, 0 where that is greedy. top: the likeliest (id, logprob), of the model's own.
    version: of the weights. kept: a bit for each id that could be drawn, where
    asked for: uint32 [ceil(vocab_size / 32)], bit i % 32 of word i // 32. routes: where asked for, the experts, best first, that
    the token *before* it went to in the pass that drew it: int16 [l, k], l the MoE layers of the main model
    (`results.routes_of`).
    """

    id: int
    logprob: float
    sampled_logprob: float
    version: int = 0
    top: Sequence[tuple[int, float]] = ()
    kept: np.ndarray | None = None
    routes: np.ndarray | None = None


class PromptToken(NamedTuple):
    """A token of the prompt given those before it; the first has None."""

    id: int
    logprob: float | None
    top: Sequence[tuple[int, float]] = ()


class Update(NamedTuple):
    """What is new of a request.

    finish_reason: None while it goes on; "stop" (a stop id, or the caller's own end), "length", "abort" or "error".
    cached_tokens: of the prompt, found in the prefix cache. prompt: all of it, once, where log-probabilities are asked for.
    error: what went wrong, in one line; code: its kind, where a router may send the request again (`transfer/errors.py`).
    queued: seconds that it waited to run for the first time. routes: once, of the prompt's tokens but the last, int16 [t, l, k],
    where asked for (`Token.routes`).
    """

    id: str
    tokens: Sequence[Token] = ()
    finish_reason: str | None = None
    cached_tokens: int = 0
    prompt: Sequence[PromptToken] | None = None
    error: str | None = None
    queued: float = 0.0
    code: str | None = None
    routes: np.ndarray | None = None


class QueueFullError(Exception):
    """The queue is full. retry_after: seconds."""

    def __init__(self, message: str, retry_after: float = 1.0):
        super().__init__(message)
        self.retry_after = retry_after
