"""A function's backward pass in two: gradients of its inputs first, gradients of its weights whenever there is time.

`split` traces forward and backward pass as `jax.vjp` makes them, with all calls taken apart, and divides the equations:

    forward     what the results need -> `saved`, what `jax.vjp` keeps, but for what parameters and constants determine
    backward    what the gradients of the inputs need -> `cut`
    weights     what is left for the gradients of the parameters

No equation is done twice, but those that parameters and constants alone determine (a cast or a slice of a weight) and
light ones: copies, casts, and in `weights` also arithmetic of elements, sums and rows taken by index, where that hands
over fewer bytes (`cut.py`). For the same reason the gradient of a norm's scale, a sum, is part of `backward`. Scans,
loops and branches stay whole; one that gives both gradients is part of `backward`.

The parts are traced once (`traced.py`), however often they are called. What a program consists of is read in these two
files, and nowhere else, from JAX's own representation.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import Literal, Var

from deepseek_jax.parallel.pipeline.cut import fewest_bytes
from deepseek_jax.parallel.pipeline.traced import traced_once

Arrays = tuple[jax.Array, ...]


def _names(names: str) -> frozenset[str]:
    return frozenset(names.split())


# Primitives, by name.
CALLS = _names("jit pjit closed_call core_call custom_vjp_call custom_jvp_call checkpoint remat2")
COPIES = _names(
    "reshape transpose squeeze expand_dims broadcast_in_dim convert_element_type bitcast_convert_type slice split rev "
    "pad concatenate stack unstack tile copy copy_p name stop_gradient reduce_precision optimization_barrier"
)
ELEMENTWISE = _names(
    "add add_any sub mul div rem neg abs sign floor ceil round exp exp2 log log1p expm1 logistic tanh sin cos sqrt rsqrt cbrt "
    "pow integer_pow square max min clamp select_n eq ne lt le gt ge lt_to le_to and or not xor is_finite shift_left "
    "shift_right_logical shift_right_arithmetic"
)
LIGHT = COPIES | ELEMENTWISE | _names("gather dynamic_slice reduce_sum reduce_max")


class Split(NamedTuple):
    """A function and its gradients, apart.

    forward: (p, hand, x) -> (out, saved)
    backward: (p, hand, saved, g) -> (dx, cut); g like out, of which integer leaves are not read
    weights: (p, hand, cut) -> dp
    saved, cut: shapes and dtypes of what is kept in between. dx and dp have None in the place of integers. What is saved
    and is a leaf of x or out besides is the same object. out: shapes and dtypes of the result.
    """

    forward: Callable[[Any, Any, Any], tuple[Any, Arrays]]
    backward: Callable[[Any, Any, Arrays, Any], tuple[Any, Arrays]]
    weights: Callable[[Any, Any, Arrays], Any]
    saved: tuple[jax.ShapeDtypeStruct, ...]
    cut: tuple[jax.ShapeDtypeStruct, ...]
    out: Any


# --- programs -----------------------------------------------------------------------------------------------------


class Step(NamedTuple):
    """An equation, or what it does with one operand where each has a result of its own."""

    equation: Any
    reads: tuple[Any, ...]
    makes: tuple[Var, ...]

    @property
    def name(self) -> str:
        return self.equation.primitive.name


def _steps(jaxpr: Any) -> list[Step]:
    steps = []
    for e in jaxpr.eqns:
        if e.primitive.name == "optimization_barrier":
            steps += [Step(e, (v,), (w,)) for v, w in zip(e.invars, e.outvars, strict=True)]
        else:
            steps.append(Step(e, tuple(e.invars), tuple(e.outvars)))
    return steps


def _inner(equation: Any) -> tuple[list[Var], Any, Sequence[Any]] | None:
    """(variables of constants and arguments, program, constants) of a call."""
    if equation.primitive.name not in CALLS:
        return None
    inner = equation.params.get("jaxpr", equation.params.get("call_jaxpr"))
    jaxpr = getattr(inner, "jaxpr", inner)
    return [*jaxpr.constvars, *jaxpr.invars], jaxpr, getattr(inner, "consts", ())


def _do(equation: Any, args: Sequence[Any]) -> Sequence[Any]:
    """An equation's results. A barrier may come with some of its operands."""
    with equation.ctx.manager, _scope(str(equation.source_info.name_stack)):
        out = equation.primitive.bind(*args, **equation.primitive.get_bind_params(equation.params))
    return out if equation.primitive.multiple_results else [out]


def _scope(name: str) -> contextlib.AbstractContextManager[Any]:
    return jax.named_scope(name) if name else contextlib.nullcontext()


def _read(v: Any, values: dict[Var, Any]) -> Any:
    return v.val if isinstance(v, Literal) else values[v]


def _taken_apart(variables: list[Var], jaxpr: Any, args: Iterable[Any]) -> list[Any]:
    """The results of a program, calls done equation by equation."""
    values = dict(zip(variables, args, strict=True))
    for e in jaxpr.eqns:
        read, inner = [_read(v, values) for v in e.invars], _inner(e)
        if inner is None:
            out = _do(e, read)
        else:
            variables, program, consts = inner
            if e.params.get("differentiated"):  # recomputation, which is not to begin before it is needed
                read = lax.optimization_barrier(read)
            name = f"{e.primitive.name}({e.params['name']})" if "name" in e.params else ""
            with _scope(str(e.source_info.name_stack)), _scope(name):
                out = _taken_apart(variables, program, [*consts, *read])
        values.update(zip(e.outvars, out, strict=True))
    return [_read(v, values) for v in jaxpr.outvars]


def _run(steps: Iterable[Step], values: dict[Var, Any]) -> None:
    """Adds to `values` what the steps make."""
    for _, group in itertools.groupby(steps, lambda step: id(step.equation)):
        whole = list(group)
        out = _do(whole[0].equation, [_read(v, values) for step in whole for v in step.reads])
        values.update(zip((v for step in whole for v in step.makes), out, strict=True))


def _needed(steps: Sequence[Step], results: Iterable[Any], given: Iterable[Var]) -> list[Step]:
    """Those of the steps that make `results` out of what is given."""
    given = set(given)
    wanted = {v for v in results if not isinstance(v, Literal)} - given
    kept = []
    for step in reversed(steps):
        if not wanted.isdisjoint(step.makes):
            kept.append(step)
            wanted |= _values(step.reads) - given
    return kept[::-1]


def _values(atoms: Iterable[Any]) -> set[Var]:
    return {v for v in atoms if not isinstance(v, Literal)}


def _determined(steps: Iterable[Step], given: Iterable[Var]) -> set[Var]:
    """`given`, and what follows from it alone."""
    known = set(given)
    for step in steps:
        if _values(step.reads) <= known:
            known |= set(step.makes)
    return known


# --- both passes --------------------------------------------------------------------------------------------------


def _is_float(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jnp.inexact)


def _floats(tree: Any) -> Any:
    """None in the place of integers."""
    return jax.tree.map(lambda x: x if _is_float(x) else None, tree)


def _filled(floats: Any, tree: Any) -> Any:
    """The inverse: the other leaves are those of `tree`."""
    return jax.tree.map(lambda f, x: x if f is None else f, floats, tree, is_leaf=lambda x: x is None)


class _Passes(NamedTuple):
    """Forward and backward pass as one program: steps, constants, arguments and results; and trees of the results.

    kept: what `jax.vjp` keeps of the forward pass for the backward pass.
    """

    steps: list[Step]
    consts: dict[Var, Any]
    p: list[Var]
    hand: list[Var]
    x: list[Var]
    g: list[Var]
    out: list[Any]
    kept: list[Any]
    dx: list[Any]
    dp: list[Any]
    out_shape: Any
    dx_tree: Any
    dp_tree: Any


def _cotangents(out: Any, g: Sequence[Any]) -> Any:
    """g of the float leaves of `out`, and none of the others."""
    there = iter(g)
    return jax.tree.map(lambda o: next(there) if _is_float(o) else np.zeros(o.shape, jax.dtypes.float0), out)


def _passes(fn: Callable[..., Any], p: Any, hand: Any, x: Any) -> _Passes:
    out_shape = jax.eval_shape(fn, p, hand, x)

    def both(p: Any, hand: Any, x: Any, g: list[Any]) -> Any:
        out, vjp = jax.vjp(lambda pf, xf: fn(_filled(pf, p), hand, _filled(xf, x)), _floats(p), _floats(x))
        kept = [leaf for leaf in jax.tree.leaves(vjp) if isinstance(leaf, jax.core.Tracer)]
        dp, dx = vjp(_cotangents(out, g))
        return out, kept, dx, dp

    args = (p, hand, x, jax.tree.leaves(_floats(out_shape)))
    calls, shapes = jax.make_jaxpr(both, return_shape=True)(*args)
    variables = [*calls.jaxpr.constvars, *calls.jaxpr.invars]
    whole = jax.make_jaxpr(lambda *a: _taken_apart(variables, calls.jaxpr, [*calls.consts, *a]))(
        *jax.tree.leaves(args)
    )
    jaxpr = whole.jaxpr
    ins, outs = _sections(jaxpr.invars, args), _sections(jaxpr.outvars, shapes)
    consts = dict(zip(jaxpr.constvars, whole.consts, strict=True))
    dx_tree, dp_tree = map(jax.tree.structure, shapes[2:])
    return _Passes._make([_steps(jaxpr), consts, *ins, *outs, out_shape, dx_tree, dp_tree])


def _sections(flat: Sequence[Any], trees: Iterable[Any]) -> list[list[Any]]:
    rest = iter(flat)
    return [list(itertools.islice(rest, len(jax.tree.leaves(tree)))) for tree in trees]


# --- the division -------------------------------------------------------------------------------------------------


def _handed_over(
    steps: list[Step], light: frozenset[str], made: set[Var], wanted: set[Var], free: set[Var]
) -> list[Var]:
    """The fewest bytes that give `wanted` to a later part: of what is `made`, and what light steps make of it. The later
    part has what is free."""
    again = [(_values(step.reads) - free, step.makes) for step in steps if step.name in light]
    there = _determined((step for step in steps if step.name in light), made | free) - free
    values = dict.fromkeys(
        v for step in steps for v in (*step.reads, *step.makes) if not isinstance(v, Literal)
    )
    values |= dict.fromkeys(wanted)
    sizes = {v: v.aval.size * v.aval.dtype.itemsize for v in values if v in there}
    return fewest_bytes(sizes, again, made - free, wanted - free)


def _makes(steps: Iterable[Step], but: frozenset[str]) -> set[Var]:
    return {v for step in steps if step.name not in but for v in step.makes}


def _reads(steps: Iterable[Step]) -> set[Var]:
    return {v for step in steps for v in _values(step.reads)}


class _Parts(NamedTuple):
    """The steps of each part and what is handed over."""

    forward: list[Step]
    saved: list[Var]
    backward: list[Step]
    cut: list[Var]
    weights: list[Step]


def _divided(t: _Passes) -> _Parts:
    at_hand = [*t.consts, *t.p, *t.hand]
    free = _determined(t.steps, at_hand)
    # Forward: what is kept, where the backward pass reads it.
    first = _needed(t.steps, t.out + t.kept, [])
    before = _makes(first, frozenset()) | set(t.x)
    rest = _needed(t.steps, t.dx + t.dp, before)
    read = (_reads(rest) | _values(t.dx + t.dp)) & before
    saved = _handed_over(first, COPIES, _makes(first, COPIES) | set(t.x), read, free)
    # Backward: weight gradients from what the input gradients have made.
    given = [*at_hand, *saved, *t.g]
    both = _needed(t.steps, t.dx + t.dp, given)
    for_x = _needed(t.steps, t.dx, given)
    early = {id(step) for step in for_x}
    late = [step for step in both if id(step) not in early and step.name not in LIGHT]
    made = _makes(for_x, LIGHT) | {*saved, *t.g}
    cut = _handed_over(both, LIGHT, made, _reads(late) | _values(t.dp), free)
    return _Parts(
        _needed(t.steps, t.out + saved, [*at_hand, *t.x]),
        saved,
        _needed(t.steps, t.dx + cut, given),
        cut,
        _needed(t.steps, t.dp, [*at_hand, *cut]),
    )


def split(fn: Callable[..., Any], p: Any, hand: Any, x: Any) -> Split:
    """fn(p, hand, x) -> out, and its gradients for the float leaves of x and p, apart.

    Arguments and results are trees of arrays, or of `jax.ShapeDtypeStruct`; inside `shard_map`, to be called there.
    `hand`, like p, is at hand whenever a part is called, and not differentiated. What `fn` closes over counts as `hand`.
    """
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), (p, hand, x))
    t = _passes(fn, *shapes)
    parts = _divided(t)

    def start(p: Any, hand: Any) -> dict[Var, Any]:
        at_hand = (*_like(shapes[0], p), *_like(shapes[1], hand))
        return t.consts | dict(zip([*t.p, *t.hand], at_hand, strict=True))

    place = {v: i for i, v in enumerate([*t.x, *t.out]) if not isinstance(v, Literal)}

    @traced_once
    def results(p: Any, hand: Any, x: Any) -> tuple[Any, Arrays]:
        values = start(p, hand) | dict(zip(t.x, _like(shapes[2], x), strict=True))
        _run(parts.forward, values)
        out = jax.tree.unflatten(jax.tree.structure(t.out_shape), _arrays(t.out, values))
        return out, _arrays((v for v in parts.saved if v not in place), values)

    def forward(p: Any, hand: Any, x: Any) -> tuple[Any, Arrays]:
        out, new = results(p, hand, x)
        there, fresh = [*jax.tree.leaves(x), *jax.tree.leaves(out)], iter(new)
        return out, tuple(there[place[v]] if v in place else next(fresh) for v in parts.saved)

    @traced_once
    def backward(p: Any, hand: Any, saved: Arrays, g: Any) -> tuple[Any, Arrays]:
        pairs = zip(_like(t.out_shape, g), jax.tree.leaves(t.out_shape), strict=True)
        g_floats = [leaf for leaf, shape in pairs if _is_float(shape)]
        values = start(p, hand) | dict(zip(parts.saved, saved, strict=True))
        values |= dict(zip(t.g, g_floats, strict=True))
        _run(parts.backward, values)
        return jax.tree.unflatten(t.dx_tree, _arrays(t.dx, values)), _arrays(parts.cut, values)

    @traced_once
    def weights(p: Any, hand: Any, cut: Arrays) -> Any:
        values = start(p, hand) | dict(zip(parts.cut, cut, strict=True))
        _run(parts.weights, values)
        return jax.tree.unflatten(t.dp_tree, _arrays(t.dp, values))

    saved, cut = (tuple(_shape(v) for v in vs) for vs in (parts.saved, parts.cut))
    return Split(forward, backward, weights, saved, cut, t.out_shape)


def _like(shapes: Any, tree: Any) -> list[Any]:
    """The leaves of `tree` in the places of those of `shapes`; None may stand for one that is not there."""
    structure: Any = jax.tree.structure(shapes)
    return structure.flatten_up_to(tree)


def _shape(v: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype)


def _arrays(atoms: Iterable[Any], values: dict[Var, Any]) -> Arrays:
    """What is one value stays one object."""
    return tuple(jnp.asarray(v.val, _shape(v).dtype) if isinstance(v, Literal) else values[v] for v in atoms)
