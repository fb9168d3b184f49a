"""What generation keeps of a batch of prompts: the request, its arrays, and what came out so far.

Prompts of unequal length are padded on the left. Their length, and the slots of the cache, are rounded up to few sizes,
and all else that a user may change is an array: so few programs are compiled.

Dims: b row of the batch, t prompt token, s cache slot, n new token, v vocabulary.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.checks import is_integer, require, shown
from deepseek_jax.config import ModelConfig
from deepseek_jax.inference.sampling import RowSampling, Sampling, row_sampling

Array = Any  # jax.Array in programs, NumPy's on the host

SMALLEST = 64  # of the sizes of prompts
LONG = 1024  # tokens of a prompt
SLOTS = 256  # in the smallest cache
STOPS = 8  # stop ids are filled up to a multiple of this


@dataclasses.dataclass(frozen=True)
class Request:
    """What to generate.

    Attributes:
        prompts: token ids; lengths may differ.
        max_new_tokens: at most so many for each prompt.
        stop_ids: a row ends with one of these, which is left out.
        seed: one for all rows, or one for each (`sampling.row_sampling`).
        num_ids: ids that the tokenizer knows; those from there on are never chosen. None: all of the vocabulary.
    """

    prompts: Sequence[Sequence[int]]
    max_new_tokens: int
    sampling: Sampling = Sampling()
    stop_ids: Sequence[int] = ()
    seed: int | Sequence[int] = 0
    num_ids: int | None = None

    def check(self, cfg: ModelConfig) -> None:
        """Raises ValueError if there is nothing to generate, ids outside the vocabulary, or too many positions."""
        if not self.prompts or any(len(p) == 0 for p in self.prompts):
            raise ValueError("generation needs at least one prompt, and each needs at least one token")
        asked = self.max_new_tokens
        require(is_integer(asked), f"max_new_tokens={shown(asked)} must be an integer")
        require(isinstance(self.stop_ids, Iterable), f"stop_ids={shown(self.stop_ids)} must be token ids")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={self.max_new_tokens} must be at least 1")
        longest = max(map(len, self.prompts))
        if longest + self.max_new_tokens > cfg.max_position_embeddings:
            raise ValueError(
                f"prompt of {longest} tokens + max_new_tokens={self.max_new_tokens} exceeds "
                f"max_position_embeddings={cfg.max_position_embeddings}"
            )
        out_of_range = [t for p in self.prompts for t in p if not 0 <= t < cfg.vocab_size]
        if out_of_range:
            raise ValueError(f"token id {out_of_range[0]} lies outside [0, vocab_size={cfg.vocab_size})")


def size_for(n: int, divides: int = 1) -> int:
    """Tokens to which n of a prompt are padded: the smallest 64, 96, 128, 192, 256, 384, ... (2^i and 3 * 2^i) >= n, rounded
    up to a multiple of `divides`. Of more than LONG tokens, one of these times the odd part of `divides`: so that equal pieces
    of a prompt (`generate.py`), which divide too, need not be short."""
    odd = divides // (divides & -divides) if n > LONG else 1
    n = -(-n // odd)
    power = max(SMALLEST, 1 << (n - 1).bit_length())
    smaller = power * 3 // 4
    size = smaller if n <= smaller and smaller > SMALLEST else power
    return -(-odd * size // divides) * divides


def slots_for(n: int) -> int:
    """Slots of a cache for n tokens: a power of two. Coarser than prompts: an empty slot costs next to nothing, and the
    decoding loop is what takes longest to compile."""
    return max(SLOTS, 1 << (n - 1).bit_length())


class Prompts(NamedTuple):
    """tokens_bt int32, padded on the left; pad_b: pads of each row; seen_bv bool: the tokens of each row."""

    tokens_bt: Array
    pad_b: Array
    seen_bv: Array


def pad_prompts(prompts: Sequence[Sequence[int]], vocab_size: int, divides: int = 1) -> Prompts:
    """Rows of equal length, a multiple of `divides`."""
    length = size_for(max(map(len, prompts)), divides)
    tokens = np.zeros((len(prompts), length), np.int32)
    seen = np.zeros((len(prompts), vocab_size), bool)
    for row, had, prompt in zip(tokens, seen, prompts, strict=True):
        row[length - len(prompt) :] = prompt
        had[np.asarray(prompt)] = True
    return Prompts(tokens, np.array([length - len(p) for p in prompts], np.int32), seen)


class Batch(NamedTuple):
    """What does not change while a batch is generated.

    pad_b: pads on the left of each prompt; length []: of the padded prompts; limit_b: new tokens at most, 0 for a row that
    only fills the batch; stop_s: stop ids, filled up with -1; num_ids []: ids from there on are never chosen.
    """

    pad_b: Array
    length: Array
    limit_b: Array
    stop_s: Array
    num_ids: Array
    sampling: RowSampling


def make_batch(request: Request, cfg: ModelConfig, prompts: Prompts) -> Batch:
    """`prompts`: those of the request, padded, and of rows that only fill the batch."""
    rows, n = len(prompts.pad_b), len(request.prompts)
    seed = request.seed if np.ndim(request.seed) == 0 else [*request.seed, *[0] * (rows - n)]  # type: ignore[misc]
    stops = list(request.stop_ids)
    return Batch(
        pad_b=prompts.pad_b,
        length=np.int32(prompts.tokens_bt.shape[1]),
        limit_b=np.where(np.arange(rows) < n, request.max_new_tokens, 0).astype(np.int32),
        stop_s=np.array(stops + [-1] * (STOPS - len(stops) % STOPS), np.int32),
        num_ids=np.int32(request.num_ids or cfg.vocab_size),
        sampling=row_sampling(request.sampling, seed, rows),
    )


def allowed(logits_bv: jax.Array, num_ids: Array) -> jax.Array:
    """-inf for the ids that no tokenizer knows, `num_ids` and up."""
    return jnp.where((jnp.arange(logits_bv.shape[-1]) < num_ids)[None], logits_bv, -jnp.inf)


def is_stop(token_b: jax.Array, batch: Batch) -> jax.Array:
    return jnp.isin(token_b, batch.stop_s)


class Output(NamedTuple):
    """New tokens so far, stop tokens included: the first count_b of each row.

    logprob_bn: log-probabilities under the model's own distribution; sampled_bn: under the one that they were drawn from.
    """

    tokens_bn: Array
    logprob_bn: Array
    sampled_bn: Array
    count_b: Array
    done_b: Array


def empty_output(batch: Batch) -> Output:
    """Room for one token."""
    b = len(batch.limit_b)
    floats = jnp.zeros((b, 1), jnp.float32)
    return Output(
        jnp.zeros((b, 1), jnp.int32),
        floats,
        floats,
        jnp.zeros((b,), jnp.int32),
        jnp.asarray(batch.limit_b) < 1,
    )


class Choice(NamedTuple):
    """Tokens chosen in one step, in order, with their log-probabilities as in `Output`: [b, k]."""

    token_bk: jax.Array
    logprob_bk: jax.Array
    sampled_bk: jax.Array


def emit(out: Output, batch: Batch, choice: Choice, n_b: jax.Array) -> Output:
    """Appends the first n_b of each row's choices; rows that are done, or become it, take no more."""
    b, k = choice.token_bk.shape
    n_b = jnp.where(out.done_b, 0, jnp.minimum(n_b, batch.limit_b - out.count_b))
    new_1k = jnp.arange(k)[None]
    taken_bk = new_1k < n_b[:, None]
    column_bk = jnp.where(taken_bk, out.count_b[:, None] + new_1k, out.tokens_bn.shape[1])
    row_bk = jnp.arange(b)[:, None]
    arrays = zip(out[:3], choice, strict=True)
    tokens, logprob, sampled = (x.at[row_bk, column_bk].set(new, mode="drop") for x, new in arrays)
    count_b = out.count_b + n_b
    stopped = (is_stop(choice.token_bk, batch) & taken_bk).any(-1)
    return Output(tokens, logprob, sampled, count_b, out.done_b | stopped | (count_b >= batch.limit_b))


@dataclasses.dataclass(frozen=True)
class Completion:
    """The continuation of one prompt.

    Attributes:
        tokens: ids without the stop token.
        finish_reason: "stop" (a stop token, or a stop string) or "length" (max_new_tokens); None: it was cut short.
        logprobs: log-probability (nats) of each token in the model's own distribution, before any setting of `Sampling`.
        sampled_logprobs: in the distribution that it was drawn from, after all of them; 0 where that is greedy.
        text: of the tokens, up to a stop string; None where the prompt was not text.
    """

    tokens: list[int]
    finish_reason: str | None
    logprobs: list[float]
    sampled_logprobs: list[float]
    text: str | None = None


def completions(out: Output, request: Request) -> list[Completion]:
    """What the rows have so far, without stop tokens."""
    tokens, logprob, sampled, count = (np.asarray(x) for x in out[:4])
    stops, rows = set(request.stop_ids), []
    for i in range(len(request.prompts)):
        row = tokens[i, : count[i]].tolist()
        stopped = bool(row) and row[-1] in stops
        n = len(row) - stopped
        reason = "stop" if stopped else "length" if len(row) >= request.max_new_tokens else None
        rows.append(Completion(row[:n], reason, logprob[i, :n].tolist(), sampled[i, :n].tolist()))
    return rows
