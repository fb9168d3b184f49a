"""Choosing the next token: repetition penalty, temperature, top-k, top-p, min-p, in this order (`transformers`' order).

Settings are arrays, one value per row of a batch, so that one compiled program serves them all; on GPUs four do, of which the
host picks one (`RowSampling.most`). A greedy row is a distribution at one point. A row draws with a key made of its own seed
and the place of the token: what it draws depends neither on the other rows nor on the step in which it is drawn.

Dims: b batch row, v vocabulary.
"""

import dataclasses
import functools
import math
import numbers
from collections.abc import Callable, Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from deepseek_jax.checks import is_integer, require, shown

Array = Any  # jax.Array in programs, NumPy's on the host

MOST_BIASES = 1024  # ids of a `logit_bias`
_SMALLEST = float(np.finfo(np.float32).tiny)  # of the temperatures, and of their reciprocals
FEW = 256  # of the likeliest tokens: nearly all cuts lie among them
_STRONGEST = 1e30  # of the repetition penalties, and of their reciprocals: times a logit, float32 holds it
# Sums of float32 probabilities are this far off: a nucleus that reaches top_p up to rounding reaches it.
_ROUNDING = 1e-6


@dataclasses.dataclass(frozen=True)
class Sampling:
    """The defaults are greedy and change nothing.

    Attributes:
        temperature: 0 is greedy.
        top_p: the smallest set of most likely tokens with this probability together; 1 keeps all.
        top_k: the k most likely tokens, and what ties with the last of them; 0 keeps all.
        min_p: tokens at least this times as likely as the most likely one; 0 keeps all.
        repetition_penalty: divides the positive logits, and multiplies the negative ones, of tokens that the prompt or
            the continuation has already; 1 is none.
        presence_penalty: is subtracted from the logits of tokens that the continuation has already, -2 to 2; 0 is none.
        frequency_penalty: the same, times how often it has them.
        logit_bias: id -> what is added to its logit, -100 to 100. Kept as pairs in the order of the ids: `dict` gives the
            mapping back.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | tuple[tuple[int, float], ...] = ()

    def __post_init__(self):
        object.__setattr__(self, "logit_bias", _pairs(self.logit_bias))
        for field in dataclasses.fields(self)[:-1]:
            value = getattr(self, field.name)
            require(_is_number(value), f"{field.name}={shown(value)} must be a number")
        if not (self.temperature >= 0 and math.isfinite(self.temperature)):
            raise ValueError(f"temperature={self.temperature} must be finite and >= 0 (0 is greedy)")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must lie in (0, 1]")
        if not (isinstance(self.top_k, numbers.Integral) and 0 <= self.top_k < 2**31):
            raise ValueError(f"top_k={self.top_k} must be a whole number >= 0 (0 keeps all)")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p={self.min_p} must lie in [0, 1]")
        penalty = self.repetition_penalty
        if not (penalty > 0 and math.isfinite(penalty)):
            raise ValueError(f"repetition_penalty={penalty} must be finite and > 0 (1 is none)")
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            require(-2 <= value <= 2, f"{name}={value} must lie in [-2, 2] (0 is none)")


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) or getattr(value, "ndim", None) == 0  # JAX's, too


def _pairs(bias: Any) -> tuple[tuple[int, float], ...]:
    """A bias as pairs in the order of the ids. Raises ValueError for what is no mapping of ids to numbers from -100 to 100."""
    mapping = (
        isinstance(bias, Mapping) or bias == () or (isinstance(bias, tuple) and all(map(_is_pair, bias)))
    )
    require(mapping, f"logit_bias={shown(bias)} must map token ids to numbers")
    pairs = dict(bias)
    require(len(pairs) <= MOST_BIASES, f"logit_bias has {len(pairs)} ids: give at most {MOST_BIASES}")
    for token, value in pairs.items():
        require(is_integer(token) and token >= 0, f"logit_bias has the key {shown(token)}: give token ids")
        good = _is_number(value) and -100 <= value <= 100
        require(good, f"logit_bias={shown(value)} of token {token} must be a number from -100 to 100")
    return tuple(sorted((int(token), float(value)) for token, value in pairs.items()))


def _is_pair(entry: Any) -> bool:
    return isinstance(entry, tuple) and len(entry) == 2


# What a row asks for; each needs all that those before it need. ALL: of the serving engine (`serving/sampler.py`).
GREEDY, DRAWN, FILTERED, ALL = range(4)


@flax.struct.dataclass
class RowSampling:
    """`Sampling` of each row [b]; key_b: its stream of random numbers.

    most: GREEDY, DRAWN, FILTERED or ALL: what the rows ask for at most, if the host knows: a program for this alone. None: the
    program sees it itself, in a branch (`model/platform.py`).
    """

    temperature_b: Array
    top_p_b: Array
    top_k_b: Array
    min_p_b: Array
    penalty_b: Array
    key_b: jax.Array
    most: int | None = flax.struct.field(pytree_node=False, default=None)

    def asks(self, what: int) -> Any:
        """Whether a row asks for `what` or more: bool, or an array where the host does not know."""
        if self.most is not None:
            return self.most >= what
        if what == DRAWN:
            return (self.temperature_b >= _SMALLEST).any()
        return ((self.top_k_b > 0) | (self.top_p_b < 1) | (self.min_p_b > 0)).any()


def either(asked: Any, then: Callable[..., Any], otherwise: Callable[..., Any], x: jax.Array) -> Any:
    """then(x) if asked, else otherwise(x): a branch of the program where only the device knows."""
    if isinstance(asked, bool):
        return then(x) if asked else otherwise(x)
    return lax.cond(asked, then, otherwise, x)


def plain_numbers(sampling: Sampling) -> tuple[float, float, int, float, float]:
    """Temperature, top-p, top-k, min-p and repetition penalty as float32 holds them. A greedy row cuts nothing off."""
    temperature = min(float(sampling.temperature), 1 / _SMALLEST)
    penalty = min(max(float(sampling.repetition_penalty), 1 / _STRONGEST), _STRONGEST)
    if temperature < _SMALLEST:
        return 0.0, 1.0, 0, 0.0, penalty
    return temperature, float(sampling.top_p), int(sampling.top_k), float(sampling.min_p), penalty


def asked_for(sampling: Sampling) -> int:
    """GREEDY, DRAWN or FILTERED."""
    if sampling.temperature < _SMALLEST:
        return GREEDY
    return FILTERED if sampling.top_k or sampling.top_p < 1 or sampling.min_p else DRAWN


def penalised(logits_bv: jax.Array, seen_bv: jax.Array, rows: RowSampling) -> jax.Array:
    """Logits after the repetition penalty; seen_bv: whether the row has the token already."""
    penalty = rows.penalty_b[:, None]
    changed = jnp.where(logits_bv > 0, logits_bv / penalty, logits_bv * penalty)
    return jnp.where(seen_bv, changed, logits_bv)


def _inside(scaled_bv: jax.Array, rows: RowSampling) -> jax.Array:
    """Whether a token is inside of top-k, top-p and min-p. On CPUs all are sorted only where the cut lies beyond the FEW."""
    v = scaled_bv.shape[-1]
    if rows.most is not None or v <= FEW:
        return _inside_among(scaled_bv, rows, v)[0]
    inside_bv, all_there_b = _inside_among(scaled_bv, rows, FEW)
    return lax.cond(all_there_b.all(), lambda: inside_bv, lambda: _inside_among(scaled_bv, rows, v)[0])


def _inside_among(scaled_bv: jax.Array, rows: RowSampling, n: int) -> tuple[jax.Array, jax.Array]:
    """Which of the n likeliest tokens are inside, bool [b, v]; and whether it cannot be more, bool [b].

    By the tokens' places in their order: a program may compute the same logit twice, with and without rounding a product
    before a sum, and it then differs from itself.
    """
    b, v = scaled_bv.shape
    descending, id_bn = lax.top_k(scaled_bv, n)  # of equal ones, those with the lower ids first
    k = jnp.where(rows.top_k_b > 0, jnp.minimum(rows.top_k_b, v), v)[:, None]
    kth = jnp.take_along_axis(descending, jnp.minimum(k, n) - 1, axis=-1)
    in_k = (descending >= kth) & (descending > -jnp.inf)
    highest = descending[:, :1]
    prob = jnp.where(in_k, jnp.exp(descending - highest), 0.0)
    total = prob.sum(axis=-1, keepdims=True)
    if n < v:
        all_bv = jnp.exp(jnp.minimum(scaled_bv - highest, 0.0))
        total = jnp.where(k == v, all_bv.sum(axis=-1, keepdims=True), total)
    share = jnp.where(rows.top_p_b < 1, rows.top_p_b * (1 - _ROUNDING), jnp.inf)[:, None]
    likely = prob >= rows.min_p_b[:, None] * (1 - _ROUNDING)
    inside_bn = in_k & likely & (jnp.cumsum(prob, axis=-1) - prob < share * total)
    inside_bn |= (jnp.arange(n) == 0)[None]
    at = (jnp.arange(b)[:, None], jnp.where(inside_bn, id_bn, v))
    inside_bv = jnp.zeros((b, v), bool).at[at].set(True, mode="drop")
    return inside_bv, ~jnp.where(k == v, inside_bn, in_k)[:, -1]


def filtered_logits(logits_bv: jax.Array, rows: RowSampling) -> jax.Array:
    """Logits of the distribution that is sampled: scaled by temperature, -inf outside of top-k, top-p and min-p.

    The nucleus is the smallest set of most likely tokens with probability >= top_p together; of equally likely
    ones, those with the lower ids come first. The largest logit is 0, so that no temperature overflows. All of a
    greedy row but its most likely token is -inf; so is a row whose temperature float32 does not hold.
    """
    greedy = (rows.temperature_b < _SMALLEST)[:, None]
    highest = jnp.max(logits_bv, axis=-1, keepdims=True)
    scaled = (logits_bv - highest) / jnp.where(greedy, 1.0, rows.temperature_b[:, None])
    inside = functools.partial(_inside, rows=rows)
    kept = either(rows.asks(FILTERED), inside, lambda x: jnp.ones(x.shape, bool), scaled)
    best = jnp.arange(logits_bv.shape[-1])[None] == jnp.argmax(logits_bv, axis=-1)[:, None]
    return jnp.where(jnp.where(greedy, best, kept), scaled, -jnp.inf)


def keys_at(rows: RowSampling, n_b: jax.Array, use: int = 0) -> jax.Array:
    """Keys [b] of the rows' n-th tokens; `use` tells apart what else is drawn for the same token."""
    return jax.vmap(lambda key, n: jax.random.fold_in(jax.random.fold_in(key, n), use))(rows.key_b, n_b)


def log_prob(logits_bv: jax.Array, token_b: jax.Array) -> jax.Array:
    """Log-probability (nats) of one token per row, float32 [b]."""
    chosen = jnp.take_along_axis(logits_bv, token_b[:, None], axis=-1)[:, 0]
    return chosen - jax.nn.logsumexp(logits_bv, axis=-1)


def sample(
    key_b: jax.Array, logits_bv: jax.Array, rows: RowSampling, answer_b: Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """One token per row, int32 [b], and its log-probability under `filtered_logits`, float32 [b]. answer_b: see `or_given`."""

    def drawn(logits_bv: jax.Array) -> tuple[jax.Array, jax.Array]:
        filtered = filtered_logits(logits_bv, rows)
        token_b = jax.vmap(jax.random.categorical)(key_b, filtered).astype(jnp.int32)
        token_b = or_given(token_b, answer_b)
        return token_b, log_prob(filtered, token_b)

    def best(logits_bv: jax.Array) -> tuple[jax.Array, jax.Array]:
        return best_token(logits_bv, answer_b)

    return either(rows.asks(DRAWN), drawn, best, logits_bv)


def or_given(token_b: jax.Array, answer_b: Array | None) -> jax.Array:
    """Tokens that were drawn; where answer_b is not negative that one instead, with the probability that it had."""
    return token_b if answer_b is None else jnp.where(answer_b < 0, token_b, answer_b)


def best_token(logits_bv: jax.Array, answer_b: Array | None = None) -> tuple[jax.Array, jax.Array]:
    """`sample` where all rows are greedy: the likeliest token has the whole probability."""
    best_b = jnp.argmax(logits_bv, axis=-1).astype(jnp.int32)
    token_b = or_given(best_b, answer_b)
    return token_b, jnp.where(token_b == best_b, 0.0, -jnp.inf)
