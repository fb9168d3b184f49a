"""The decode server's side: prompts of its engine's requests are computed by a prefill server, and the pages fetched.

A sequence that got a slot and pages asks for what its own prefix cache lacks, over a connection of its own. Its pages are
written as they come, in order, and can be found by other prompts from then on; when all are there, the last token is computed
here. A sequence that is preempted with some of its answer computes again here what it does not find: its pages are mostly in
the prefix cache still, and an answer that has begun should not end because a prefill server did. One that is preempted before
asks again.

Prompts that lack less than a page (`least`) are computed here: a chunk of the smallest size takes less than to ask.
"""

import asyncio
import contextlib
import functools
import time
from collections.abc import Callable
from typing import Any, Protocol

from deepseek_jax.model.cache import PAGE
from deepseek_jax.serving.request import PromptToken, Request
from deepseek_jax.serving.scheduler import nothing
from deepseek_jax.serving.steps import Running
from deepseek_jax.serving.thread import EngineThread
from deepseek_jax.serving.transfer.deadlines import Deadlines
from deepseek_jax.serving.transfer.errors import NoPrefillError, PrefillLostError, TransferError
from deepseek_jax.serving.transfer.loop import LoopThread
from deepseek_jax.serving.transfer.receiving import Fetch, Receiving
from deepseek_jax.serving.transfer.side import Side


class Prefills(Protocol):
    """Which server computes the prompt of a request."""

    def address(self, request: Request) -> str | None:
        """ "host:port"; None: there is none. Is called on the engine's thread, and must be quick."""
        ...


class Asked:
    """The one that the request names."""

    def address(self, request: Request) -> str | None:
        return request.prefill


class Fetching:
    """From its making to `close`, an engine's prompts are computed by prefill servers.

    Args:
        thread: of the engine, which is warm.
        weights: `fingerprint` of its model's parameters.
        prefills: says who computes the prompt of a request.
        alone: prompts that nobody else computes are computed here; else their requests end with an error.
        least: prompts that lack fewer tokens than so many are computed here.
        direct: whether pages may come by `jax.experimental.transfer`.
    """

    def __init__(
        self,
        thread: EngineThread,
        weights: str,
        prefills: Prefills,
        alone: bool,
        *,
        deadlines: Deadlines = Deadlines(),  # noqa: B008
        least: int = PAGE,
        direct: bool = True,
    ):
        self._thread, self._prefills, self._alone = thread, prefills, alone
        self._side, self._least = Side(thread, weights, deadlines, direct), max(1, least)
        self._silent: set[str] = set()  # whose pulls do not answer
        self._loop = LoopThread("fetching")
        thread.call(lambda: self._attach(True))

    def close(self) -> None:
        """Prompts are computed here again; those that are being fetched fail."""
        with contextlib.suppress(RuntimeError):  # the engine has ended, and told all
            self._thread.call(lambda: self._attach(False))
        self._loop.close()

    # --- on the engine's thread ---

    def _attach(self, on: bool) -> None:
        for rank, scheduler in enumerate(self._thread.engine.schedulers):
            scheduler.fetches = functools.partial(self._fetch, rank) if on else nothing
            for running in [] if on else list(scheduler.running):
                if running.fetch is not None:
                    self._fail(running.fetch, PrefillLostError("fetching ends"))

    def _fetch(self, rank: int, running: Running) -> Fetch | None:
        """A sequence got its pages."""
        request = running.request
        whole_pages = self._thread.engine.options.invariant  # chunks are pages then
        end = (len(running.tokens) - 1) // PAGE * PAGE if whole_pages else len(running.tokens) - 1
        begun = len(running.tokens) > len(request.prompt)
        if request.export is not None or request.routes or begun or end - running.computed < self._least:
            return None
        address = self._prefills.address(request)
        if address is None and self._alone:
            return None
        fetch = Fetch(self._loop, rank, running, address or "", end)
        if address is None:
            error = NoPrefillError("no prefill server is known")
            self._thread.post(functools.partial(self._fail, fetch, error))
        else:
            self._loop.call(self._start, fetch)
        return fetch

    def _arrive(self, fetch: Fetch, first: int, n: int, block: Any, written: Callable[[], None]) -> None:
        running, engine = fetch.running, self._thread.engine
        if running.fetch is fetch:
            engine.device.bring(fetch.rank, running.pages[first : first + n], block)
            if running.request.prompt_logprobs is None:  # else all is computed here if not all comes
                engine.schedulers[fetch.rank].arrived(running, min((first + n) * PAGE, fetch.end), False)
        self._loop.call(written)

    def _end(self, fetch: Fetch, cached: int, given: dict[int, PromptToken]) -> None:
        running, engine = fetch.running, self._thread.engine
        if running.fetch is fetch:
            engine.given(running.request.id, given)
            running.cached_tokens = max(running.cached_tokens, cached)
            engine.schedulers[fetch.rank].arrived(running, fetch.end, True)

    def _fail(self, fetch: Any, error: TransferError) -> None:
        """The prompt is computed here from where it is, or the request ends."""
        running, engine = fetch.running, self._thread.engine
        if running.fetch is not fetch:
            return
        if self._alone:
            fetch.cancel()
            engine.schedulers[fetch.rank].arrived(running, running.computed, True)
        else:
            engine.abort(running.request.id, "error", str(error), error.code)

    # --- on the loop's thread ---

    def _start(self, fetch: Fetch) -> None:
        if not fetch.cancelled:
            fetch.task = self._loop.start(self._run(fetch))

    async def _run(self, fetch: Fetch) -> None:
        began = time.monotonic()
        error: TransferError | None = None
        try:
            rest = await Receiving(self._side, fetch, self._silent, self._arrive).run()
        except asyncio.CancelledError:
            self._side.ended("fetch", fetch.figures(), began, "cancelled", "the request ended")
            raise
        except TransferError as failure:
            error = type(failure)(f"prefill server {fetch.address}, {fetch.state}: {failure}")
        except Exception as failure:  # a WireError, or whatever it is: nobody waits for what does not come
            error = PrefillLostError(f"prefill server {fetch.address}, {fetch.state}: {failure}")
        self._side.ended("fetch", fetch.figures(), began, None if error is None else error.code, error)
        if error is None:
            self._thread.post(functools.partial(self._end, fetch, *rest))
        else:
            self._thread.post(functools.partial(self._fail, fetch, error))
