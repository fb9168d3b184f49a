"""A decode unit: the engine's schedulers, one for each device that is simulated, in steps that all take together."""

from typing import NamedTuple

import numpy as np

from deepseek_jax.serving.assign import choose_rank
from deepseek_jax.serving.pages import PagePool
from deepseek_jax.serving.request import Request
from deepseek_jax.serving.router.choice import Load
from deepseek_jax.serving.scheduler import Scheduler
from deepseek_jax.serving.steps import Limits, Running
from experiments.planning.cluster.clock import Took, Work
from experiments.planning.cluster.demand import PAGE
from experiments.planning.cluster.jobs import Job
from experiments.planning.cluster.setting import SLOTS, Setting

LONGEST = 163_840


class Turn(NamedTuple):
    """Some steps that the unit did. works: of each device, in the mean of the steps. first, ended: jobs, and after how many
    steps. tokens: drawn."""

    took: Took
    steps: int
    works: list[Work]
    first: list[tuple[Job, int]]
    ended: list[tuple[Job, int]]
    tokens: int
    preempted: int


class Decode:
    """ranks: devices that are simulated.

    A chunk of a prompt that the scheduler hands out stands for its latents, which came from prefill, and for the last token,
    which is computed as one row more.
    """

    def __init__(self, setting: Setting, name: str, ranks: int, rng: np.random.Generator):
        self.setting, self.name, self.rng = setting, name, rng
        drafts = int(setting.decode.drafts)
        limits = Limits(SLOTS, 1 << 30, LONGEST, LONGEST, waiting=1 << 20, drafts=drafts)
        pages = setting.pages(setting.decode)
        self.ranks = [Scheduler(limits, PagePool(pages, PAGE)) for _ in range(ranks)]
        self.jobs: dict[str, Job] = {}
        self._first: list[tuple[Job, int]] = []
        self._ended: list[tuple[Job, int]] = []
        self._tokens = self._preempted = 0

    def add(self, job: Job) -> None:
        request = Request(job.id, job.prompt, len(job.answer))
        self.jobs[job.id] = job
        self.ranks[choose_rank(self.ranks, request)].add(request)

    @property
    def idle(self) -> bool:
        return not self.jobs

    def turn(self, steps: int) -> Turn:
        """So many steps, one after the other. Devices whose sequences neither begin nor end take several at once, as the
        scheduler allows (`at_once`), which changes nothing of what they do."""
        self._first, self._ended, self._tokens, self._preempted = [], [], 0, 0
        works = [self._rank(scheduler, steps) for scheduler in self.ranks]
        took = self.setting.decode_clock.took(works)
        return Turn(took, steps, works, self._first, self._ended, self._tokens, self._preempted)

    def _rank(self, scheduler: Scheduler, steps: int) -> Work:
        done, rows, pairs = 0, 0, 0
        while done < steps:
            each = 1 + scheduler.limits.drafts
            times = min(steps - done, max(1, scheduler.at_once() // each))
            step = scheduler.schedule(times=times)
            if not step.rows and not step.chunks:
                break
            self._preempted += len(step.preempted)
            for row in step.rows:
                pairs += times * len(row.running.tokens)
                self._draw(scheduler, row.running, row.epoch, times, done + times, True)
            for chunk in step.chunks:
                pairs += len(chunk.running.tokens)
                self._draw(scheduler, chunk.running, chunk.epoch, 1, done + 1, False)
            rows += times * len(step.rows) + len(step.chunks)
            done += times
        return Work(rows / steps, pairs / rows if rows else 0.0)

    def _draw(
        self, scheduler: Scheduler, running: Running, epoch: int, times: int, at: int, drafts: bool
    ) -> None:
        job = self.jobs[running.request.id]
        had = len(running.tokens) - len(job.prompt)
        count = times
        if drafts and scheduler.limits.drafts:
            count += int(self.rng.binomial(times, self.setting.acceptance))
        tokens = job.answer[had : had + count]
        computed = count if drafts else running.launched[0][0]
        scheduler.received(running, epoch, tokens, computed)
        self._tokens += len(tokens)
        if had == 0:
            self._first.append((job, at))
        if len(running.tokens) >= running.limit:
            scheduler.finish(running)
            self._ended.append((self.jobs.pop(job.id), at))

    def load(self) -> Load:
        """As a server says it."""
        requests = sum(len(s.running) + len(s.waiting) for s in self.ranks)
        held = sum(s.pool.held for s in self.ranks) * PAGE
        tokens = sum(s.pool.pages for s in self.ranks) * PAGE
        return Load(requests, 0, held, tokens, SLOTS * len(self.ranks))
