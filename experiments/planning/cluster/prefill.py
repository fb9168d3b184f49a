"""A prefill unit: the engine's schedulers, one for each device that is simulated, in steps that all take together."""

from collections import deque
from collections.abc import Iterator

from deepseek_jax.serving.assign import choose_rank
from deepseek_jax.serving.pages import PagePool
from deepseek_jax.serving.request import Request
from deepseek_jax.serving.router.choice import Load
from deepseek_jax.serving.scheduler import Scheduler
from deepseek_jax.serving.steps import Chunk, Limits, Step
from experiments.planning.cluster.clock import Took, Work
from experiments.planning.cluster.demand import PAGE
from experiments.planning.cluster.disk import Disk, store
from experiments.planning.cluster.jobs import Job
from experiments.planning.cluster.setting import Setting

PROMPTS = 256  # that have a slot of a device: so many that tokens, not requests, are what the assignment of ranks evens out
LONGEST = 163_840


class Prefill:
    """Who computes a prompt is decided when it comes, by the engine's `choose_rank`; or, `balanced`, when a step begins, as
    DeepSeek says of its prefill: so that all have as much attention, and as many tokens, to compute.

    ranks: devices that are simulated. works: what each has in the step that runs. `step` launches what waits; `finish` takes its results when its time is over."""

    def __init__(self, setting: Setting, name: str, ranks: int, disk: Disk):
        self.setting, self.name, self.disk = setting, name, disk
        limits = Limits(PROMPTS, setting.budget, setting.budget, LONGEST, waiting=1 << 20)
        pages = setting.pages(setting.prefill)
        self.ranks = [Scheduler(limits, PagePool(pages, PAGE)) for _ in range(ranks)]
        self.jobs: dict[str, Job] = {}
        self.works: list[Work] = []
        self._queue: deque[Job] = deque()
        self._steps: list[Step] = []

    def add(self, job: Job) -> None:
        self.jobs[job.id] = job
        if self.setting.balanced:
            self._queue.append(job)
        else:
            self._give(job, choose_rank(self.ranks, Request(job.id, job.prompt, 1)))

    def _give(self, job: Job, rank: int) -> None:
        """The pages of its prompt that the disk has are read into the device that computes it."""
        pool = self.ranks[rank].pool
        store(pool, job.keys[: self.disk.found(job.keys[: (len(job.prompt) - 1) // PAGE])])
        self.ranks[rank].add(Request(job.id, job.prompt, 1))

    def _spread(self) -> None:
        """Gives the prompts that fit the next step to devices, those with the most work first, each to the one that has the
        least to do of those that have room."""
        budget = self.setting.budget
        loads = [self._next(scheduler) for scheduler in self.ranks]
        free, taken = sum(max(0, budget - count) for _, count in loads), []
        while self._queue and free > 0:
            job = self._queue.popleft()
            start = PAGE * self.disk.found(job.keys[: (len(job.prompt) - 1) // PAGE])
            count = min(budget, len(job.prompt) - start)
            taken.append((self._own(count, start), count, job))
            free -= count
        for seconds, count, job in sorted(taken, key=lambda x: -x[0]):
            rank = min(range(len(loads)), key=lambda i: (loads[i][1] >= budget, loads[i][0]))
            loads[rank] = loads[rank][0] + seconds, loads[rank][1] + count
            self._give(job, rank)

    def _next(self, scheduler: Scheduler) -> tuple[float, int]:
        """Seconds of its own work and tokens that a device has for the next step."""
        seconds, left = 0.0, self.setting.budget
        for running in (*scheduler.running, *scheduler.waiting):
            count = min(left, len(running.tokens) - running.computed)
            seconds, left = seconds + self._own(count, running.computed), left - count
        return seconds, self.setting.budget - left

    def _own(self, count: int, start: int) -> float:
        """Seconds of a device's own work on so many tokens behind `start`: a line."""
        token, pair = self.setting.prefill_clock.line
        return count * token + count * (start + count / 2) * pair

    def step(self, now: float) -> Took | None:
        """None: there is nothing to compute."""
        self._spread()
        self._steps = [scheduler.schedule() for scheduler in self.ranks]
        for step in self._steps:
            for running in step.admitted:
                job = self.jobs[running.request.id]
                job.queued, job.cached = now, running.cached_tokens
        self.works = [_work(step.chunks) for step in self._steps]
        if not any(work.amount for work in self.works):
            return None
        return self.setting.prefill_clock.took(self.works)

    def finish(self) -> Iterator[tuple[Job, int]]:
        """The prompts that are computed now, and the tokens of their last chunks."""
        for scheduler, step in zip(self.ranks, self._steps, strict=True):
            for chunk in step.chunks:
                drawn = [0] * chunk.samples
                scheduler.received(chunk.running, chunk.epoch, drawn, len(chunk.tokens))
                if chunk.samples:
                    scheduler.finish(chunk.running)
                    job = self.jobs.pop(chunk.running.request.id)
                    self.disk.put(job.keys)
                    yield job, len(chunk.tokens)

    def load(self) -> Load:
        """As a server says it."""
        known = [r for s in self.ranks for r in (*s.running, *s.waiting)]
        queued = sum(len(r.tokens) - r.computed for r in known) + sum(len(j.prompt) for j in self._queue)
        held = sum(s.pool.held for s in self.ranks) * PAGE
        tokens = sum(s.pool.pages for s in self.ranks) * PAGE
        return Load(len(self.jobs), queued, held, tokens, PROMPTS * len(self.ranks))


def _work(chunks: list[Chunk]) -> Work:
    count = sum(len(chunk.tokens) for chunk in chunks)
    pairs = sum(len(chunk.tokens) * (chunk.start + len(chunk.tokens) / 2) for chunk in chunks)
    return Work(count, pairs / count if count else 0.0)
