"""Seconds of layers, stages and a step: arithmetic in one lane, exchanges of tokens in another, as the phases depend.

Phases of a pair of a forward and a backward, in the order in which DeepSeek's profile issues them per layer (report figure
4): combine(B), attention(F), MLP(B), dispatch(F), dispatch(B), MLP(W), MLP(F), attention(B), attention(W), combine(F). combine(B),
the gradient of a combine, is a dispatch; dispatch(B) is a combine. `segments_seconds` has this project's order.
"""

import functools
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from deepseek_jax.model_config import DTYPE_BYTES
from deepseek_jax.parallel.pipeline.ops import Op, Schedule
from deepseek_jax.parallel.pipeline.schedules import dualpipe
from deepseek_jax.parallel.pipeline.simulate import Timeline, rows, simulate
from deepseek_jax.parallel.pipeline.stages import Stage
from experiments.planning import links, work
from experiments.planning.run import MOST_PER_RANK, Run


class Times(NamedTuple):
    """Seconds of forward, gradients of inputs, gradients of weights."""

    forward: float = 0.0
    backward: float = 0.0
    weights: float = 0.0

    def plus(self, other: "Times") -> "Times":
        return Times(*map(sum, zip(self, other, strict=True)))


class Layer(NamedTuple):
    """Seconds of the phases of a layer. `again`: the backward pass begins with another forward (`remat=full`)."""

    attention: Times = Times()
    mlp: Times = Times()
    dispatch: float = 0.0
    combine: float = 0.0
    combine_gradient: float = 0.0  # a dispatch
    dispatch_gradient: float = 0.0  # a combine
    again: bool = False

    @property
    def arithmetic(self) -> float:
        """Of a forward and a backward, without what is computed again by `remat=full`."""
        return sum(self.attention) + sum(self.mlp)

    @property
    def exchange(self) -> float:
        return self.dispatch + self.combine + self.combine_gradient + self.dispatch_gradient


def _seconds(run: Run, passes: work.Passes, share: float) -> Times:
    return Times(*(share * work.seconds(w, run.hardware, run.comm_sms) for w in passes))


@functools.lru_cache(64)
def layer(run: Run, is_moe: bool, share: float = 1.0) -> Layer:
    """A layer with a `share` of a micro-batch's tokens."""
    over_tensor = share * links.seconds(run, links.divided(run))
    attention = _seconds(run, work.attention(run, is_moe), share).plus(Times(over_tensor, over_tensor))
    mlp = _seconds(run, (work.moe_mlp if is_moe else work.dense_mlp)(run), share)
    again = run.cfg.train.remat == "full"
    if not is_moe:
        return Layer(attention, mlp, again=again)
    ways = (("dispatch", False), ("combine", False), ("dispatch", True), ("combine", True))
    trips = [links.trip_seconds(run, *way, share) for way in ways]
    return Layer(attention, mlp, trips[0], trips[1], trips[2], trips[3], again)


def ends(run: Run, share: float = 1.0) -> list[Layer]:
    """What comes after the last layer: head and loss, and MTP modules with theirs, as layers."""
    head = Layer(mlp=_seconds(run, work.head(run), share))
    moe = layer(run, True, share) if run.model.num_nextn_predict_layers else Layer()
    before = _seconds(run, work.mtp_input(run), share)
    module = moe._replace(attention=moe.attention.plus(before))
    return [head, *[module, head] * run.model.num_nextn_predict_layers]


def stage_layers(run: Run, stage: Stage, share: float = 1.0) -> list[Layer]:
    """Without what comes after the last layer."""
    kinds = ((False, stage.dense), (True, stage.moe))
    return [layer(run, is_moe, share) for is_moe, which in kinds for _ in which]


# --- lanes --------------------------------------------------------------------------------------------------------


class Task(NamedTuple):
    """Something that one lane does, in the order of issue, once all of `after` are done."""

    key: Hashable
    lane: str
    seconds: float
    after: tuple[Hashable, ...] = ()


def span(tasks: Iterable[Task], overlap: bool = True) -> float:
    """Seconds until all are done; without `overlap` there is one lane."""
    free: dict[str, float] = {}
    end: dict[Hashable, float] = {}
    for t in tasks:
        lane = t.lane if overlap else ""
        start = max([free.get(lane, 0.0), *(end[key] for key in t.after if key in end)])
        end[t.key] = free[lane] = start + t.seconds
    return max(end.values(), default=0.0)


def _forward(x: Layer, way: Any, i: int) -> dict[str, Task]:
    """The phases of a forward, layer `i` of the way `way`."""
    return {
        "attention": Task((way, i, "aF"), "compute", x.attention.forward, ((way, i - 1, "cF"),)),
        "dispatch": Task((way, i, "dF"), "exchange", x.dispatch, ((way, i, "aF"),)),
        "mlp": Task((way, i, "mF"), "compute", x.mlp.forward, ((way, i, "dF"),)),
        "combine": Task((way, i, "cF"), "exchange", x.combine, ((way, i, "mF"),)),
    }


def _backward(x: Layer, way: Any, i: int, weights: bool) -> dict[str, Task]:
    """The phases of a backward, layer `i` from the end; `weights`: with their gradients."""
    w = 1.0 if weights else 0.0
    again = Task((way, i, "again"), "compute", 0.0, ((way, i - 1, "aB"),))
    if x.again:
        once_more = x.attention.forward + x.dispatch + x.mlp.forward
        again = again._replace(seconds=once_more)
    return {
        "again": again,
        "combine": Task((way, i, "cB"), "exchange", x.combine_gradient, ((way, i - 1, "aB"),)),
        "mlp": Task((way, i, "mB"), "compute", x.mlp.backward, ((way, i, "cB"), (way, i, "again"))),
        "dispatch": Task((way, i, "dB"), "exchange", x.dispatch_gradient, ((way, i, "mB"),)),
        "mlp weights": Task((way, i, "mW"), "compute", w * x.mlp.weights, ((way, i, "mB"),)),
        "attention": Task((way, i, "aB"), "compute", x.attention.backward, ((way, i, "dB"),)),
        "attention weights": Task((way, i, "aW"), "compute", w * x.attention.weights, ((way, i, "aB"),)),
    }


def forward_seconds(layers: Sequence[Layer]) -> float:
    return span(task for i, x in enumerate(layers) for task in _forward(x, "f", i).values())


def backward_seconds(layers: Sequence[Layer], weights: bool, overlap: bool) -> float:
    """From the last layer to the first. Gradients of weights run beside the exchange, if anything may."""
    tasks = [t for i, x in enumerate(reversed(layers)) for t in _backward(x, "b", i, weights).values()]
    return span(tasks, overlap)


def weights_seconds(layers: Sequence[Layer]) -> float:
    return sum(x.attention.weights + x.mlp.weights for x in layers)


def pair_seconds(forward: Sequence[Layer], backward: Sequence[Layer]) -> float:
    """A forward through some layers beside a backward through others, in the order of DeepSeek's profile."""
    tasks: list[Task] = []
    for i in range(max(len(forward), len(backward))):
        f = _forward(forward[i], "f", i) if i < len(forward) else {}
        b = _backward(backward[-1 - i], "b", i, True) if i < len(backward) else {}
        order: list[tuple[dict[str, Task], str]] = [
            *((b, "again"), (b, "combine"), (f, "attention"), (b, "mlp"), (f, "dispatch"), (b, "dispatch")),
            *((b, "mlp weights"), (f, "mlp"), (b, "attention"), (b, "attention weights"), (f, "combine")),
        ]
        tasks += [phases[name] for phases, name in order if name in phases]
    return span(tasks)


def segments_seconds(forward: Sequence[Layer], backward: Sequence[Layer]) -> float:
    """The same as `parallel/pipeline/pair.py` orders it: trips of one beside work of the other, which wait for
    each other; layers in which nothing travels, and what one side has more, alone."""
    ahead, back, total = list(forward), list(reversed(backward)), 0.0
    while ahead or back:
        travels = [bool(side) and side[0].exchange > 0 for side in (ahead, back)]
        if all(travels):
            total += _segments(ahead.pop(0), back.pop(0))
        elif ahead and not (travels[0] and back):
            total += forward_seconds([ahead.pop(0)])
        else:
            total += backward_seconds([back.pop(0)], True, False)
    return total


def _segments(f: Layer, b: Layer) -> float:
    first, again = max(f.attention.forward, b.combine_gradient), 0.0
    if b.again:
        first = max(b.attention.forward, b.combine_gradient) + max(f.attention.forward, b.dispatch)
        again = b.mlp.forward
    return (
        first
        + max(again + b.mlp.backward, f.dispatch)
        + max(b.mlp.weights + f.mlp.forward, b.dispatch_gradient)
        + max(b.attention.backward + b.attention.weights, f.combine)
    )


def halves_seconds(layers: Sequence[Layer]) -> tuple[float, float]:
    """(forward, backward) of two halves of a micro-batch in turns; `layers` of one half."""
    forward, backward = [], []
    for i, x in enumerate(layers):
        a, b = (_forward(x, half, i) for half in "ab")
        forward += [a["attention"], a["dispatch"], b["attention"], b["dispatch"]]
        forward += [a["mlp"], a["combine"], b["mlp"], b["combine"]]
    for i, x in enumerate(reversed(layers)):
        a, b = (_backward(x, half, i, True) for half in "ab")
        backward += [a["again"], a["combine"], b["again"], b["combine"]]
        for half in (a, b):
            backward += [half["mlp"], half["dispatch"], half["mlp weights"]]
        for half in (a, b):
            backward += [half["attention"], half["attention weights"]]
    return span(forward), span(backward)


# --- a step -------------------------------------------------------------------------------------------------------


class Ran(NamedTuple):
    """What the micro-batches of a step take.

    parts: mean over ranks of the seconds in "F", "B" (split ones too), "W" and "F&B". free: until the last rank is done, if
    each goes on as soon as what it needs is there. seconds: the same, if at each tick it waits for its neighbours, with
    which the executor exchanges messages whether it needs them or not. ops: mean over ranks of the number of each kind.
    """

    parts: dict[str, float]
    free: float
    seconds: float
    ops: dict[str, float]

    @property
    def bubble(self) -> float:
        """Mean over ranks of the seconds without an op that the schedule costs."""
        return self.free - sum(self.parts.values())

    @property
    def waiting(self) -> float:
        """Seconds that ticks add."""
        return self.seconds - self.free


def micro_batches(run: Run) -> Ran:
    """All micro-batches of a step, forward and backward."""
    if run.pipeline is not None:
        return _pipelined(run)
    overlap = run.comm_sms > 0
    share = 0.5 if overlap else 1.0
    layers = stage_layers(run, run.stages[0], share) + ends(run, share)
    if overlap:
        forward, backward = halves_seconds(layers)
    else:
        forward, backward = forward_seconds(layers), backward_seconds(layers, True, False)
    parts = {"F": run.micros * forward, "B": run.micros * backward}
    both = sum(parts.values())
    return Ran(parts, both, both, dict.fromkeys(parts, run.micros))


def stage_costs(run: Run) -> dict[str, Any]:
    """Costs of the pipeline's ops, as its simulator takes them, with what comes after the last layer as part of its
    backward: `parallel/pipeline/stage.py` runs forward and backward of it there."""
    layers, tail = [stage_layers(run, s) for s in run.stages], ends(run)
    end = np.zeros(len(layers))
    end[-1] = forward_seconds(tail) + backward_seconds(tail, True, False)
    split = np.array([backward_seconds(x, False, False) for x in layers]) + end
    weights = np.array([weights_seconds(x) for x in layers])
    forward = np.array([forward_seconds(x) for x in layers])
    pairs = forward[:, None] + split + weights
    if run.cfg.mesh.overlap:
        pairs = _pairs(run, layers, segments_seconds) + end
    hop = links.seconds(run, links.hop(run))
    return {"F": forward, "B": split + weights, "Bi": split, "W": weights, "F&B": pairs, "hop": hop}


def _pairs(run: Run, layers: Sequence[Sequence[Layer]], seconds: Callable[..., float]) -> np.ndarray:
    """Seconds of every pair of stages; those of stages with as many layers are alike."""
    kinds = [(len(s.dense), len(s.moe), len(x)) for s, x in zip(run.stages, layers, strict=True)]
    first = [kinds.index(kind) for kind in kinds]
    found = {(f, b): seconds(layers[f], layers[b]) for f in set(first) for b in set(first)}
    return np.array([[found[f, b] for b in first] for f in first])


def as_deepseek(run: Run) -> Ran:
    """The same as DeepSeek describes its own training: phases of a pair in the order of its profile, head and MTP modules
    as layers of the last stage, weight gradients beside the exchanges of a backward, no bound of the queue."""
    assert run.pipeline is not None
    layers = [stage_layers(run, s) + (ends(run) if s.last else []) for s in run.stages]
    costs = {
        "F": [forward_seconds(x) for x in layers],
        "B": [backward_seconds(x, True, True) for x in layers],
        "Bi": [backward_seconds(x, False, True) for x in layers],
        "W": [weights_seconds(x) for x in layers],
        "F&B": _pairs(run, layers, pair_seconds),
        "hop": links.seconds(run, links.hop(run)),
    }
    schedule = dualpipe(run.pipe, run.micros)
    return _ran(schedule, rows(schedule), costs)


def _pipelined(run: Run) -> Ran:
    """Of many micro-batches, a straight line through two smaller numbers of them, between which rounds repeat."""
    costs = stage_costs(run)
    most, fewer = (run.table(n).schedule for n in (MOST_PER_RANK, MOST_PER_RANK - 2))
    ran = _ran(most, run.ticks(MOST_PER_RANK), costs)
    more = run.micros - most.num_micro
    if not more:
        return ran
    before = _ran(fewer, run.ticks(MOST_PER_RANK - 2), costs)
    rounds = more / (most.num_micro - fewer.num_micro)

    def line(a: float, b: float) -> float:
        return b + rounds * (b - a)

    parts, ops = (
        {key: line(a[key], b[key]) for key in b}
        for a, b in ((before.parts, ran.parts), (before.ops, ran.ops))
    )
    return Ran(parts, line(before.free, ran.free), line(before.seconds, ran.seconds), ops)


def _ran(schedule: Schedule, ticks: Sequence[dict[int, Op]], costs: dict[str, Any]) -> Ran:
    free = simulate(schedule, costs)
    parts, ops = _parts(free)
    return Ran(parts, free.makespan, _in_ticks(ticks, free, costs["hop"]), ops)


def least_seconds(run: Run) -> float:
    """A bound that `micro_batches` is not below, without a simulation: the ops of the busiest rank, in pairs where there
    are two directions."""
    if run.pipeline is None:
        return micro_batches(run).seconds
    costs, schedule = stage_costs(run), run.table().schedule
    alone = costs["F"][:, None] + costs["B"]
    pairs = np.minimum(costs["F&B"], alone) if schedule.directions == 2 else alone

    def busy(rank: int) -> float:
        stages = [schedule.stage(rank, d) for d in range(schedule.directions)]
        fewest = min(schedule.micros(d) for d in range(schedule.directions)) / schedule.num_micro
        return fewest * run.micros * sum(pairs[f, b] for f, b in zip(stages, reversed(stages), strict=True))

    return max(busy(rank) for rank in range(run.pipe))


def _in_ticks(ticks: Sequence[dict[int, Op]], ran: Timeline, hop: float) -> float:
    """Seconds where each rank waits for its neighbours after each tick."""
    took = {(event.rank, event.op): event.end - event.start for event in ran.events}
    clock = np.zeros(len(ran.busy))
    for row in ticks:
        for rank, op in row.items():
            clock[rank] += took[rank, op]
        ends = np.pad(clock + hop, 1)
        clock = np.maximum(clock, np.maximum(ends[:-2], ends[2:]))
    return float(clock.max())


def _parts(ran: Timeline) -> tuple[dict[str, float], dict[str, float]]:
    """Mean per rank of the seconds in ops of each kind, and of their number."""
    seconds, count = ({"F": 0.0, "B": 0.0, "W": 0.0, "F&B": 0.0} for _ in range(2))
    for event in ran.events:
        op, share = event.op, 1 / len(ran.busy)
        kind = "F&B" if op.forward and op.backward else "F" if op.forward else "B" if op.backward else "W"
        seconds[kind] += (event.end - event.start) * share
        count[kind] += share
    return seconds, count


def optimizer(run: Run, held: float) -> float:
    """Gather before, scatter after, and the update of the `held` parameters: gradient read, master and moments read and
    written."""
    moments = 2 * DTYPE_BYTES[run.cfg.optimizer.moment_dtype]
    update = held * (4 + 2 * (4 + moments)) / (work.STREAMS * run.hardware.hbm)
    return links.zero(run).seconds + update
