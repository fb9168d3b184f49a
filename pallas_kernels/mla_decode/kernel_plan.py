"""Divides the keys of a batch evenly over parts that run at the same time (split-KV).

A sequence is a run of steps of so many keys. All sequences' steps, one behind the other, are cut into parts of equal length:
a part has the end of one sequence, whole ones, the start of another. Of a sequence that lies in several parts each makes a
piece of the result; the pieces are combined afterwards.

A sequence begins with `FIXED_STEPS` that stand for the time of its queries and results. One without keys has a step, too.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

FIXED_STEPS = 2
SHORTEST_PART = 4


class Plan(NamedTuple):
    """Which sequences each part has, in steps of the whole batch. All are int32.

    length: [1] steps of a part; part p has those from p * length on.
    start_b, end_b: [B] where a sequence's steps begin and end.
    first_p, last_p: [P] the first sequence of a part, and the one behind its last.
    cut_p: [P] the sequence that is cut first where part p begins; B + p if no sequence is. Its pieces are the last of part
        p - 1, then those of the parts up to `until_p`, that excluded.
    until_p: [P].
    """

    length: jax.Array
    start_b: jax.Array
    end_b: jax.Array
    first_p: jax.Array
    last_p: jax.Array
    cut_p: jax.Array
    until_p: jax.Array


def plan(lengths: jax.Array, parts: int, step: int) -> Plan:
    """Divides sequences of `lengths` [B] int32 over `parts`, in steps of `step` keys."""
    steps_b = jnp.maximum((lengths + step - 1) // step, 1)
    end_b = jnp.cumsum(steps_b + FIXED_STEPS, dtype=jnp.int32)
    start_b = end_b - steps_b
    length = jnp.maximum((end_b[-1] + parts - 1) // parts, SHORTEST_PART)
    begin_p = jnp.arange(parts, dtype=jnp.int32) * length

    def count(bounds_b: jax.Array, values_p: jax.Array) -> jax.Array:
        return jnp.sum(bounds_b[None] < values_p[:, None], axis=1, dtype=jnp.int32)

    first_p = count(end_b, begin_p + 1)
    last_p = count(start_b, begin_p + length)
    b = jnp.minimum(first_p, len(lengths) - 1)
    within = (first_p < len(lengths)) & (start_b[b] < begin_p)
    none_p = len(lengths) + jnp.arange(parts, dtype=jnp.int32)
    cut_p = jnp.where(within & (start_b[b] >= begin_p - length), b, none_p)
    until_p = (end_b[b] + length - 1) // length
    return Plan(length[None], start_b, end_b, first_p, last_p, cut_p, until_p)
