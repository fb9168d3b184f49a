"""A device that computes nothing of a model and keeps its pages for real: what it draws depends on every latent it reads.

The latent of a token is a hash of the one before it, read from the pages, and of the token; the next token is a hash of the sum
of all. So a page that was never written, written by another, or computed for another prompt draws other tokens than the model
alone. A second latent stands for the draft head's: it hashes in the token behind, and the sum of all before a row's decides
whether the draft is accepted.

Programs of one step read what was there before it and what they write themselves: nothing of their neighbours.
"""

import dataclasses

import numpy as np

from deepseek_jax.serving.pages import PagePool
from deepseek_jax.serving.request import Request
from deepseek_jax.serving.scheduler import Limits, Running, Scheduler, Step

MASK = (1 << 64) - 1
VOCAB = 97
GARBAGE = 0xDEADBEEF


def mix(*values: int) -> int:
    h = 0x9E3779B97F4A7C15
    for value in values:
        h = ((h ^ value) * 0xBF58476D1CE4E5B9) & MASK
        h ^= h >> 29
    return h


def drawn(total: int) -> int:
    return mix(total, 1) % VOCAB


def accepts(total: int) -> bool:
    return mix(total, 2) % 5 < 3


class Alone:
    """What the model says to a prompt by itself: `tokens`, and for the row at each position whether its draft is accepted."""

    def __init__(self, prompt, limit: int, version: int):
        self.tokens, self.accepted = list(prompt), [False] * len(prompt)
        latent = total = heads = 0
        for i in range(limit):
            if i == len(self.tokens):
                self.tokens.append(drawn(total))
                self.accepted.append(accepts(heads))
            if i == len(prompt) - 1:
                self.accepted[i] = accepts(heads)
            latent = mix(latent, self.tokens[i], version)
            total = (total + latent) & MASK
            following = self.tokens[i + 1] if i + 1 < len(self.tokens) else drawn(total)
            heads = (heads + mix(latent, following, 3)) & MASK
        self.tokens.append(drawn(total))


class Device:
    """Pages, and for each slot how many latents count and the last token drawn."""

    def __init__(self, pool: PagePool, rows: int, drafts: int):
        self.page, self.drafts, self.version = pool.page, drafts, 0
        shape = (2, pool.pages, pool.page)
        self.memory = np.random.default_rng(0).integers(0, 1 << 63, shape, dtype=np.uint64)
        self.length, self.last = [0] * rows, [0] * rows

    def run(self, step: Step, drafts: bool):
        """-> [((running, epoch, tokens, computed), whether it is a row)], of chunks and rows."""
        before, self.memory = self.memory, self.memory.copy()
        results = []
        for chunk in step.chunks:
            first = chunk.running in step.admitted
            results.append(((chunk.running, chunk.epoch, *self._chunk(before, chunk, first)), False))
        for row in step.rows:
            results.append(((row.running, row.epoch, *self._row(before, row, drafts)), True))
        return results

    def _read(self, memory, pages, length):
        return memory[:, pages].reshape(2, -1)[:, :length]

    def _write(self, kind: int, pages, at: int, values):
        assert (at + len(values) - 1) // self.page < len(pages), "a token has no page"
        for i, value in enumerate(values, at):
            self.memory[kind, pages[i // self.page], i % self.page] = value

    def _compute(self, seen, tokens):
        """-> latents of tokens behind those seen; the draft head's, from that of the last one seen on; the sum of the first."""
        latent = int(seen[0, -1]) if seen.shape[1] else 0
        total = int(seen[0].sum(dtype=np.uint64))
        latents, heads = [], []
        for token in tokens:
            heads.append(mix(latent, token, 3))
            latent = mix(latent, token, self.version)
            total = (total + latent) & MASK
            latents.append(latent)
        return latents, heads, total

    def _chunk(self, before, chunk, first: bool):
        running, start, end = chunk.running, chunk.start, chunk.start + len(chunk.tokens)
        assert chunk.tokens == running.tokens[start:end]
        latents, heads, total = self._compute(self._read(before, running.pages, start), chunk.tokens)
        self._write(0, running.pages, start, latents)
        # The hidden state of the last token of a page that was found is not there.
        self._write(1, running.pages, start if first else start - 1, heads[first:])
        if not chunk.samples:
            return [], len(chunk.tokens)
        assert end == len(running.tokens)
        self.length[running.slot], self.last[running.slot] = end, drawn(total)
        return [drawn(total)], len(chunk.tokens)

    def _row(self, before, row, drafts: bool):
        """`times` times one after the other: one token, and the one behind its draft if that is accepted."""
        slot, pages = row.running.slot, row.running.pages
        length, tokens = self.length[slot], [self.last[slot]]
        seen = self._read(before, pages, length)
        sum_before = int(seen[1, :-1].sum(dtype=np.uint64))
        for _ in range(row.times):
            _, heads, total = self._compute(seen, tokens)
            tokens.append(drawn(total))
            if drafts and accepts((sum_before + sum(heads)) & MASK):
                _, _, total = self._compute(seen, tokens)
                tokens.append(drawn(total))
        latents, heads, _ = self._compute(seen, tokens[:-1])
        wasted = [GARBAGE] * (row.times * (1 + drafts) - len(latents))
        self._write(0, pages, length, latents + wasted)
        self._write(1, pages, length - 1, heads + wasted)
        self.length[slot], self.last[slot] = length + len(latents), tokens[-1]
        return tokens[1:], len(latents)


@dataclasses.dataclass
class Watched:
    """A request under way: what it should say, and what the caller has of it."""

    request: Request
    alone: Alone
    answer: list[int] = dataclasses.field(default_factory=list)
    end: str | None = None
    mixed: bool = False  # it has latents of two weights


class Engine:
    """The loop of an engine: launches steps, takes results `late` steps afterwards, stops. Each step is checked."""

    def __init__(self, limits: Limits, pool: PagePool, late: int = 1):
        self.scheduler, self.pool, self.late = Scheduler(limits, pool), pool, late
        self.device = Device(pool, limits.rows, limits.drafts)
        self.flight: list = []
        self.all: dict[str, Watched] = {}
        self.steps: list[Step] = []
        self.stale = 0

    def add(self, request: Request) -> Running:
        running = self.scheduler.add(request)
        version = self.scheduler.version
        limit = len(request.prompt) + request.max_tokens + 2
        self.all[request.id] = Watched(request, Alone(request.prompt, limit, version))
        return running

    def abort(self, id: str) -> None:
        if self.scheduler.abort(id) is not None:
            self.all[id].end = "abort"

    def load(self, version: int) -> None:
        """Other weights. Sequences under way have latents or tokens of both; others are of the new ones alone."""
        self.scheduler.set_version(version)
        self.device.version = version
        for running in (*self.scheduler.running, *self.scheduler.waiting):
            watched, prompt = self.all[running.request.id], running.request.prompt
            watched.mixed |= running.slot >= 0 or len(running.tokens) > len(prompt)
            watched.alone = Alone(prompt, running.limit + 2, version)

    def turn(self, budget: int | None = None) -> Step:
        """Schedules and launches a step, takes the results that are due."""
        step = self.launch(budget)
        while len(self.flight) > self.late:
            self.receive()
        return step

    def launch(self, budget: int | None = None, drafts: bool = True, times: int = 1) -> Step:
        may = [r for r in self.scheduler.running if self._wants_row(r)]
        step = self.scheduler.schedule(budget, drafts, times)
        self._check_step(step, may, budget, times)
        drafts = drafts and self.device.drafts > 0
        results = self.device.run(step, drafts)
        for (running, _, tokens, _), is_row in results:
            self._check_draws(running, tokens, times if is_row and drafts else 0)
        self.flight.append((results, drafts, times))
        self.steps.append(step)
        return step

    def receive(self) -> None:
        for (running, epoch, tokens, computed), _ in self.flight.pop(0)[0]:
            if not self.scheduler.received(running, epoch, tokens, computed):
                self.stale += 1
                continue
            watched = self.all[running.request.id]
            for token in tokens:
                watched.answer.append(token)
                reason = "stop" if token in watched.request.stop_ids else None
                if len(watched.answer) == watched.request.max_tokens:
                    reason = reason or "length"
                if reason:
                    watched.end = reason
                    self.scheduler.finish(running)
                    break

    def drain(self, turns: int) -> None:
        """Until nothing is left; in so many turns, or it has starved."""
        while any(watched.end is None for watched in self.all.values()):
            turns -= 1
            assert turns, "starved"
            self.turn()
        while self.flight:
            self.receive()

    # --- what must hold ---------------------------------------------------------------------------------------------

    def _wants_row(self, r: Running) -> bool:
        """Its prompt is computed, and one more token is wanted whatever drafts in flight become."""
        flying = [
            2 * times if is_row and drafts else len(tokens)
            for results, drafts, times in self.flight
            for (of, epoch, tokens, _), is_row in results
            if of is r and epoch == r.epoch and tokens
        ]
        if r.request.grammar is not None and flying:
            return False
        most = len(r.tokens) + sum(flying)
        return r.slot >= 0 and r.computed >= r.goal and most < len(r.request.prompt) + r.request.max_tokens

    def _check_step(self, step: Step, may: list[Running], budget: int | None, times: int) -> None:
        limits = self.scheduler.limits
        rows = [row.running for row in step.rows]
        assert rows == [r for r in may if r not in step.preempted], "a decode row starves"
        assert times == 1 or not step.chunks, "rows hold a prompt up"
        used = sum(len(chunk.tokens) for chunk in step.chunks)
        assert used + len(rows) * limits.row_tokens <= limits.budget
        assert all(0 < len(chunk.tokens) <= limits.chunk for chunk in step.chunks)
        assert len({id(x.running) for x in (*step.chunks, *step.rows)}) == len(step.chunks) + len(step.rows)
        assert {id(r) for r in step.admitted} <= {id(chunk.running) for chunk in step.chunks}
        slots = [r.slot for r in self.scheduler.running]
        assert len(set(slots)) == len(slots) and all(0 <= slot < limits.rows for slot in slots)
        assert not (limits.reserve and step.preempted)
        assert not (step.admitted and step.preempted), "what was taken from one is given to another at once"
        if limits.whole_pages:
            for chunk in step.chunks:
                left = len(chunk.running.tokens) - chunk.start
                assert chunk.start % self.pool.page == 0 and len(chunk.tokens) == min(self.pool.page, left)
        elif budget is not None:
            assert used <= budget
        order = [(r.request.priority, r.arrival) for r in self.scheduler.running]
        assert order == sorted(order)

    def _check_draws(self, running: Running, tokens: list[int], pairs: int) -> None:
        """Of a sequence that has seen one version of the weights, each draw is the model's own, and each draft accepted as by it."""
        watched = self.all[running.request.id]
        if tokens and not watched.mixed:
            end = self.device.length[running.slot]
            assert tokens == watched.alone.tokens[end - len(tokens) + 1 : end + 1], (
                "latents of others were read"
            )
            at = end - len(tokens)
            for _ in range(pairs):
                at += 1 + watched.alone.accepted[at]
            assert not pairs or at == end, "the draft head read latents of others"

    def check_pages(self) -> None:
        """Each page is free, cached or held, and as often held as a sequence has it; nobody else has one."""
        pool, scheduler = self.pool, self.scheduler
        assert pool.free + pool.cached + pool.held == pool.pages
        held = np.zeros(pool.pages, int)
        for running in (*scheduler.running, *scheduler.waiting):
            assert len(set(running.pages)) == len(running.pages)
            held[running.pages] += 1
        assert list(held) == pool._holders
        assert pool.held == np.count_nonzero(held)
        assert all(not r.pages and r.slot < 0 and not r.pending for r in scheduler.waiting)
