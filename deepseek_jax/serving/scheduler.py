"""Which tokens are computed in a step: a queue for slots, slots for sequences, pages for tokens.

One rule: everything is a token that is not computed yet. A step has a budget of tokens. Each sequence whose prompt is computed
gets a decode row first; chunks of prompts get what is left, of those that have a slot before those that wait. Priority goes
before arrival everywhere. Who finds no page for its next token takes those of the last in order, which waits again at its old
place in the queue; and so does who waits for a slot, or for pages, where those of a lower priority have them. The first in
order loses nothing, so everything ends.

Steps are launched before the results of earlier ones are known, and the device runs them in order. So pages and slots change
hands at once: what a launched step still writes for its former owner comes before what a later step writes. Pages that a
chunk fills can be found from the next step on.
"""

import bisect
import operator
from collections.abc import Callable, Sequence

from deepseek_jax.checks import require, shown
from deepseek_jax.serving.pages import PagePool
from deepseek_jax.serving.prefixes import Prefixes
from deepseek_jax.serving.request import QueueFullError, Request
from deepseek_jax.serving.steps import Chunk, Fetch, Limits, Row, Running, Step

_order = operator.attrgetter("order")


class Scheduler:
    """Call `add` and `abort` at any time; `schedule` gives the next step, which must be launched; `received` takes its results,
    steps in order, at any time later; `finish` ends a sequence.

    waiting, running: sequences in their order. fetches: is asked of each sequence that got a slot and pages; what it returns
    brings some of its tokens' latents from another server, which says so by `arrived`. Until then no chunk of it runs.
    """

    def __init__(self, limits: Limits, pool: PagePool, version: int = 0):
        least = limits.rows * limits.row_tokens + (pool.page if limits.whole_pages else 1)
        require(
            limits.budget >= least,
            f"budget={limits.budget} must be at least {least}: rows={limits.rows} of {limits.row_tokens} tokens, and "
            "what a prompt computes at least",
        )
        require(
            not limits.whole_pages or limits.chunk >= pool.page,
            f"chunk={limits.chunk} must be at least a page of {pool.page} tokens",
        )
        self.limits, self.pool = limits, pool
        self.prefixes = Prefixes(limits, pool, version)
        self.waiting: list[Running] = []
        self.running: list[Running] = []
        self._of_id: dict[str, Running] = {}
        self._slots = list(range(limits.rows - 1, -1, -1))
        self._arrivals = 0
        self.fetches: Callable[[Running], Fetch | None] = nothing

    # --- from and to outside ------------------------------------------------------------------------------------------

    def add(self, request: Request) -> Running:
        """Puts a request into the queue. Raises ValueError for what can never run, QueueFullError for too many."""
        limit = len(request.prompt) + request.max_tokens
        require(
            len(request.prompt) > 0 and request.max_tokens > 0,
            "no token to compute: give a prompt and max_tokens >= 1",
        )
        require(
            limit <= self.limits.max_model_len,
            f"prompt of {len(request.prompt)} tokens + max_tokens={request.max_tokens} exceeds the "
            f"{self.limits.max_model_len} tokens that a sequence may have",
        )
        pages = self._pages_at_most(limit)
        require(
            pages <= self.pool.pages,
            f"prompt of {len(request.prompt)} tokens + max_tokens={request.max_tokens} take {pages} pages, and the cache "
            f"has {self.pool.pages}: ask for fewer tokens",
        )
        require(
            request.id not in self._of_id, f"id={shown(request.id)} is that of a request that is not ended"
        )
        if self.is_full:
            raise QueueFullError(f"{len(self.waiting)} requests wait already; try again later")
        running = Running(request, self._arrivals, list(request.prompt), limit)
        self._arrivals += 1
        self._of_id[request.id] = running
        bisect.insort(self.waiting, running, key=_order)
        return running

    @property
    def version(self) -> int:
        """Of the weights."""
        return self.prefixes.version

    @property
    def is_full(self) -> bool:
        """Whether as many wait as may, beyond those that find a slot."""
        return len(self.waiting) >= self.limits.waiting + len(self._slots)

    def abort(self, id: str) -> Running | None:
        """Ends a request in whatever state it is; None if there is none."""
        running = self._of_id.get(id)
        if running is not None:
            self.finish(running)
        return running

    def finish(self, running: Running) -> None:
        """Ends a sequence: slot and pages are free at once, results in flight become stale. Nothing happens the second time."""
        if self._of_id.get(running.request.id) is not running:
            return
        del self._of_id[running.request.id]
        if running.slot < 0:
            self.waiting.remove(running)
        else:
            self._take_slot(running)
        running.epoch += 1

    def received(self, running: Running, epoch: int, tokens: Sequence[int], computed: int) -> bool:
        """The result of a chunk or a row: what it drew, and of how many tokens it wrote latents that count (all of a chunk's;
        of a row's as many as it drew). False, and nothing is changed, if it is stale."""
        if epoch != running.epoch:
            return False
        if tokens:
            counted, unsure, drawn = running.launched.popleft()
            running.pending -= drawn
            assert 0 <= computed - counted <= unsure, (computed, counted, unsure)
            running.unsure -= unsure
            running.computed += computed - counted
            running.tokens.extend(tokens)
            self.prefixes.register(running)
        return True

    def arrived(self, running: Running, tokens: int, all_: bool) -> None:
        """The pages of its first so many tokens are written, by a program that was launched. all_: no more will come; chunks
        compute what is left."""
        running.computed = max(running.computed, tokens)
        if all_:
            running.until, running.fetch = running.end, None
        self.prefixes.register(running)

    def set_version(self, version: int) -> None:
        """The weights are others from the next step on: no page of the old ones can be found. Running sequences go on with the
        latents that they have, which no other will find."""
        self.prefixes.set_version(version)

    # --- a step -------------------------------------------------------------------------------------------------------

    def schedule(self, budget: int | None = None, drafts: bool = True, times: int = 1) -> Step:
        """The next step. budget: tokens of chunks at most, in this step; decode rows always go on. drafts: whether they have
        the drafts that the limits allow. times: how often they run, one after the other; all tokens at most `at_once`."""
        step = Step([], [], [], [])
        self._make_way(step)
        self._add_rows(step, self.limits.drafts if drafts else 0, times)
        left = self.limits.budget - len(step.rows) * self.limits.row_tokens
        if budget is not None:
            left = min(left, budget)
        if self.limits.whole_pages and 0 < left < self.pool.page:
            left = self.pool.page  # of a budget that the engine cut; the limit has room for a page
        for running in self.running:
            left -= self._add_chunk(step, running, left)
        if not step.preempted:
            self._admit(step, left)
        for chunk in step.chunks:
            self.prefixes.register(chunk.running)
        return step

    def at_once(self) -> int:
        """How many tokens all decode rows may compute one after the other: 1 where a prompt has its turn, or a grammar must see
        each token; as many as one likes where nobody goes on, for the sake of other ranks."""
        if any(running.computed < running.until for running in self.running) or (
            self.waiting and self._slots
        ):
            return 1
        constrained = any(running.request.grammar is not None for running in self.running)
        lefts = (running.left for running in self.running if running.left > 0)
        return 1 if constrained else min(lefts, default=self.limits.max_model_len)

    def _add_rows(self, step: Step, drafts: int, times: int) -> None:
        for running in list(self.running):
            if running.slot < 0:
                break  # it was preempted, as all behind it
            if not running.wants_row():
                continue
            if not self._grow(running, step, max(times * (1 + drafts), self.limits.row_tokens)):
                break
            running.computed += times
            running.unsure += times * drafts
            running.pending += times
            running.launched.append((times, times * drafts, times))
            step.rows.append(Row(running, running.epoch, times))

    def _grow(self, running: Running, step: Step, tokens: int) -> bool:
        """Pages for so many tokens more, from the last in order if need be. False if that is `running` itself."""
        need = self._pages(running.computed + running.unsure + tokens) - len(running.pages)
        while need > 0:
            pages = self.pool.allocate(need)
            if pages is not None:
                running.pages += pages
                break
            last = self.running[-1]
            self._preempt(last)
            step.preempted.append(last)
            if last is running:
                return False
        return True

    def _preempt(self, running: Running) -> None:
        self._take_slot(running)
        running.epoch += 1
        bisect.insort(self.waiting, running, key=_order)

    def _add_chunk(self, step: Step, running: Running, left: int) -> int:
        """Of how many tokens the next chunk of this prompt is."""
        start = running.computed
        size = min(running.until - start, self.limits.chunk)
        if self.limits.whole_pages:
            size = min(size, self.pool.page)
            left = 0 if size > left else left
        size = min(size, left)
        if size <= 0:
            return 0
        running.computed += size
        samples = running.computed == running.goal
        if samples:
            running.launched.append((size, 0, 1))
            running.pending += 1
        tokens = running.tokens[start : start + size]
        step.chunks.append(Chunk(running, running.epoch, start, tokens, samples))
        return size

    # --- admission ----------------------------------------------------------------------------------------------------

    def _admit(self, step: Step, left: int) -> None:
        """Gives slots to those who wait, in order. Only who waits for a page that is being computed is passed over."""
        least = self.pool.page if self.limits.whole_pages else 1
        i = 0
        while i < len(self.waiting) and self._slots and left >= least:
            running = self.waiting[i]
            found = self.prefixes.find(running)
            if found is None:
                i += 1
                continue
            if not self._give_pages(running, found):
                return
            del self.waiting[i]
            self._give_slot(running, len(found))
            step.admitted.append(running)
            left -= self._add_chunk(step, running, left)

    def _make_way(self, step: Step) -> None:
        """Who waits first takes slot and pages of the last in order, as far as their priority is lower: as few as will do, and
        none if all would not, or if somebody is about to end. It is admitted in the next step. With `reserve`, it waits: nothing
        is computed twice there."""
        first, found = self._next_before(self.running[-1].request.priority if self.running else None)
        if first is None or self.limits.reserve or any(running.left <= 0 for running in self.running):
            return
        victims: list[Running] = []
        pages = 0  # that they alone hold
        for last in reversed(self.running):
            more = self._wanted(first, found, len(self.running) - len(victims))
            if (self._slots or victims) and self.pool.fits(more - pages, beside=found):
                break
            if last.request.priority <= first.request.priority:
                return
            victims.append(last)
            pages += self.pool.held_once(set(last.pages).difference(found))
        for victim in victims:
            self._preempt(victim)
            step.preempted.append(victim)

    def _next_before(self, priority: int | None) -> tuple[Running | None, list[int]]:
        """The first who waits with a priority before this one, and not for a page that is being computed; the pages it finds."""
        for running in self.waiting:
            if priority is None or running.request.priority >= priority:
                break
            found = self.prefixes.find(running)
            if found is not None:
                return running, found
        return None, []

    def _wanted(self, running: Running, found: list[int], beside: int) -> int:
        """Pages that must be there beside those found: for all tokens known, and one for every eight of those who run, who would
        soon take them back."""
        if self.limits.reserve:
            return self._pages_at_most(running.limit) - len(found)
        return self._pages(len(running.tokens)) - len(found) + -(-beside // 8)

    def _give_pages(self, running: Running, found: list[int]) -> bool:
        """Holds the pages found, and new ones for all tokens known. False if there are not so many."""
        if not self.pool.fits(self._wanted(running, found, len(self.running)), beside=found):
            return False
        self.pool.share(found)
        new = self.pool.allocate(self._wanted(running, found, 0))
        assert new is not None
        running.pages = found + new
        return True

    def _give_slot(self, running: Running, found: int) -> None:
        running.slot = self._slots.pop()
        running.goal = len(running.tokens)
        running.computed = found * self.pool.page
        running.registered = found
        if not running.epoch:
            running.cached_tokens = running.computed
        self.prefixes.begin(running)
        bisect.insort(self.running, running, key=_order)
        running.fetch = self.fetches(running)
        running.until = running.computed if running.fetch else running.end

    def _take_slot(self, running: Running) -> None:
        self.running.remove(running)
        self._slots.append(running.slot)
        self.pool.release(running.pages)
        self.prefixes.leave(running)
        if running.fetch is not None:
            running.fetch.cancel()
        running.slot, running.pages, running.fetch = -1, [], None
        running.goal = running.until = running.computed = running.unsure = 0
        running.launched.clear()
        running.pending = 0

    # --- pages of a sequence ------------------------------------------------------------------------------------------

    def _pages(self, tokens: int) -> int:
        return -(-tokens // self.pool.page)

    def _pages_at_most(self, limit: int) -> int:
        """The last token is never computed; a draft behind the last but one may be."""
        return self._pages(limit - 1 + self.limits.drafts)


def nothing(running: Running) -> None:
    """Everything is computed here."""
