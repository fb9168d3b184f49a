"""The programs of `programs.py` compiled for one device, with its state: what the engine launches.

`over_mesh.py` has the same methods for the devices of a mesh, each of which is a rank of the engine; here there is one.
"""

import concurrent.futures
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from deepseek_jax.config import ModelConfig
from deepseek_jax.model.decoding import ONE_DEVICE
from deepseek_jax.model.platform import on_cpu
from deepseek_jax.serving.drafting import Pair, decode_pairs
from deepseek_jax.serving.pace import Pace
from deepseek_jax.serving.plans import chunk_plan, decode_plan
from deepseek_jax.serving.programs import (
    Chunks,
    DecodeRows,
    Given,
    State,
    Weights,
    brought,
    decode_rows,
    decode_times,
    empty_state,
    prefill_chunks,
    taken,
)
from deepseek_jax.serving.request import Request
from deepseek_jax.serving.sampler import Drawn, Row, of_request, put
from deepseek_jax.serving.sampling import ALL, GREEDY
from deepseek_jax.serving.sizes import Sizes


@functools.partial(jax.jit, static_argnames=("program", "cfg", "most"), donate_argnames=("state",))
def _decode(
    program: Callable[..., Any],
    weights: Weights,
    cfg: ModelConfig,
    state: Any,
    rows: DecodeRows,
    times: Any,
    most: int | None,
) -> Any:
    return decode_times(program, weights, cfg, ONE_DEVICE, state, rows, times, most)


@functools.partial(jax.jit, static_argnames=("cfg", "most"), donate_argnames=("state",))
def _prefill(weights: Weights, cfg: ModelConfig, state: Any, chunks: Chunks, most: int | None) -> Any:
    return prefill_chunks(weights, cfg, ONE_DEVICE, state, chunks, most)


@functools.partial(jax.jit, donate_argnames=("state",))
def _admit(state: Any, slot: Any, row: Any) -> Any:
    return state._replace(slots=put(state.slots, slot, row))


_taken = jax.jit(taken)


@functools.partial(jax.jit, donate_argnames=("state",))
def _brought(state: Any, page_n: Any, block_nlsw: Any) -> Any:
    return brought(state, page_n, block_nlsw)


Call = tuple[Any, tuple[Any, ...]]  # a jitted function, and its arguments


class Program(NamedTuple):
    """name: in `pace.py`. run: launches it, with a plan. call: what it would launch."""

    name: tuple[Any, ...]
    run: Callable[..., Any]
    call: Callable[..., Call]


def several(times: int) -> np.int32 | None:
    """How often a program runs its rows, on a CPU (`programs.decode_times`)."""
    return np.int32(times) if on_cpu() else None


class OneDevice:
    """Launches programs, without waiting for them.

    Args:
        cfg: the config that decoding runs with (`model.decoding.decoding_config`).
        pages: of the cache; fp8: in the FP8 layout.
        drafts: whether there are programs in which the MTP module drafts.

    Attributes:
        ranks: 1.
        pace: how long each program takes.
    """

    ranks = 1
    slots: Any = None  # of experts, where they move: over a mesh
    weights: Weights | None

    def __init__(self, cfg: ModelConfig, sizes: Sizes, pages: int, fp8: bool = False, drafts: bool = False):
        self.cfg, self.sizes, self.pages, self.drafts = cfg, sizes, pages, drafts
        self.words = -(-cfg.vocab_size // 32)
        self.weights = None
        self.pace = Pace()
        self._state = self._empty(fp8)

    def _empty(self, fp8: bool) -> State:
        """On one device for good, as what comes from other servers is: else each would need programs of its own."""
        state = empty_state(self.cfg, self.sizes.slots, self.pages, self.sizes.pages_each, fp8, self.drafts)
        (self._at,) = state.length_s.devices()
        return jax.device_put(state, self._at)  # type: ignore[no-any-return]

    def admit(self, rank: int, slot: int, request: Any, answer: list[int]) -> None:
        """The slot's sequence is sampled as `request` says. answer: tokens that it has already."""
        self._admit(rank, slot, of_request(request, answer, self.cfg.vocab_size))

    def _admit(self, rank: int, slot: int, row: Row) -> None:
        self._state = _admit(self._state, np.int32(slot), row)

    def decode(self, rows: DecodeRows, most: int | None, times: int = 1) -> Drawn:
        """What each of so many `times` drew. most: what the rows ask for (`sampler.most_of`)."""
        return self._run_rows(decode_rows, rows, most, times)  # type: ignore[no-any-return]

    def decode_pairs(self, rows: DecodeRows, most: int | None, times: int = 1) -> Pair:
        """`decode` with drafts."""
        return self._run_rows(decode_pairs, rows, most, times)  # type: ignore[no-any-return]

    def _run_rows(self, program: Callable[..., Any], rows: DecodeRows, most: int | None, times: int) -> Any:
        run, args = self._decoding(program, rows, most, times)
        self._state, drawn = run(*args)
        return self._readable(drawn)

    def prefill(self, chunks: Chunks, most: int | None) -> tuple[Drawn, Given]:
        run, args = self._prefilling(chunks, most)
        self._state, drawn, given = run(*args)
        told = chunks.asks_r.any() or chunks.routes_r.any()
        return self._readable(drawn), self._readable(given) if told else given

    def _decoding(
        self, program: Callable[..., Any], rows: DecodeRows, most: int | None, times: int = 1
    ) -> Call:
        return _decode, (program, self.weights, self.cfg, self._state, rows, several(times), most)

    def _prefilling(self, chunks: Chunks, most: int | None) -> Call:
        return _prefill, (self.weights, self.cfg, self._state, chunks, most)

    def _readable(self, results: Any) -> Any:
        """On every process."""
        return results

    @property
    def block(self) -> jax.ShapeDtypeStruct:
        """Pages on their way [n, l, s, w]: as many as one program takes, with all layers."""
        x = self._state.pages_lpsw
        return jax.ShapeDtypeStruct((self.sizes.moved, x.shape[0], *x.shape[2:]), x.dtype)

    def export(self, rank: int, pages: list[int]) -> jax.Array:
        """A copy of some pages of a rank, on its device, as a `block` that begins with them."""
        return _taken(self._state.pages_lpsw, self._these(pages))

    def bring(self, rank: int, pages: list[int], block: Any) -> None:
        """Writes the first pages of a `block`, of the host or of the rank's device, into these of a rank."""
        placed = jax.device_put(block, self.place(rank))
        self._state = _brought(self._state, self._these(pages), placed)

    def place(self, rank: int) -> Any:
        """The device of a rank. Any thread may ask."""
        return self._at

    def _these(self, pages: list[int]) -> np.ndarray:
        return np.array([*pages, *[-1] * (self.sizes.moved - len(pages))], np.int32)

    def in_two(self, program: tuple[Any, ...]) -> bool:
        """Whether a program (`pace.py` has the names) has its rows in two halves, of which one computes while the other's
        tokens travel: here nothing travels."""
        return False

    def warm_up(self) -> Iterator[str]:
        """Compiles all programs, one after the other, and times them; yields what comes next, for a screen."""
        for request in _to_admit():
            self.admit(0, 0, request, [])
        programs = list(self._programs(self._no_chunks, self._no_rows))
        yield from _compile(programs)
        for program in programs:
            for most in _mosts():
                jax.block_until_ready(program.run(most=most))
        for rank in range(self.ranks):
            self.bring(rank, [], self.export(rank, []))
        yield f"timing the {len(programs)} programs"
        for slot in range(self.sizes.slots):  # each goes on from another token, and so to other experts
            self.prefill(self._random_chunks(*self.sizes.chunks[0], slot), None if on_cpu() else GREEDY)
        for program in self._programs(self._random_chunks, self._all_rows):
            self.pace[program.name] = _seconds(program.run)
        for rows, tokens in self.sizes.chunks:
            behind = min(PREFIX, self.sizes.max_model_len - tokens)
            if behind > 0:
                run = functools.partial(self.prefill, self._random_chunks(rows, tokens, start=behind))
                more = _seconds(run) - (self.pace.of("prefill", rows, tokens) or 0.0)
                self.pace["prefix", rows, tokens] = max(0.0, more / behind)

    def close(self) -> None:
        """Ends what goes on beside: nothing here; over several processes, the others."""

    def _programs(self, chunks: Any, decoding: Any) -> Iterator[Program]:
        """By size, those of chunks first; of plans by their size."""

        def of(name: tuple[Any, ...], run: Any, call: Any, *plan: Any) -> Program:
            return Program(name, functools.partial(run, plan[-1]), functools.partial(call, *plan))

        for rows, tokens in self.sizes.chunks:
            yield of(("prefill", rows, tokens), self.prefill, self._prefilling, chunks(rows, tokens))
        for rows in self.sizes.rows:
            yield of(("decode", rows), self.decode, self._decoding, decode_rows, decoding(rows))
            if self.drafts:
                yield of(("drafts", rows), self.decode_pairs, self._decoding, decode_pairs, decoding(rows))

    def _no_chunks(self, rows: int, tokens: int) -> Chunks:
        return chunk_plan(self.ranks * rows, tokens, self.sizes.pages_each, self.words)

    def _no_rows(self, rows: int) -> DecodeRows:
        return decode_plan(self.ranks * rows, self.words)

    def _random_chunks(self, rows: int, tokens: int, first: int = 0, start: int = 0) -> Chunks:
        """Of so many slots, from `first` on, behind `start` tokens; all in the first page."""
        plan = self._no_chunks(rows, tokens)
        plan.start_r[:] = start
        plan.slot_r[:] = np.tile(first + np.arange(rows), self.ranks)
        plan.new_r[:], plan.samples_r[:] = tokens, True
        plan.tokens_rt[:] = np.random.default_rng(first).integers(
            0, self.cfg.vocab_size, plan.tokens_rt.shape
        )
        return plan

    def _all_rows(self, rows: int) -> DecodeRows:
        plan = self._no_rows(rows)
        plan.slot_r[:] = np.tile(np.arange(rows), self.ranks)
        return plan


def _compile(programs: list[Program]) -> Iterator[str]:
    """On threads, while the next ones are traced; few wait at a time. Yields what comes next."""
    compilers = (
        2 if on_cpu() else 1
    )  # where kernels are timed to choose among them, others' would disturb that
    with concurrent.futures.ThreadPoolExecutor(compilers) as pool:
        compiled = []
        for i, program in enumerate(programs, 1):
            yield f"program {i} of {len(programs)}: {described(*program.name)}"
            for most in _mosts():
                run, args = program.call(most=most)
                compiled.append(pool.submit(run.lower(*args).compile))
            while len(compiled) > 2 * compilers:
                compiled.pop(0).result()
        for one in compiled:
            one.result()


def described(kind: str, rows: int, tokens: int = 1) -> str:
    """What a program computes, by its name (`pace.py`)."""
    if kind == "prefill":
        return f"{rows} x {tokens} tokens of prompts"
    return f"{rows} rows that decode" + " with drafts" * (kind == "drafts")


TRIES = 3
PREFIX = 2048  # tokens before a chunk, where it is timed for what they cost


def _mosts() -> Sequence[int | None]:
    """What rows may ask for, of programs of one size. On a CPU, a program sees that itself."""
    return (None,) if on_cpu() else range(ALL + 1)


def _seconds(run: Callable[..., Any]) -> float:
    """Of a program, the shortest of some tries."""
    took = []
    for _ in range(TRIES):
        began = time.perf_counter()
        jax.block_until_ready(run(most=None if on_cpu() else GREEDY))
        took.append(time.perf_counter() - began)
    return min(took)


def _to_admit() -> Iterator[Request]:
    """One that looks back at what was said, and one that does not."""
    for min_tokens in (1, 0):
        yield Request("", [0], 1, min_tokens=min_tokens)
