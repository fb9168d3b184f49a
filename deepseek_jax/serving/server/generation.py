"""The sequences of one HTTP request in the engine: what comes of them, and their end, whoever brings it about."""

import asyncio
import collections
import functools
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

from deepseek_jax.serving.replies import Delta, Reply, joined
from deepseek_jax.serving.request import PromptToken, Request, Token, Update
from deepseek_jax.serving.server.errors import ApiError, answer_to, refused


class Engine(Protocol):
    """`serving/engine.py: EngineThread`, as far as the server calls it."""

    def submit(
        self,
        request: Request,
        on_update: Callable[[Update], None],
        on_refused: Callable[[Exception], None],
    ) -> None: ...

    def abort(self, request_id: str, reason: str = "abort") -> None: ...


class Listener(Protocol):
    """Told what comes of sequences (`service.py: Service`)."""

    @property
    def engine(self) -> Engine: ...

    def enter(self, samples: Sequence["Sample"]) -> None: ...

    def came(self, sample: "Sample", tokens: int, when: float) -> None: ...

    def ended(self, sample: "Sample", when: float) -> None: ...

    def refused(self, sample: "Sample") -> None: ...


class Mailbox:
    """Brings updates from the engine's thread to the event loop's, all that came in the meantime in one go."""

    def __init__(self, loop: asyncio.AbstractEventLoop):
        self._loop, self._called = loop, False
        self._new: collections.deque[tuple[Callable[[Any, float], None], Any, float]] = collections.deque()

    def put(self, receive: Callable[[Any, float], None], what: Any) -> None:
        """Has `receive` called with it, and with the time. Any thread may call it."""
        self._new.append((receive, what, time.monotonic()))
        if not self._called:
            self._called = True
            if not self._loop.is_closed():
                self._loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        self._called = False
        while self._new:
            receive, what, when = self._new.popleft()
            receive(what, when)


class Sample:
    """One sequence.

    Args:
        reply: makes text of its tokens, and finds where it ends.
        counts_prompt: of the samples of a prompt, the first stands for it where tokens are counted.
        discards: the token that the engine draws, for it draws one at least, is not wanted.

    Attributes:
        generation: to which it belongs.
        new: of the answer, since it was taken.
        prompt: tokens of the prompt with log-probabilities, where they were asked for.
        cached: tokens of the prompt found in the prefix cache.
        queued: seconds until it ran.
        begun, first, last: seconds when it was submitted, and had its first and last token; None before.
        reason: None while it goes on, then why the engine ended it.
        error: what the client is told, if it did not end well.
    """

    generation: "Generation"

    def __init__(self, request: Request, reply: Reply, counts_prompt: bool = True, discards: bool = False):
        self.request, self.reply = request, reply
        self.counts_prompt, self._discards = counts_prompt, discards
        self.new: list[Delta] = []
        self.count, self.cached, self.queued = 0, 0, 0.0
        self.prompt: Sequence[PromptToken] | None = None
        self.begun = time.monotonic()
        self.first: float | None = None
        self.last: float | None = None
        self.reason: str | None = None
        self.error: ApiError | None = None

    def receive(self, update: Update, when: float) -> None:
        """Reads what the engine says, on the event loop's thread. What comes after the end is dropped."""
        if self.reason is not None:
            return
        self.prompt = self.prompt if update.prompt is None else update.prompt
        self.cached, self.queued = max(self.cached, update.cached_tokens), update.queued
        if update.tokens:
            self._read(update.tokens, when)
        if update.finish_reason is not None and self.reason is None:
            said = f"the engine ended the request: {update.error or update.finish_reason}"
            wrong = update.finish_reason in ("abort", "error")
            grammar = self.request.grammar
            unkept = None if grammar is None or grammar.error is None else ApiError(400, grammar.error)
            failed = ApiError(503 if update.code else 500, said, code=update.code)
            self._end(update.finish_reason, when, failed if wrong else unkept)
        self.generation.notify()

    def _read(self, tokens: Sequence[Token], when: float) -> None:
        if not self._discards:
            self.new.append(self.reply.push(tokens))
        before, self.count = self.count, self.reply.count
        self.generation.listener.came(self, max(0, self.count - before), when)
        self.first, self.last = self.first or when, when
        if self.reply.ended:
            self.generation.listener.engine.abort(self.request.id, "stop")
            self._end("stop", when)

    def _end(self, reason: str, when: float, error: ApiError | None = None) -> None:
        self._close(reason, error)
        self.generation.listener.ended(self, when)

    def _close(self, reason: str, error: ApiError | None) -> None:
        self.new.append(self.reply.close(reason))
        self.reason, self.error = reason, error

    def refuse(self, error: Exception, when: float) -> None:
        """The engine does not take it."""
        if self.reason is None:
            self.generation.refused = True
            self._refused("error", answer_to(error))
            self.generation.notify()

    def _refused(self, reason: str, error: ApiError | None) -> None:
        self._close(reason, error)
        self.generation.listener.refused(self)

    def cancel(self, error: ApiError | None = None) -> None:
        """Nobody wants it any more, or, with an error, the server does not go on with it."""
        if self.reason is None:
            self.generation.listener.engine.abort(self.request.id)
            if self.generation.refused and self.first is None:  # as another one of its request
                self._refused("abort", error)
            else:
                self._end("abort", time.monotonic(), error)
            self.generation.notify()

    def take(self) -> Delta:
        """What is new of the answer."""
        new, self.new = self.new, []
        return joined(new)


class Generation:
    """The sequences of one request. On leaving the `with` block none of them is in the engine any more."""

    def __init__(self, listener: Listener, mailbox: Mailbox, samples: Iterable[Sample]):
        self.listener, self._mailbox, self.samples = listener, mailbox, tuple(samples)
        self.gone = False  # the client
        self.refused = False  # the engine did not take one of them
        self._news, self._waiter = False, None  # type: bool, asyncio.Future[None] | None
        for sample in self.samples:
            sample.generation = self

    def __enter__(self) -> "Generation":
        """Submits all; those that the engine refuses end with an error. Raises ApiError where the queue is full."""
        with refused():
            self.listener.enter(self.samples)
        try:
            for sample in self.samples:
                self._submit(sample)
        except BaseException:
            self.cancel()
            raise
        return self

    def _submit(self, sample: Sample) -> None:
        put = self._mailbox.put
        came, denied = functools.partial(put, sample.receive), functools.partial(put, sample.refuse)
        self.listener.engine.submit(sample.request, came, denied)

    def __exit__(self, *_: object) -> None:
        self.cancel()

    def cancel(self, error: ApiError | None = None) -> None:
        for sample in self.samples:
            sample.cancel(error)

    def leave(self) -> None:
        """The client is gone."""
        self.gone = True
        self.notify()

    @property
    def ended(self) -> bool:
        return all(sample.reason is not None for sample in self.samples)

    @property
    def error(self) -> ApiError | None:
        """Of the first sequence that failed."""
        return next((sample.error for sample in self.samples if sample.error is not None), None)

    def notify(self) -> None:
        self._news = True
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def news(self, seconds: float) -> bool:
        """Waits until something is new, but not longer than `seconds`; returns whether something is."""
        if not self._news:
            loop = asyncio.get_running_loop()
            self._waiter = loop.create_future()
            timer = loop.call_later(seconds, self._wake)
            try:
                await self._waiter
            finally:
                timer.cancel()
                self._waiter = None
        news, self._news = self._news, False
        return news
