"""The engine: requests in, tokens out, one step after the other, each for all that run.

A turn (`Engine.step`) has three parts. The scheduler of each rank says which sequences take part (`scheduler.py`); programs
are launched, without waiting (`one_device.py`, `over_mesh.py`); and the results of the turn before are read, which came while
this one was launched. So the device always has the next step, and the host knows each token one step late: what was launched
for a sequence that had ended is dropped.

`thread.py: EngineThread` runs it for callers of other threads.
"""

import collections
import time
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np

from deepseek_jax.checks import require
from deepseek_jax.model.platform import on_cpu
from deepseek_jax.serving.assign import choose_rank
from deepseek_jax.serving.drafting import Economy, Pair
from deepseek_jax.serving.experts import Experts
from deepseek_jax.serving.flight import Flight, Record
from deepseek_jax.serving.one_device import OneDevice
from deepseek_jax.serving.options import Options
from deepseek_jax.serving.pages import PagePool
from deepseek_jax.serving.plans import answers, chunk_plan, decode_plan, put_chunk
from deepseek_jax.serving.programs import AT_ONCE
from deepseek_jax.serving.request import PromptToken, Request, Token, Update
from deepseek_jax.serving.results import asked_for, given_as_asked, prompt_tokens, token_of, up_to_the_end
from deepseek_jax.serving.routes import PageRoutes
from deepseek_jax.serving.sampler import most_of
from deepseek_jax.serving.sampling import ALL
from deepseek_jax.serving.scheduler import Scheduler
from deepseek_jax.serving.stats import Stats
from deepseek_jax.serving.steps import Chunk, Limits, Row, Running, Step
from deepseek_jax.serving.transfer.exports import export_pages
from deepseek_jax.serving.transfer.traffic import Traffic

LOOK = 0.02  # seconds between tokens that nobody minds: on a CPU, the engine looks for what is new about as often


class Engine:
    """Runs requests over a model. Not for several threads at once.

    Args:
        device: `OneDevice`, or the same over a mesh; warmed up.

    Attributes:
        version: of the weights, stamped on every token.
        schedulers: one for each rank.
        experts: those that move; None: none do.
        traffic: of pages from and to other servers.
        idle: whether the last turn found nothing to do, so that the next one will neither, unless something is asked.
    """

    def __init__(self, device: OneDevice, options: Options = Options(), version: int = 0):  # noqa: B008
        self.device, self.options, self.version = device, options, version
        sizes = device.sizes
        limits = Limits(
            rows=sizes.slots,
            budget=sizes.slots * 2 + sizes.chunks[-1][1],
            chunk=sizes.chunks[-1][1],
            max_model_len=sizes.max_model_len,
            waiting=options.waiting,
            drafts=int(device.drafts),
            reserve=options.invariant,
            whole_pages=options.invariant,
        )
        self.schedulers = [Scheduler(limits, PagePool(device.pages), version) for _ in range(device.ranks)]
        self.stats, self.traffic, self.idle = Stats(), Traffic(), False
        self._economy = Economy(device.pace, options.drafts is True) if device.drafts else None
        self.experts = None if device.slots is None else Experts(device, options)
        self._records: dict[str, Record] = {}
        self._routes = [PageRoutes() for _ in range(device.ranks)]
        self._flights: collections.deque[list[Flight]] = collections.deque()
        self._read_at: float | None = None  # the turn before, if the device went on with the next one at once
        self._ended: list[Update] = []  # without a step: aborted

    # --- what is asked ---

    @property
    def has_work(self) -> bool:
        return bool(self._records or self._flights or self._ended or self._moving)

    @property
    def _moving(self) -> bool:
        """Whether experts are on their way to where a plan has them."""
        return self.experts is not None and self.experts.left > 0

    def submit(self, request: Request) -> None:
        """Raises ValueError for what can never run, QueueFullError where the queue is full."""
        request.check(self.device.cfg.vocab_size, self.device.sizes.max_model_len)
        untold = (update.id for update in self._ended)
        require(
            request.answer is None or not self.device.drafts,
            "an answer that is given is not drafted: build the engine with drafts=False",
        )
        free = request.id not in self._records and request.id not in untold
        require(free, f"request id {request.id!r} is in use: give another")
        rank = choose_rank(self.schedulers, request)
        self._records[request.id] = Record(self.schedulers[rank].add(request), rank)

    def abort(
        self, request_id: str, reason: str = "abort", error: str | None = None, code: str | None = None
    ) -> None:
        """Ends a request, in whatever state it is; unknown ones are none. error, code: what went wrong (`Update`)."""
        record = self._records.pop(request_id, None)
        if record is not None:
            self.schedulers[record.rank].abort(request_id)
            self._ended.append(self._update(record, reason)._replace(error=error, code=code))

    def given(self, request_id: str, tokens: dict[int, PromptToken]) -> None:
        """Tokens of a prompt by their positions, as another server gives them."""
        self._records[request_id].given.update(tokens)

    def load(self, weights: Any, version: int) -> None:
        """Goes on with other weights; what was launched before is read first, and the prefix cache dropped."""
        while self._flights:
            self._ended += self._read(self._flights.popleft())
        self.device.weights, self.version = weights, version
        for scheduler in self.schedulers:
            scheduler.set_version(version)

    def close(self) -> None:
        """Ends what goes on beside."""
        try:
            if self.experts is not None:
                self.experts.close()
        finally:
            self.device.close()

    # --- a turn ---

    def step(self) -> list[Update]:
        """One turn; returns what is new of each request that has something new."""
        updates, self._ended = self._ended, []
        self.idle = not updates
        drafts = self._drafts()
        times = self._times(drafts)
        steps = [scheduler.schedule(self._budget(scheduler), drafts, times) for scheduler in self.schedulers]
        launched = self._launch(steps, drafts, times)
        if launched:
            self._flights.append(launched)
            self.stats.steps += 1
            self.stats.in_two += any(self.device.in_two(flight.program) for flight in launched)
        if self.experts is not None:
            self.experts.turn(bool(launched))
        self.idle &= not (
            launched
            or self._flights
            or self._ended
            or self._moving
            or any(s.admitted or s.preempted for s in steps)
        )
        while len(self._flights) > bool(launched):
            flights = self._flights.popleft()
            updates += self._read(flights)
            self._clock(flights)
        return updates

    def _drafts(self) -> bool:
        """Whether the decode rows of this turn have drafts."""
        rows = max(map(_decoding, self.schedulers))
        return bool(self._economy and rows and self._economy.drafts(self.device.sizes.rows_for(rows)))

    def _clock(self, flights: list[Flight]) -> None:
        """Keeps how long a turn of one program took, from the end of the one before."""
        began, self._read_at = self._read_at, time.perf_counter() if self._flights else None
        if began and self._read_at and len(flights) == 1:
            self.device.pace.took(flights[0].program, (self._read_at - began) / flights[0].times)

    def _times(self, drafts: bool) -> int:
        """How often one program runs the rows (`programs.decode_times`), no more than takes LOOK; once until it has run. Where
        times must not matter, so often that it computes AT_ONCE tokens."""
        rows = max(map(_decoding, self.schedulers))
        if not on_cpu() or not rows:
            return 1
        size = self.device.sizes.rows_for(rows)
        took = self.device.pace.of("drafts" if drafts else "decode", size)
        few = 1 if took is None else max(1, int(LOOK / max(1e-6, took)))
        if self.options.steady:
            few = max(1, AT_ONCE // size)
        tokens = min(scheduler.at_once() for scheduler in self.schedulers)
        return min(AT_ONCE, few, max(1, tokens // (1 + drafts)))

    def _budget(self, scheduler: Scheduler) -> int | None:
        """Tokens of chunks in this turn: as many as do not hold the decode rows up for long. None: no bound."""
        rows = _decoding(scheduler)
        if not rows or self.options.invariant or self.options.steady:
            return None
        sizes, pace = self.device.sizes, self.device.pace
        allowed = max(LOOK, self.options.stall * (pace.of("decode", sizes.rows_for(rows)) or 0.0))
        before = max((one.computed for one in scheduler.running if one.computed < one.until), default=0)
        fitting = [r * t for r, t in sizes.chunks if pace.chunks(r, t, before) <= allowed]
        return max(fitting, default=sizes.chunks[0][1])

    def _launch(self, steps: list[Step], drafts: bool, times: int) -> list[Flight]:
        for rank, step in enumerate(steps):
            for running in step.admitted:
                self._admit(rank, running)
            self.stats.preemptions += len(step.preempted)
        flights = []
        if any(step.rows for step in steps):
            flights.append(self._launch_rows([step.rows for step in steps], drafts, times))
        chunks = [sorted(step.chunks, key=lambda chunk: -len(chunk.tokens)) for step in steps]
        while any(chunks):
            flights.append(self._launch_chunks(chunks))
        for rank, step in enumerate(steps):
            export_pages(self.device, rank, step.chunks)
        return flights

    def _admit(self, rank: int, running: Running) -> None:
        request = running.request
        record = self._records[request.id]
        record.paged = 0
        self.device.admit(rank, running.slot, request, running.tokens[len(request.prompt) :])
        if record.queued is None:  # for the first time
            record.queued = time.monotonic() - record.asked
            self.stats.cache_queries += len(request.prompt)
            self.stats.cache_hits += running.cached_tokens

    def _launch_rows(self, ranks: list[list[Row]], drafts: bool, times: int) -> Flight:
        each = self.device.sizes.rows_for(max(map(len, ranks)))
        plan, rows = decode_plan(each * len(ranks), self.device.words), []
        for rank, decoding in enumerate(ranks):
            for i, row in enumerate(decoding, rank * each):
                running = row.running
                record = self._records[running.request.id]
                plan.slot_r[i] = running.slot
                if record.paged < len(running.pages):
                    plan.page_r[i], plan.index_r[i] = running.pages[record.paged], record.paged
                    record.paged += 1
                plan.answer_rt[i, :times] = answers(running, running.computed - times + 1, times)
                rows.append((i, row))
        name, run = ("drafts", self.device.decode_pairs) if drafts else ("decode", self.device.decode)
        drawn = run(self._masked(plan, rows), self._most(rows), times)
        return self._flight((name, each), times, rows, drawn)

    def _launch_chunks(self, ranks: list[list[Chunk]]) -> Flight:
        """The longest chunks that are left, as many as go into one program; takes them out of `ranks`."""
        sizes = self.device.sizes
        tokens = sizes.tokens_for(max(len(chunks[0].tokens) for chunks in ranks if chunks))
        alike = [sum(sizes.tokens_for(len(chunk.tokens)) == tokens for chunk in chunks) for chunks in ranks]
        each = sizes.prompts_for(max(alike), tokens)
        plan = chunk_plan(each * len(ranks), tokens, sizes.pages_each, self.device.words)
        rows = []
        for rank, chunks in enumerate(ranks):
            for i, chunk in enumerate(chunks[:each], rank * each):
                put_chunk(plan, i, chunk)
                self._records[chunk.running.request.id].paged = len(chunk.running.pages)
                rows.append((i, chunk))
            del chunks[:each]
        drawn, given = self.device.prefill(self._masked(plan, rows), self._most(rows))
        told = plan.asks_r.any() or plan.routes_r.any()
        return self._flight(("prefill", each, tokens), 1, rows, drawn, given if told else None, plan.table_rn)

    def _masked(self, plan: Any, rows: list[tuple[int, Any]]) -> Any:
        """The plan with what the grammars of its rows allow."""
        constrained = [
            (i, row.running.request)
            for i, row in rows
            if row.running.request.grammar is not None and getattr(row, "samples", True)
        ]
        if not constrained:
            return plan
        mask_rw = np.full(plan.mask_rw.shape, 2**32 - 1, np.uint32)
        for i, request in constrained:
            try:
                plan.masked_r[i], mask_rw[i] = True, request.grammar.mask()
            except (
                ValueError
            ) as error:  # it leads nowhere: the request ends, and what its row draws is dropped
                self.abort(request.id, "error", str(error))
        return plan._replace(mask_rw=mask_rw)

    def _most(self, rows: list[tuple[int, Any]]) -> int | None:
        """What the rows ask for at most; where their bits must not depend on others, all that there is."""
        if self.options.invariant and not on_cpu():
            return ALL
        return most_of(row.running.request for _, row in rows)

    def _flight(
        self,
        program: tuple[Any, ...],
        times: int,
        rows: list[tuple[int, Any]],
        drawn: Any,
        given: Any = None,
        table_rn: Any = None,
    ) -> Flight:
        requests = [row.running.request for _, row in rows]
        drawn = asked_for(drawn, requests)
        given = None if given is None else given_as_asked(given, requests)
        for x in jax.tree.leaves((drawn, given)):
            x.copy_to_host_async()
        return Flight(program, times, rows, drawn, given, self.version, table_rn)

    # --- results ---

    def _read(self, flights: Iterable[Flight]) -> list[Update]:
        """What the programs of a turn brought."""
        changed: dict[str, Record] = {}
        ended: list[Update] = []
        for flight in flights:
            drawn = jax.tree.map(np.asarray, flight.drawn)
            given = None if flight.given is None else jax.tree.map(np.asarray, flight.given)
            for i, row in flight.rows:
                running = row.running
                request = running.request
                if request.routes and isinstance(row, Chunk):  # what becomes of it: others find its pages
                    self._keep_routes(flight, i, row, given)
                record = self._records.get(request.id)
                if record is None or record.running is not running or running.epoch != row.epoch:
                    continue
                if given is not None and request.prompt_logprobs is not None:
                    record.given.update(prompt_tokens(row, given, i))
                if not getattr(row, "samples", True):
                    if request.export is not None and row.start + len(row.tokens) == request.export.end:
                        self._end(record)
                        ended.append(self._update(record, "length"))
                    continue
                if request.routes and record.routes is None:
                    first = drawn.routes_blk[i]
                    pages = self._routes[record.rank]
                    record.routes = pages.first(flight.table_rn[i], len(request.prompt) - 1, first)
                tokens, reason = up_to_the_end(running, self._tokens(row, drawn, i, flight.version))
                ids = [token.id for token in tokens]
                computed = len(row.tokens) if isinstance(row, Chunk) else max(row.times, len(ids))
                self.schedulers[record.rank].received(running, row.epoch, ids, computed)
                record.new += tokens
                self.stats.generated += len(tokens)
                if request.grammar is not None:
                    request.grammar.accept(ids[0])  # such a row drafts nothing
                if reason is None:
                    changed[request.id] = record
                    continue
                self._end(record)
                changed.pop(request.id, None)
                ended.append(self._update(record, reason))
        return [*(self._update(record) for record in changed.values()), *ended]

    def _keep_routes(self, flight: Flight, i: int, chunk: Chunk, given: Any) -> None:
        rank = i // flight.program[1]
        routes_tlk = given.routes_rtlk[i, -len(chunk.tokens) :]
        self._routes[rank].put(flight.table_rn[i], chunk.start, routes_tlk)

    def _end(self, record: Record) -> None:
        self.schedulers[record.rank].finish(record.running)
        del self._records[record.running.request.id]

    def _tokens(self, row: Any, drawn: Any, i: int, version: int) -> list[Token]:
        """What row i of a program got."""
        request = row.running.request
        if isinstance(row, Chunk):
            return [token_of(request, drawn, i, version)]
        if not isinstance(drawn, Pair):
            return [token_of(request, drawn, (n, i), version) for n in range(row.times)]
        tokens: list[Token] = []
        for n in range(row.times):
            if any(token.id in request.stop_ids for token in tokens):
                break
            drafted, accepted = int(drawn.drafted_r[n, i]), int(drawn.accepted_r[n, i])
            self.stats.drafts += drafted
            self.stats.drafted += drafted
            self.stats.accepted += accepted
            assert self._economy is not None
            self._economy.heard(drafted, accepted)
            tokens += [
                token_of(request, one, (n, i), version) for one in (drawn.one, drawn.two)[: 1 + accepted]
            ]
        return tokens

    def _update(self, record: Record, reason: str | None = None) -> Update:
        """What is new of a request since the last time."""
        new, record.new = record.new, []
        running, prompt, routes = record.running, None, None
        if not record.told_prompt and (new or reason):
            record.told_prompt, routes = True, record.routes
            self.stats.prompt += len(running.request.prompt)
            if running.request.prompt_logprobs is not None and (new or reason == "length"):
                first = PromptToken(running.request.prompt[0], None)
                prompt = [first, *(record.given[i] for i in sorted(record.given))]
        if reason is not None:
            self.stats.ended[reason] += 1
        waited = record.queued or 0.0
        at = running.request.id
        return Update(at, new, reason, running.cached_tokens, prompt, queued=waited, routes=routes)


def _decoding(scheduler: Scheduler) -> int:
    """Sequences whose prompt is computed."""
    return sum(running.computed >= running.goal for running in scheduler.running)
