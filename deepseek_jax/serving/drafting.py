"""Drafts of the MTP module in the batch (report sections 2.2 and 5.4.3), and when they pay.

A decode row with a draft computes two tokens, the last one and what the module guesses to come next, and gets one token, or
two where the guess was right. Draft and token are drawn from the logits of module and model by the same settings and the same
key, and the guess is right if they are the same: whether, and where, anything was drafted changes no token, bit for bit, greedy
or sampled, so it may be decided anew in each step. A draft agrees as often as the module knows the model's distribution:
`jax.random.categorical` adds the key's noise to the logits and takes the largest, and the same noise favours the same token
(Gumbel coupling: Daliri, Musco and Suresh 2024). Where the distributions differ by the total variation D, at least
(1 - D) / (1 + D) of the drafts are accepted; the rule that accepts most (Leviathan et al. 2023), 1 - D, has texts depend on
where drafts were made.

The module's latents are one more layer of the pages. What it keeps of a token needs the main model's state there and the next
token; so a step begins with the latents of the row's last state, and those of a prompt's last token wait for the token that is
drawn. They need two projections, and are written in steps without drafts, too. Only to draft, the module runs whole, on one
token of each row.

A row whose grammar says what may come drafts nothing: what may follow its next token is known when that is.

Dims: r row of a program, v vocabulary, d hidden.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from deepseek_jax.checks import require
from deepseek_jax.config import ModelConfig
from deepseek_jax.model.cache import paged_view
from deepseek_jax.model.decoding import decode, mtp_append, mtp_decode
from deepseek_jax.model.layers import logits
from deepseek_jax.model.layout import Layout
from deepseek_jax.serving.pace import Pace
from deepseek_jax.serving.programs import (
    DecodeRows,
    Part,
    State,
    Weights,
    drawn_by,
    taking_part,
    with_routes,
)
from deepseek_jax.serving.sampler import Drawn


class Pair(NamedTuple):
    """What a row with a draft got: `one`, and `two` where its draft was accepted. drafted_r, accepted_r: bool."""

    one: Drawn
    two: Drawn
    drafted_r: Any
    accepted_r: Any


def agrees(guess_r: jax.Array, token_r: jax.Array) -> jax.Array:
    """Which drafts are accepted."""
    return guess_r == token_r


def decode_pairs(
    weights: Weights, cfg: ModelConfig, layout: Layout, state: State, rows: DecodeRows, most: int | None
) -> tuple[State, Pair]:
    """`programs.decode_rows` with drafts: one token more of each row, or two."""
    state, part = taking_part(state, rows)
    draw = drawn_by(weights, part, most)
    guess_r, state = _guess(weights, cfg, layout, state, part, draw, rows)
    drafted_r = part.counted_r & ~rows.masked_r

    # A row without a draft computes the last of the two alone.
    first_r = jnp.where(drafted_r, part.token_r, 0)
    second_r = jnp.where(drafted_r, guess_r, part.token_r)
    new_r = part.counted_r.astype(jnp.int32) + drafted_r
    view = paged_view(state.pages_lpsw, part.table_rn, part.length_r + new_r, 2, new_r)
    h_rtd, view, chosen = decode(
        weights.ready, cfg, jnp.stack([first_r, second_r], axis=1), view, weights.bias_le, layout
    )
    logits_rtv = logits(weights.ready, h_rtd)

    h_rd = jnp.where(drafted_r[:, None], h_rtd[:, 0], h_rtd[:, 1])
    logits_rv = jnp.where(drafted_r[:, None], logits_rtv[:, 0], logits_rtv[:, 1])
    slots, one = draw(state.slots, logits_rv, part.length_r + 1, part.counted_r, rows)
    accepted_r = drafted_r & agrees(guess_r, one.token_b)
    slots, two = draw(slots, logits_rtv[:, 1], part.length_r + 2, accepted_r)

    # The module's latents of the token before the last: where a draft was refused, the next step writes the same once more.
    behind = paged_view(
        view.pages_lpsw, part.table_rn, part.length_r + 1, 1, part.counted_r.astype(jnp.int32)
    )
    behind = mtp_append(
        weights.ready, cfg, h_rd[:, None], one.token_b[:, None], behind, cfg.num_hidden_layers
    )
    state = part.written(
        state._replace(pages_lpsw=behind.pages_lpsw, slots=slots, loads_le=state.loaded(chosen.counts_le)),
        part.length_r + 1 + accepted_r,
        jnp.where(accepted_r, two.token_b, one.token_b),
        jnp.where(accepted_r[:, None], h_rtd[:, 1], h_rd),
    )
    one, two, alone = (with_routes(*x, most) for x in ((one, chosen, 0), (two, chosen, 1), (one, chosen, 1)))
    if one.routes_blk is not None:
        drafted_r11 = drafted_r[:, None, None]
        one = one._replace(routes_blk=jnp.where(drafted_r11, one.routes_blk, alone.routes_blk))
    return state, Pair(one, two, drafted_r, accepted_r)


def _guess(
    weights: Weights, cfg: ModelConfig, layout: Layout, state: State, part: Part, draw: Any, rows: DecodeRows
) -> tuple[jax.Array, State]:
    """Drafts of all rows, and the state with the module's latents of the tokens before the last ones."""
    own = paged_view(state.pages_lpsw, part.table_rn, part.length_r, 1, part.counted_r.astype(jnp.int32))
    h_rtd, own, counts_e = mtp_decode(
        weights.ready,
        cfg,
        state.h_sd[part.slot_r][:, None],
        part.token_r[:, None],
        own,
        weights.bias_le,
        layout,
        cfg.num_hidden_layers,
    )
    guessed = logits(weights.ready, h_rtd[:, 0])
    _, guess = draw(state.slots, guessed, part.length_r + 1, part.counted_r, rows)
    loads_le = state.loaded(counts_e[None], cfg.num_moe_layers)
    return guess.token_b, state._replace(pages_lpsw=own.pages_lpsw, loads_le=loads_le)


# --- when drafts pay ----------------------------------------------------------------------------------------------

MEMORY = 256  # drafts over which the acceptance is averaged
PROBE = 32  # steps without drafts, in times that one with drafts takes, after which there is one to see what it would bring
AT_FIRST = 0.85  # acceptance until it is known: the report's


class Economy:
    """Whether the next step drafts.

    Of n rows, a step without drafts brings n tokens, with drafts n (1 + acceptance): drafts pay if it takes less than
    1 + acceptance times as long (`pace.py`). The acceptance is a running average. Where drafts do not pay, a step now and then has them nevertheless, at a cost of at most 1 / PROBE, to see whether they still do not.

    Few rows read the weights for one token about as fast as for two, but two tokens choose up to twice as many experts; and
    the module itself is one more layer, and its logits a second reading of the head. So drafts pay in deep models, and
    there as long as a step's time is that of reading weights; with many rows, or few layers, they do not.

    always: do not ask whether it pays.
    """

    def __init__(self, pace: Pace, always: bool = False):
        self._pace, self._always = pace, always
        self._drafted, self._accepted = MEMORY / 16, AT_FIRST * MEMORY / 16
        self._without = 0

    @property
    def acceptance(self) -> float:
        """Of late."""
        return self._accepted / self._drafted

    def cost(self, rows: int) -> float:
        """Of a step with drafts, in steps without; 1 until both have run."""
        one, two = self._pace.of("decode", rows), self._pace.of("drafts", rows)
        return 1.0 if one is None or two is None else two / one

    def drafts(self, rows: int) -> bool:
        """Whether the next step drafts; rows: one of the programs' sizes."""
        if self._always:
            return True
        self._without += 1
        if self.cost(rows) < 1 + self.acceptance or self._without > PROBE * self.cost(rows):
            self._without = 0
            return True
        return False

    def heard(self, drafted: int, accepted: int) -> None:
        """What became of some drafts."""
        kept = math.exp(-drafted / MEMORY)
        self._drafted = kept * self._drafted + drafted
        self._accepted = kept * self._accepted + accepted


def check_drafts(cfg: ModelConfig, drafts: bool | str, invariant: bool) -> bool:
    """Whether an engine has the programs that draft, as its options ask. Raises ValueError for a model that cannot draft.

    Where a row's bits must not depend on the others, nothing is decided by their number: "auto" is no drafts.
    """
    if drafts == "auto":
        return bool(cfg.num_nextn_predict_layers) and not invariant
    require(
        not drafts or cfg.num_nextn_predict_layers > 0,
        "drafts come from the MTP module: num_nextn_predict_layers is 0; leave out drafts=True",
    )
    return bool(drafts)
