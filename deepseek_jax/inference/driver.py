"""The one loop of generation, for plain and speculative decoding, on one device and over a mesh.

A method brings three compiled programs: the prefill, which chooses each row's first token; the cache's growth; and the
decoding loop, which runs some steps and hands its state back. Between these the host looks: it shows what came out,
ends rows at stop strings, and notices Ctrl-C. Where the loop is cut changes no token.

On a CPU the loop is part of the program, and ends when all rows are done. On GPUs the host would have to wait, in each
turn, to see whether there is another: there the program is one step, and the host launches as many as it wants before the
next look, without waiting. When all rows are done meanwhile, the rest of them, less than PATIENCE, are for nothing.
"""

import functools
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from deepseek_jax import now
from deepseek_jax.config import ModelConfig
from deepseek_jax.inference.batch import (
    Batch,
    Completion,
    Output,
    Prompts,
    Request,
    completions,
    make_batch,
    pad_prompts,
    slots_for,
)
from deepseek_jax.model.decoding import decoding_config, on_cpu, prepare, room

PATIENCE = 0.1  # seconds between two looks of the host, about


class State(NamedTuple):
    """What a step changes. token_b: the row's last token, not yet in the cache; extra: the method's own.

    cache: before `Method.grow` the latents of the prompts, `cache.LatentCache`, then what decoding appends to.
    """

    out: Output
    token_b: jax.Array
    cache: Any
    extra: Any
    steps: jax.Array  # int32 []: steps run


class Method(NamedTuple):
    """Programs over a model's parameters; `advance` and `grow` consume the state that they are given.

    prefill: the state after each row's first token, with room for no other one.
    grow: the same with so many slots in the cache, and in the output.
    advance: at most so many steps more, fewer if all rows are done.
    rows, tokens: the numbers of rows, and of tokens of a padded prompt, are multiples of these.
    spare: slots that a row may write behind its last token.
    """

    prefill: Callable[[Prompts, Batch], State]
    grow: Callable[[State, int], State]
    advance: Callable[[Batch, State, int], State]
    rows: int = 1
    tokens: int = 1
    spare: int = 0


# --- parts of the programs ----------------------------------------------------------------------------------------


def grown(state: State, cfg: ModelConfig, slots: int) -> State:
    """The state of a prefill with room for `slots` slots and tokens, its cache as decoding reads it."""
    more = ((0, 0), (0, slots - state.out.tokens_bn.shape[1]))
    out = state.out._replace(
        **{
            name: jnp.pad(getattr(state.out, name), more)
            for name in ("tokens_bn", "logprob_bn", "sampled_bn")
        }
    )
    return state._replace(out=out, cache=room(state.cache, cfg, slots))


def steps(
    step: Callable[[State], State],
    state: State,
    at_most: jax.Array,
    anyone: Callable[[jax.Array], jax.Array] = jnp.any,
) -> State:
    """Runs `step` while a row is not done, at most so often; on GPUs, once (`in_turn`).

    Over a mesh, `anyone` tells all devices whether any of them has a row to go on with: those that are done serve the
    others' experts.
    """
    if not on_cpu():
        return step(state)._replace(steps=state.steps + 1)
    end = state.steps + at_most

    def more(carry: tuple[State, jax.Array]) -> jax.Array:
        state, going = carry
        return going & (state.steps < end)

    def body(carry: tuple[State, jax.Array]) -> tuple[State, jax.Array]:
        state = step(carry[0])
        return state._replace(steps=state.steps + 1), anyone(~state.out.done_b)

    return lax.while_loop(more, body, (state, anyone(~state.out.done_b)))[0]


def in_turn(advance: Any, args: tuple[Any, ...], state: State, n: int) -> State:
    """At most n steps by the jitted `advance(*args, state, at_most)`, whose body is `steps`; n = 0 compiles it."""
    if on_cpu():
        return advance(*args, state, n)
    if n == 0:
        advance.lower(*args, state, 0).compile()
    for _ in range(n):
        state = advance(*args, state, 1)
    return state


def advancing(step: Callable[..., State]) -> Any:
    """The jitted `Method.advance` of `step(ready, cfg, batch, bias_le, state)`; it consumes the state."""

    @functools.partial(jax.jit, static_argnames=("cfg",), donate_argnames=("state",))
    def advance(
        ready: Any, cfg: ModelConfig, batch: Batch, bias_le: Any, state: State, at_most: jax.Array
    ) -> State:
        return steps(functools.partial(step, ready, cfg, batch, bias_le), state, at_most)

    return advance


def on_one_device(prefill: Any, grow: Any, advance: Any, spare: int = 0) -> Callable[..., Method]:
    """The `Method` over a model's parameters of three jitted programs.

    prefill: (params, cfg, prompts, batch, bias) -> state; grow: (state, cfg, slots) -> state; advance: see `advancing`.
    """

    def method(params: Any, cfg: ModelConfig, balance_bias: Any = None, ready: Any = None) -> Method:
        """`ready`: the parameters after `prepare` for `decoding_config(cfg)`, made here if None."""
        decoding = decoding_config(cfg)
        ready = prepare(params, decoding) if ready is None else ready
        return Method(
            prefill=lambda prompts, batch: prefill(params, cfg, prompts, batch, balance_bias),
            grow=lambda state, slots: grow(state, decoding, slots),
            advance=lambda batch, state, n: in_turn(
                advance, (ready, decoding, jax.device_put(batch), balance_bias), state, n
            ),
            spare=spare,
        )

    return method


# --- the loop -----------------------------------------------------------------------------------------------------


def stream(
    method: Method,
    cfg: ModelConfig,
    request: Request,
    first: int = 1,
    ended: Callable[[], np.ndarray] = lambda: np.zeros(0, bool),
) -> Iterator[State]:
    """States as generation goes on, of which the last is the end. Read one before asking for the next, which consumes it.

    One comes after the prefill, the second after `first` steps, the others when about PATIENCE has passed. Before it goes
    on, it asks which rows (bool, from the first on) have `ended` for a reason of the caller's own.

    Raises:
        ValueError: see `Request.check`; another number of seeds than prompts.
    """
    request.check(cfg)
    fill = -len(request.prompts) % method.rows
    prompts = pad_prompts([*request.prompts, *[[0]] * fill], cfg.vocab_size, method.tokens)
    batch = make_batch(request, cfg, prompts)
    slots = slots_for(prompts.tokens_bt.shape[1] + request.max_new_tokens + method.spare)
    with now.doing("reading the prompt"):  # and, where lengths are new, compiling; no step is made yet
        state, at_most = method.grow(method.prefill(prompts, batch), slots), first
        state = jax.block_until_ready(method.advance(batch, state, 0))
    while True:
        yield state
        state = _without(state, ended())
        if np.asarray(state.out.done_b).all():
            return
        began = time.monotonic()
        state = jax.block_until_ready(method.advance(batch, state, at_most))
        took = time.monotonic() - began
        at_most = max(1, min(2 * at_most, int(at_most * PATIENCE / max(took, 1e-6))))


def _without(state: State, ended: np.ndarray) -> State:
    """The state after the caller ended rows."""
    if not ended.any():
        return state
    done_b = np.array(state.out.done_b)
    done_b[: len(ended)] |= ended
    done = jax.device_put(done_b, state.out.done_b.sharding)
    return state._replace(out=state.out._replace(done_b=done))


def complete(method: Method, cfg: ModelConfig, request: Request) -> tuple[list[Completion], State]:
    """All that `request` asks for, and the last state."""
    for state in stream(method, cfg, request, first=8):
        last = state
    return completions(last.out, request), last
