"""Runs a pipeline schedule: one program on all ranks, tick by tick (report section 3.2.1).

The schedule's table (`ticks.py`) says what each rank does in each tick, whom its results reach and where they wait. A
scan goes through the ticks; in each, a rank runs one of the programs that the schedule has, a branch of a switch, then
messages go to the neighbours. What waits lies in rings (`rings.py`). Programs differ by what is done (forward, backward
without or with weight gradients, weight gradients, a pair) and by the content of the stages concerned, so that no program
has a layer that it does not run. Nothing here is differentiated: `stage.py` has the gradients written out.

Dims: b sequence, t token, d hidden.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from deepseek_jax.parallel.exchange.order import after
from deepseek_jax.parallel.mesh import PIPE
from deepseek_jax.parallel.parts import plus
from deepseek_jax.parallel.pipeline.rings import Flat, Form, Ring, nothing, put, ring, take, widths
from deepseek_jax.parallel.pipeline.stage import Done, Stages
from deepseek_jax.parallel.pipeline.stages import Content
from deepseek_jax.parallel.pipeline.ticks import PROGRAMS, Table

Chunk = tuple[int, Content]  # number and content


class Program(NamedTuple):
    """A branch: the stages that it runs forward, backward, and whose queued weight gradients it makes."""

    forward: Chunk | None = None
    backward: Chunk | None = None
    weights: Chunk | None = None
    split: bool = False


class Carry(NamedTuple):
    """From tick to tick. act, grad: streams and gradients received [place, b, t, d]; saved: of forwards; queue: of split
    backwards."""

    act: jax.Array
    grad: jax.Array
    saved: Ring
    queue: Ring
    sums: "Sums"


class Sums(NamedTuple):
    """What programs add to."""

    grads: Any
    done: Done


class Found(NamedTuple):
    """What a program reads, as it waited for it: streams, what a forward kept, what a split backward left."""

    x_btd: jax.Array
    g_btd: jax.Array
    kept: Flat
    cuts: Flat


class Sent(NamedTuple):
    """What a program gives, zeros where it gives nothing: to neighbours, and to itself in a later tick."""

    act: jax.Array
    grad: jax.Array
    kept: Flat
    cuts: Flat


def programs(table: Table, held: Any) -> tuple[tuple[Program, ...], np.ndarray]:
    """The programs that a schedule needs, and which of them each rank runs in each tick, int32 [ticks, ranks]."""
    schedule, ticks = table.schedule, table.ticks
    found: dict[Program, int] = {}
    which = np.zeros_like(ticks.program)

    def stage(rank: int, direction: int) -> Chunk | None:
        if direction < 0:
            return None
        chunk = schedule.chunk(rank, direction)
        return chunk, held.content(rank, chunk)

    for at in np.ndindex(which.shape):
        rank = at[1]
        program = Program(
            stage(rank, int(ticks.forward_direction[at])),
            stage(rank, int(ticks.backward_direction[at])),
            stage(rank, int(ticks.weights_direction[at])),
            PROGRAMS[ticks.program[at]] == "Bi",
        )
        which[at] = found.setdefault(program, len(found))
    return tuple(found), which


def micro_batches(table: Table, direction: np.ndarray, micro: np.ndarray) -> np.ndarray:
    """Which micro-batch of the batch an item is: where both directions begin, direction 1 has those behind."""
    schedule = table.schedule
    behind = schedule.micros(0) if schedule.directions == 2 and not schedule.turns else 0
    return np.where(direction == 1, micro + behind, micro).astype(np.int32)


class _Ticks:
    """What passes over a schedule have in common: the table, programs and messages."""

    def __init__(self, table: Table, stages: Stages):
        self.table, self.stages, self.stream = table, stages, stages.stream
        self.programs, which = programs(table, stages.held)
        ticks = table.ticks
        self.xs = ticks._asdict() | {
            "program": which,
            "forward": micro_batches(table, ticks.forward_direction, ticks.forward_micro),
            "backward": micro_batches(table, ticks.backward_direction, ticks.backward_micro),
            "weights": micro_batches(table, ticks.weights_direction, ticks.weights_micro),
        }

    @property
    def no_stream(self) -> jax.Array:
        return jnp.zeros(self.stream.shape, self.stream.dtype)

    def streams(self, places: int) -> jax.Array:
        """An empty ring of streams."""
        return jnp.zeros((places + 1, *self.stream.shape), self.stream.dtype)

    def scan(self, carry: Any, tick: Callable[[Any, dict[str, jax.Array], Any], Any]) -> Any:
        """tick: (carry, this rank's entries of the tick, those of all ranks) -> carry."""

        def one(c: Any, row: dict[str, jax.Array]) -> tuple[Any, None]:
            return tick(c, {name: x[self.stages.rank] for name, x in row.items()}, row), None

        return lax.scan(one, carry, jax.tree.map(jnp.asarray, self.xs))[0]

    def received(
        self, name: str, into: jax.Array, o: dict[str, jax.Array], row: Any, value: jax.Array
    ) -> jax.Array:
        """A ring of streams with the messages of a tick. Where any rank receives something, all take part."""
        ranks = self.table.schedule.num_ranks
        right = [(r, r + 1) for r in range(ranks - 1)]
        ways = {"left": right, "right": [(b, a) for a, b in right], "self": None}
        for side, way in ways.items():
            key, got = f"{name}_from_{side}", value
            if (self.xs[key] < 0).all():
                continue
            if way is not None:
                got = lax.cond(
                    (row[key] >= 0).any(), lambda x, w=way: lax.ppermute(x, PIPE, w), lambda x: x, value
                )
            into = put(into, o[key], got)
        return into


class ForwardCarry(NamedTuple):
    act: jax.Array
    results: Any


class Forwards(_Ticks):
    """Forward passes alone. of(part, stream after the last layer) -> a tree [rows, ...]."""

    def __init__(self, table: Table, stages: Stages, of: Callable[[Any, jax.Array], Any]):
        super().__init__(table, stages)
        self.of = of

    def run(self) -> Any:
        """[micro-batch * rows, ...]: results of those whose last stage is here, zeros for the others."""
        index = jnp.int32(0)
        shapes = jax.eval_shape(lambda x: self.of(self.stages.batch.part(index), x), self.stream)
        n = self.table.schedule.num_micro
        results = jax.tree.map(lambda s: jnp.zeros((n * s.shape[0], *s.shape[1:]), s.dtype), shapes)
        branches = [self._branch(p.forward) for p in self.programs]

        def tick(c: ForwardCarry, o: dict[str, jax.Array], row: Any) -> ForwardCarry:
            x_btd = take(c.act, o["forward_input"])
            y_btd, results = lax.switch(o["program"], branches, x_btd, c.results, o["forward"])
            return ForwardCarry(self.received("act", c.act, o, row, y_btd), results)

        return self.scan(ForwardCarry(self.streams(self.table.rings.act), results), tick).results

    def _branch(self, chunk: Chunk | None) -> Callable[[jax.Array, Any, jax.Array], Any]:
        def run(x_btd: jax.Array, results: Any, index: jax.Array) -> tuple[jax.Array, Any]:
            if chunk is None:
                return self.no_stream, results
            y_btd, _, _ = self.stages.forward(*chunk, index, x_btd)
            if chunk[1].last:
                start = index * self.stages.batch.rows
                results = jax.tree.map(
                    lambda r, x: lax.dynamic_update_slice_in_dim(r, x, start, 0),
                    results,
                    self.of(self.stages.batch.part(index), y_btd),
                )
            return y_btd, results

        return run


class Steps(_Ticks):
    """Forward and backward passes of a step. `pairs`: layers of a pair run beside each other."""

    def __init__(self, table: Table, stages: Stages, scale: float, pairs: bool):
        super().__init__(table, stages)
        self.scale, self.pairs = scale, pairs
        self.kept, self.cuts = self._forms()
        self.saved_widths = widths(self.kept.values())
        self.queue_widths = widths(self.cuts.values()) if table.rings.queue else {}

    def _forms(self) -> tuple[dict[Chunk, Form], dict[Chunk, Form]]:
        """How what a forward keeps, and what a split backward leaves, lie in their rings, by stage."""
        kept: dict[Chunk, Form] = {}
        cuts: dict[Chunk, Form] = {}

        def run(held: Chunk, x: jax.Array, index: jax.Array) -> None:
            _, of_forward, _ = self.stages.forward(*held, index, x)
            kept[held] = Form(of_forward)
            _, cut, _, _ = self.stages.backward(*held, index, of_forward, x, self.scale)
            cuts[held] = Form(cut)

        for held in dict.fromkeys(p.forward for p in self.programs if p.forward):
            jax.eval_shape(lambda x, i, held=held: run(held, x, i), self.stream, jnp.int32(0))
        return kept, cuts

    # --- programs ---------------------------------------------------------------------------------------------------

    def _forward(
        self, sums: Sums, found: Found, o: dict[str, jax.Array], chunk: Chunk
    ) -> tuple[Sums, Any, Flat]:
        y, kept, done = self.stages.forward(*chunk, o["forward"], found.x_btd)
        return _with_done(sums, done), y, self.kept[chunk].laid_out(kept, self.saved_widths)

    def _backward(
        self, sums: Sums, found: Found, o: dict[str, jax.Array], chunk: Chunk
    ) -> tuple[Sums, jax.Array, Any]:
        kept = self.kept[chunk].read(found.kept)
        dx, cuts, dp, done = self.stages.backward(*chunk, o["backward"], kept, found.g_btd, self.scale)
        return _with_done(_with_end(sums, dp), done), dx, cuts

    def _pair(
        self, sums: Sums, found: Found, o: dict[str, jax.Array], f: Chunk, b: Chunk
    ) -> tuple[Sums, Sent]:
        forward = (*f, o["forward"], found.x_btd)
        backward = (*b, o["backward"], self.kept[b].read(found.kept), found.g_btd)
        (y, kept, done_f), (dx, dp, done_b), grads = self.stages.pair(
            forward, backward, self.scale, sums.grads
        )
        sums = self._with_weights(_with_end(_with_done(_with_done(sums, done_f), done_b), dp), grads)
        laid_out = self.kept[f].laid_out(kept, self.saved_widths)
        return sums, Sent(y, dx, laid_out, nothing(self.queue_widths))

    def _with_weights(self, sums: Sums, of: dict[Any, Any]) -> Sums:
        """With what `Stages.weights` gave."""
        grads = dict(sums.grads)
        for key, dp in of.items():
            if key == "embed":
                grads["embed"] = jax.tree.map(_add, grads["embed"], dp)
            else:
                kind, slot = key
                put_at = functools.partial(_put_at, slot)
                grads[kind] = jax.tree.map(put_at, grads[kind], dp, self.stages.added[kind])
        return sums._replace(grads=grads)

    def _branch(self, program: Program) -> Callable[[Sums, Found, Any], tuple[Sums, Sent]]:
        def run(sums: Sums, found: Found, o: dict[str, jax.Array]) -> tuple[Sums, Sent]:
            y = dx = self.no_stream
            saved, queued = nothing(self.saved_widths), nothing(self.queue_widths)
            if program.weights:
                cuts = self.cuts[program.weights].read(found.cuts)
                sums = self._with_weights(
                    sums, self.stages.weights(*program.weights, o["weights"], cuts, sums.grads)
                )
                o = self.stages.then(o, sums.grads)
            if self.pairs and program.forward and program.backward:
                return self._pair(sums, found, o, program.forward, program.backward)
            if chunk := program.backward:
                sums, dx, cuts = self._backward(sums, found, o, chunk)
                if program.split:
                    queued = self.cuts[chunk].laid_out(cuts, self.queue_widths)
                else:
                    cuts = self.stages.then(cuts, dx)
                    sums = self._with_weights(
                        sums, self.stages.weights(*chunk, o["backward"], cuts, sums.grads)
                    )
                # One after the other on CPU devices, whose exchanges must not meet.
                o = self.stages.then(after(o, dx), sums.grads)
            if program.forward:
                sums, y, saved = self._forward(sums, found, o, program.forward)
            return sums, Sent(y, dx, saved, queued)

        return run

    # --- ticks ------------------------------------------------------------------------------------------------------

    def _tick(self, branches: list[Any], c: Carry, o: dict[str, jax.Array], row: Any) -> Carry:
        """What is large and only waits does not go through the switch: XLA for CPUs copies all that does."""
        found = Found(
            take(c.act, o["forward_input"]),
            take(c.grad, o["backward_grad"]),
            take(c.saved, o["backward_saved"]),
            take(c.queue, o["weights_queue"]),
        )
        sums, sent = lax.switch(o["program"], branches, c.sums, found, o)
        act = self.received("act", c.act, o, row, sent.act)
        grad = self.received("grad", c.grad, o, row, after(sent.grad, act))  # in order on CPU devices
        saved, queue = (
            put(c.saved, o["forward_saved"], sent.kept),
            put(c.queue, o["backward_queue"], sent.cuts),
        )
        return Carry(act, grad, saved, queue, sums)

    def run(self) -> Sums:
        """Of this rank; gradients in float32, as the parameters were gathered."""
        rings, stages = self.table.rings, self.stages
        grads = jax.tree.map(lambda w: jnp.zeros(w.shape, jnp.float32), stages.gathered.params)
        start = Carry(
            self.streams(rings.act),
            self.streams(rings.grad),
            ring(rings.saved, self.saved_widths),
            ring(rings.queue, self.queue_widths),
            Sums(grads, stages.nothing),
        )
        branches = [self._branch(program) for program in self.programs]
        end = self.scan(start, functools.partial(self._tick, branches))
        return end.sums


# --- sums -----------------------------------------------------------------------------------------------------------


def _with_done(sums: Sums, done: Done) -> Sums:
    return sums._replace(done=plus(sums.done, done))


def _with_end(sums: Sums, dp: Any) -> Sums:
    """With gradients of the parameters outside of the layers, if there are any."""
    of_end = {name: jax.tree.map(_add, sums.grads[name], of) for name, of in (dp or {}).items()}
    return sums._replace(grads=sums.grads | of_end)


def _put_at(slot: int, sum_: jax.Array, g: jax.Array, added: bool) -> jax.Array:
    """A sum with a gradient, or that is `added` already. Not a scatter, which adds in any order on GPUs."""
    return lax.dynamic_update_index_in_dim(sum_, g if added else _add(sum_[slot], g), slot, 0)


def _add(sum_: jax.Array, g: jax.Array) -> jax.Array:
    return sum_ + g.astype(sum_.dtype)
