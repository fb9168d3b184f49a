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
from deepseek_jax.parallel.pipeline.rings import Form, Ring, ring
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
    """From tick to tick. act, grad: streams and gradients received; saved: of forwards; queue: of split backwards."""

    act: Ring
    grad: Ring
    saved: Ring
    queue: Ring
    grads: Any
    done: Done


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
        self.stream_form = Form(self.stream)
        self.programs, which = programs(table, stages.held)
        ticks = table.ticks
        self.xs = ticks._asdict() | {
            "program": which,
            "forward": micro_batches(table, ticks.forward_direction, ticks.forward_micro),
            "backward": micro_batches(table, ticks.backward_direction, ticks.backward_micro),
            "weights": micro_batches(table, ticks.weights_direction, ticks.weights_micro),
        }

    def streams(self, places: int) -> Ring:
        """An empty ring of streams, with one place more for what nobody wants."""
        return ring(places + 1, [self.stream_form])

    def read_input(self, act: Ring, o: dict[str, jax.Array], held: Chunk) -> Any:
        return None if held[1].first else self.stream_form.read(act, o["forward_input"])

    def scan(self, carry: Any, branches: list[Callable[[Any, Any], Any]]) -> Any:
        """branch: (carry, this rank's entries of the tick) -> (carry, results by ring: "act", "grad")."""

        def tick(c: Any, row: dict[str, jax.Array]) -> tuple[Any, None]:
            o = {name: x[self.stages.rank] for name, x in row.items()}
            c, sent = lax.switch(o["program"], branches, c, o)
            before: Ring = {}
            for name, value in sent.items():
                value = after(value, before) if before else value  # one after the other on CPU devices
                before = self._received(name, getattr(c, name), o, row, value)
                c = c._replace(**{name: before})
            return c, None

        return lax.scan(tick, carry, jax.tree.map(jnp.asarray, self.xs))[0]

    def _received(self, name: str, into: Ring, o: dict[str, jax.Array], row: Any, value: jax.Array) -> Ring:
        ranks = self.table.schedule.num_ranks
        right = [(r, r + 1) for r in range(ranks - 1)]
        ways = {"left": right, "right": [(b, a) for a, b in right], "self": None}
        for side, way in ways.items():
            key = f"{name}_from_{side}"
            if (self.xs[key] >= 0).any():
                into = self._message(into, o[key], row[key], value, way)
        return into

    def _message(self, into: Ring, place: jax.Array, row: jax.Array, value: jax.Array, way: Any) -> Ring:
        """Where any rank of the row receives something, all take part; the last place takes what nobody wants."""
        if way is not None:
            value = lax.cond((row >= 0).any(), lambda x: lax.ppermute(x, PIPE, way), lambda x: x, value)
        last = next(iter(into.values())).shape[0] - 1
        return self.stream_form.write(into, jnp.where(place < 0, last, place), value)


class ForwardCarry(NamedTuple):
    act: Ring
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
        carry = ForwardCarry(self.streams(self.table.rings.act), results)
        return self.scan(carry, [self._branch(p.forward) for p in self.programs]).results

    def _branch(self, held: Chunk | None) -> Callable[[ForwardCarry, Any], Any]:
        def run(c: ForwardCarry, o: dict[str, jax.Array]) -> Any:
            if held is None:
                return c, {"act": jnp.zeros(self.stream.shape, self.stream.dtype)}
            y, _, _ = self.stages.forward(*held, o["forward"], self.read_input(c.act, o, held))
            if held[1].last:
                of = self.of(self.stages.batch.part(o["forward"]), y)
                rows = self.stages.batch.rows
                put = lambda r, x: lax.dynamic_update_slice_in_dim(r, x, o["forward"] * rows, 0)  # noqa: E731
                c = c._replace(results=jax.tree.map(put, c.results, of))
            return c, {"act": y}

        return run


class Steps(_Ticks):
    """Forward and backward passes of a step. `pairs`: layers of a pair run beside each other."""

    def __init__(self, table: Table, stages: Stages, scale: float, pairs: bool):
        super().__init__(table, stages)
        self.scale, self.pairs = scale, pairs
        self.kept, self.cuts = self._forms()

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

    def _gradient(self, c: Carry, o: dict[str, jax.Array], held: Chunk) -> Any:
        return None if held[1].last else self.stream_form.read(c.grad, o["backward_grad"])

    def _forward(self, c: Carry, o: dict[str, jax.Array], held: Chunk) -> tuple[Carry, jax.Array]:
        y, kept, done = self.stages.forward(*held, o["forward"], self.read_input(c.act, o, held))
        return self._saved(c, o, held, kept, done), y

    def _saved(self, c: Carry, o: dict[str, jax.Array], held: Chunk, kept: Any, done: Done) -> Carry:
        saved = self.kept[held].write(c.saved, o["forward_saved"], kept)
        return c._replace(saved=saved, done=jax.tree.map(jnp.add, c.done, done))

    def _backward(
        self, c: Carry, o: dict[str, jax.Array], held: Chunk, split: bool
    ) -> tuple[Carry, jax.Array]:
        kept, g = self.kept[held].read(c.saved, o["backward_saved"]), self._gradient(c, o, held)
        dx, cuts, dp, done = self.stages.backward(*held, o["backward"], kept, g, self.scale)
        c = c._replace(grads=self._with_end(c.grads, dp), done=jax.tree.map(jnp.add, c.done, done))
        if split:
            c = c._replace(queue=self.cuts[held].write(c.queue, o["backward_queue"], cuts))
        else:
            c = self._added(c, self.stages.weights(*held, o["backward"], self.stages.then(cuts, dx)))
        return c, dx

    def _weights(self, c: Carry, o: dict[str, jax.Array], held: Chunk) -> Carry:
        cuts = self.cuts[held].read(c.queue, o["weights_queue"])
        return self._added(c, self.stages.weights(*held, o["weights"], cuts))

    def _pair(self, c: Carry, o: dict[str, jax.Array], f: Chunk, b: Chunk) -> Any:
        kept = self.kept[b].read(c.saved, o["backward_saved"])
        forward = (*f, o["forward"], self.read_input(c.act, o, f))
        backward = (*b, o["backward"], kept, self._gradient(c, o, b))
        (y, kept_f, done_f), (dx, dp, done_b), grads = self.stages.pair(forward, backward, self.scale)
        c = self._saved(c, o, f, kept_f, jax.tree.map(jnp.add, done_f, done_b))
        return self._added(c._replace(grads=self._with_end(c.grads, dp)), grads), {"act": y, "grad": dx}

    @staticmethod
    def _with_end(grads: Any, dp: Any) -> Any:
        """With gradients of the parameters outside of the layers added."""
        if dp is None:
            return grads
        return grads | {name: jax.tree.map(_add, grads[name], of) for name, of in dp.items()}

    def _added(self, c: Carry, of: dict[Any, Any]) -> Carry:
        """With weight gradients of `Stages.weights` added."""
        grads = dict(c.grads)
        for key, dp in of.items():
            if key == "embed":
                grads["embed"] = jax.tree.map(_add, grads["embed"], dp)
                continue
            kind, slot = key
            grads[kind] = jax.tree.map(functools.partial(_add_at, slot), grads[kind], dp)
        return c._replace(grads=grads)

    def _branch(self, program: Program) -> Callable[[Carry, Any], Any]:
        nothing = jnp.zeros(self.stream.shape, self.stream.dtype)

        def run(c: Carry, o: dict[str, jax.Array]) -> tuple[Carry, dict[str, jax.Array]]:
            y = dx = nothing
            if program.weights:
                c = self._weights(c, o, program.weights)
                o = self.stages.then(o, c.grads)
            if self.pairs and program.forward and program.backward:
                return self._pair(c, o, program.forward, program.backward)
            if program.backward:
                c, dx = self._backward(c, o, program.backward, program.split)
                # One after the other on CPU devices, whose exchanges must not meet.
                o = self.stages.then(after(o, dx), c.grads)
            if program.forward:
                c, y = self._forward(c, o, program.forward)
            return c, {"act": y, "grad": dx}

        return run

    def run(self) -> tuple[Any, Done]:
        """(float32 sums of gradients, as the parameters were gathered; `Done`): of this rank."""
        rings, stages = self.table.rings, self.stages
        grads = jax.tree.map(lambda w: jnp.zeros(w.shape, jnp.float32), stages.gathered.params)
        saved, queue = (
            ring(rings.saved, list(self.kept.values())),
            ring(rings.queue, list(self.cuts.values())),
        )
        start = Carry(self.streams(rings.act), self.streams(rings.grad), saved, queue, grads, stages.nothing)
        end = self.scan(start, [self._branch(program) for program in self.programs])
        return end.grads, end.done


def _add_at(slot: int, sum_: jax.Array, g: jax.Array) -> jax.Array:
    """Not a scatter, which adds in any order on GPUs."""
    return lax.dynamic_update_index_in_dim(sum_, _add(sum_[slot], g), slot, 0)


def _add(sum_: jax.Array, g: jax.Array) -> jax.Array:
    return sum_ + g.astype(sum_.dtype)
