"""Drawing by settings per slot: against the definition in float64 (`oracle/sampling.py`), and by chi-square of what is drawn.

`python -m tests.serving.draws` is the long form: random combinations of all settings, in the programs of CPUs too.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.model.id_sets import packed, unpacked, words
from deepseek_jax.serving.request import TOP, Request
from deepseek_jax.serving.sampler import (
    Rows,
    adjusted,
    each_row,
    empty_slots,
    given,
    of_request,
    row_settings,
)
from deepseek_jax.serving.sampling import (
    ALL,
    DRAWN,
    FILTERED,
    GREEDY,
    Sampling,
    filtered_logits,
    keys_at,
    sample,
)
from tests.oracle import sampling as oracle
from tests.programs import equations
from tests.serving.sampled import (
    ANSWER,
    CASES,
    GRAMMAR,
    HOT,
    LIKELIEST,
    LOGITS,
    PROMPT,
    SECOND,
    V,
    any_case,
    bits,
    case,
    draw_rows,
    draws,
    jit_draw,
    jit_put,
    rows_of,
    slots_of,
)

NAMES = list(CASES)


@functools.partial(jax.jit, static_argnames="by_row")
def _distribution(slots, rows, logits_bv, by_row=False):
    """Log-probabilities of the distribution that is drawn from."""

    def of(rows, logits_bv):
        settings = row_settings(slots, rows)
        return filtered_logits(adjusted(slots, rows, settings, logits_bv), settings)

    logits = each_row(of, rows._replace(most=None if by_row else ALL), logits_bv)
    return jax.nn.log_softmax(logits, axis=-1)


# --- the distribution ------------------------------------------------------------------------------------------------


def check(log_p_bv, logits_bv, cases):
    """In float32, with a handful of roundings of logits up to 100 (a bias) over a temperature of 0.5: 4 * 200 * 2^-24."""
    for log_p, logits, one in zip(np.asarray(log_p_bv), logits_bv, cases, strict=True):
        want = oracle.distribution(logits, one)
        there = want > 0
        assert ((log_p > -np.inf) == there).all() and not np.isnan(log_p).any(), one
        np.testing.assert_allclose(log_p[there], np.log(want[there]), atol=5e-5, rtol=0, err_msg=str(one))


@pytest.mark.parametrize("by_row", [False, True])
def test_each_setting_is_what_its_definition_says(by_row):
    logits = np.tile(LOGITS, (len(CASES), 1))
    cases = list(CASES.values())
    check(_distribution(slots_of(cases), rows_of(cases), logits, by_row=by_row), logits, cases)


@pytest.mark.parametrize("by_row", [False, True])
def test_settings_of_all_kinds_in_one_batch(by_row):
    """A hundred requests; the vocabulary ends in the middle of a word of the mask."""
    rng, vocab = np.random.default_rng(1), 45
    cases = [any_case(rng, vocab) for _ in range(100)]
    logits = rng.normal(0, 3, (100, vocab)).astype(np.float32)
    rows = rows_of(cases, np.int32(vocab - 3), vocab)
    check(_distribution(slots_of(cases, vocab=vocab), rows, logits, by_row=by_row), logits, cases)


# --- what is drawn ---------------------------------------------------------------------------------------------------

N = 4096


@pytest.fixture(scope="module")
def drawn():
    """N draws of each case, in one call."""
    return dict(zip(NAMES, draws(CASES.values(), LOGITS, N, ALL), strict=True))


def value(out, name, rules=oracle.RULES) -> float:
    return oracle.p_value(
        np.bincount(out[name].token_b, minlength=V), oracle.distribution(LOGITS, CASES[name], rules)
    )


@pytest.mark.parametrize("name", NAMES)
def test_frequencies(drawn, name):
    """23 tests: one of them falls below 1e-5 once in four thousand times; the seed is fixed."""
    assert value(drawn, name) > 1e-5


def swapped(first, second):
    rules = list(oracle.RULES)
    i, j = rules.index(first), rules.index(second)
    rules[i], rules[j] = rules[j], rules[i]
    return rules


def instead(rule, other):
    return [other if r is rule else r for r in oracle.RULES]


def _prompt_counts(x, one):
    return oracle.frequency(x, one._replace(answer=(*one.request.prompt, *one.answer)))


def _answer_only(x, one):
    return oracle.repetition(x, one._replace(request=Request("r", one.answer, 1, one.request.sampling)))


def _one_more(x, one):
    k = one.request.sampling.top_k
    return np.where(x >= sorted(x)[::-1][k], x, -np.inf) if k else x


def _divided(x, one):
    return np.where(np.isin(np.arange(V), ANSWER), x / one.request.sampling.repetition_penalty, x)


# What is wrong with the rules, and the case that must show it.
nothing = lambda x, one: x  # noqa: E731
WRONG = {
    **{
        f"no {rule.__name__}": (name, instead(rule, nothing))
        for name, rule in {
            **{"bias": oracle.bias, "grammar": oracle.grammar, "min_tokens": oracle.min_tokens},
            **{"repetition": oracle.repetition, "frequency": oracle.frequency, "presence": oracle.presence},
            **{"top_k": oracle.top_k, "top_p": oracle.top_p, "min_p": oracle.min_p},
        }.items()
    },
    "no temperature": ("temperature", instead(oracle.temperature, nothing)),
    "the prompt counts": ("frequency", instead(oracle.frequency, _prompt_counts)),
    "the prompt does not count": ("repetition", instead(oracle.repetition, _answer_only)),
    "negative logits are divided, too": ("repetition", instead(oracle.repetition, _divided)),
    "presence counts": (
        "presence",
        instead(oracle.presence, lambda x, one: x - 1.2 * np.bincount(ANSWER, minlength=V)),
    ),
    "one more than top_k": ("top_k", instead(oracle.top_k, _one_more)),
    "top_p before top_k": ("two cuts", swapped(oracle.top_k, oracle.top_p)),
    "temperature before penalties": ("all", swapped(oracle.repetition, oracle.temperature)),
    "penalties before bias": ("penalties", swapped(oracle.bias, oracle.repetition)),
    "min_tokens goes before a grammar": (
        "grammar and min_tokens leave nothing",
        swapped(oracle.grammar, oracle.min_tokens),
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_the_chi_square_sees_a_wrong_rule(drawn, wrong):
    name, rules = WRONG[wrong]
    assert value(drawn, name, rules) < 1e-9


@pytest.mark.parametrize("name", NAMES)
def test_log_probabilities_of_what_was_drawn(drawn, name):
    """The model's own, and those of the distribution that was drawn from. float32 sums of 16 numbers: 16 * 2^-24."""
    out, want = drawn[name], oracle.distribution(LOGITS, CASES[name])
    own = oracle.probabilities(LOGITS.astype(np.float64))
    np.testing.assert_allclose(out.logprob_b, np.log(own[out.token_b]), atol=2e-6)
    np.testing.assert_allclose(out.sampled_b, np.log(want[out.token_b]), atol=5e-5)  # as in `check`
    assert out.token_b.dtype == np.int32 and out.logprob_b.dtype == np.float32


# --- a row is its own --------------------------------------------------------------------------------------------------

SEQUENCE = ["all", "hot", "penalties", "greedy with all", "min_p"]


def sequence(name, slot=0, slots=1, beside=(), places=(), steps=8, again=None, most=None):
    """Tokens of a request, drawn one after the other, in a slot of its own and beside others. again: after so many, it is
    put into another slot with what it has, as after a preemption."""
    one = CASES[name]._replace(answer=())
    others = [CASES[other] for other in beside]
    state = slots_of([one, *others], [slot, *places], slots)
    rng, tokens, bucket = np.random.default_rng(5), [], 1 + len(beside) + (len(beside) > 2)
    rows = np.zeros(bucket, np.int32)
    rows[: 1 + len(beside)] = [slot, *places]
    mask = np.full((bucket, 1), 2**32 - 1, np.uint32)
    mask[:1] = bits([one])
    for step in range(steps):
        if step == again:
            slot = (slot + 1) % slots
            state, rows[0] = jit_put(state, slot, of_request(one.request, tokens, V)), slot
        logits = np.tile(rng.normal(0, 1.5, V).astype(np.float32), (bucket, 1))
        position = np.full(bucket, len(PROMPT) + step, np.int32)
        counted = np.arange(bucket) <= len(beside)
        state, out = jit_draw(state, rows, logits, position, counted, mask, most=most)
        tokens.append(int(out.token_b[0]))
    return tokens, np.asarray(state.count_sv)


@pytest.mark.parametrize("name", SEQUENCE)
def test_a_requests_draws_are_its_own(name):
    """In any batch, slot and bucket, after a preemption, and in the programs of GPUs."""
    alone, counts = sequence(name)
    beside = ["all", "greedy", "bias", "top_p"]
    among, others = sequence(name, slot=4, slots=8, beside=beside, places=[0, 6, 2, 1])
    assert among == alone
    assert (counts[0] == np.bincount(alone, minlength=V)).all() and (others[4] == counts[0]).all()
    assert not others[[3, 5, 7]].any()  # slots of nobody, and that of the row that only fills the batch
    assert sequence(name, slot=3, slots=8, beside=beside, places=[0, 6, 2, 1], again=3)[0] == alone
    assert sequence(name, slots=2, most=ALL)[0] == alone


def test_another_seed_draws_another_sequence():
    found = set()
    for seed in (0, 1, -1, 2**40 + 1):
        row = of_request(Request("r", PROMPT, 9, Sampling(1.0), seed=seed), (), V)
        state = jit_put(empty_slots(1, V), 0, row)
        many = np.zeros(64, np.int32)
        _, out = jit_draw(
            state, many, np.zeros((64, V), np.float32), np.arange(64, dtype=np.int32), many == 0, most=ALL
        )
        found.add(tuple(np.asarray(out.token_b).tolist()))
    assert len(found) == 3  # 2^40 + 1 and 1 are the same modulo 2^32


def test_uses_of_a_position_are_apart():
    """The token is use 0; what a draft needs are others."""
    slots = slots_of([CASES["hot"]])
    many = np.zeros(64, np.int32)
    rows = Rows(many, np.arange(64, dtype=np.int32), many == 0, most=ALL)

    @jax.jit
    def tokens(use):
        settings = row_settings(slots, rows)
        return sample(keys_at(settings, rows.position_b, use), jnp.zeros((64, V)), settings)[0]

    assert len({tuple(tokens(use).tolist()) for use in range(4)}) == 4


# --- extremes ------------------------------------------------------------------------------------------------------

EXTREME = {
    "cold": case({"temperature": 1e-10}),
    "colder than float32": case({"temperature": 1e-300}),
    "hotter than float32": case({"temperature": 1e300, "top_p": 0.5}),
    "all but one pushed away": case({**HOT, "logit_bias": {i: -100 for i in range(V) if i != 6}}),
    "a mask with one id": case(HOT, allowed=frozenset({6}), answer=(6,) * 40),
    "one id is left, and penalised": case(
        {**HOT, "presence_penalty": 2, "frequency_penalty": 2}, allowed=frozenset({6}), answer=(6,) * 5000
    ),
    "the strongest penalty": case({**HOT, "repetition_penalty": 1e300}),
    "the strongest reward": case({**HOT, "repetition_penalty": 1e-300}),
    "the smallest nucleus": case({**HOT, "top_p": 1e-50, "min_p": 1.0, "top_k": 1}),
}


@pytest.mark.parametrize("scale", [1.0, 1e4, 0.0])
@pytest.mark.parametrize("by_row", [False, True])
def test_extremes_give_numbers(scale, by_row):
    cases = [*EXTREME.values(), *CASES.values()]
    logits = np.tile(LOGITS * np.float32(scale), (len(cases), 1))
    logits[:, 1] = -np.inf  # a model that leaves a token out
    rows, slots = rows_of(cases), slots_of(cases)
    most = None if by_row else ALL
    _, out = jit_draw(slots, *rows[:1], logits, *rows[1:4], np.int32(15), most=most)
    assert np.isfinite(out.sampled_b).all() and (np.asarray(out.sampled_b) <= 1e-6).all()
    token = dict(zip(EXTREME, np.asarray(out.token_b).tolist(), strict=False))
    assert all(np.asarray(out.token_b) < 15)
    assert token["a mask with one id"] == token["one id is left, and penalised"] == 6
    if scale == 1.0:
        assert token["cold"] == token["colder than float32"] == token["the smallest nucleus"] == LIKELIEST
        assert token["all but one pushed away"] == 6
    assert np.isfinite(out.logprob_b).all() or scale == 1e4  # of tokens that such logits leave no float32 for


def test_a_cut_holds_in_a_program_that_computes_a_logit_twice():
    """An optimised one rounds the product of a penalty before the sum in one place and not in another: an ulp apart. Where the
    cut compared the two, the last token inside was lost, here one of two with probabilities 0.47 and 0.53."""
    settings = {"temperature": 1.7402284083041348, "top_p": 0.44286633471961256, "top_k": 11}
    penalties = {"repetition_penalty": 1.385240402698712, "frequency_penalty": 0.851563758919311}
    prompt, answer = (7, 13, 5, 10, 8, 4, 3), (14, 5, 3, 9, 12, 15, 4, 14, 13, 6, 5, 4, 5, 14, 4, 7)
    request = Request(
        "r", prompt, 9, Sampling(**settings, **penalties, min_p=0.17, logit_bias={6: 1.7767163197})
    )
    one = oracle.Case(request, answer, frozenset({2, 4, 6, 7, 13, 15}))
    logits = np.random.default_rng(2).normal(0, 2, V).astype(np.float32)
    rows = jax.tree.map(lambda x: np.repeat(x, N, axis=0), rows_of([one]))
    args = (
        slots_of([one]),
        rows.slot_b,
        np.tile(logits, (N, 1)),
        np.arange(40, 40 + N, dtype=np.int32),
        *rows[2:4],
    )
    optimised = {"xla_backend_optimization_level": 3}
    if jax.__version_info__ < (0, 11):
        optimised["xla_cpu_use_fusion_emitters"] = True
    _, out = jit_draw.lower(*args, most=ALL).compile(compiler_options=optimised)(*args)
    want = oracle.distribution(logits, one)
    assert oracle.p_value(np.bincount(out.token_b, minlength=V), want) > 1e-5


def test_top_k_of_one_keeps_what_ties_with_it():
    one = case({**HOT, "top_k": 1})
    logits = np.tile(LOGITS, (1, 1))
    logits[0, [2, 6]] = LOGITS.max() + 1
    check(_distribution(slots_of([one]), rows_of([one]), logits), logits, [one])


def test_a_grammar_that_allows_only_what_is_not_known_is_not_heard():
    one = case(HOT, allowed=frozenset({14, 15}), num_ids=14)
    got = _distribution(slots_of([one]), rows_of([one], np.int32(14)), LOGITS[None])
    assert (np.isfinite(got)[0] == (np.arange(V) < 14)).all()
    check(got, LOGITS[None], [one])


@pytest.mark.parametrize("by_row", [False, True])
def test_masks_are_heard_of_rows_that_have_one(by_row):
    cases = [case(HOT, allowed=GRAMMAR), case(HOT, allowed=None), case(allowed=GRAMMAR)]
    rows, logits = rows_of(cases), np.tile(LOGITS, (3, 1))
    rows = rows._replace(mask_bw=np.tile(rows.mask_bw[:1], (3, 1)), masked_b=np.array([True, False, True]))
    check(_distribution(slots_of(cases), rows, logits, by_row=by_row), logits, cases)
    _, out = jit_draw(
        slots_of(cases[2:]),
        *(x[2:] for x in (rows.slot_b * 0, logits, *rows[1:4])),
        masked_b=rows.masked_b[2:],
    )
    assert int(out.token_b[0]) == SECOND  # a batch of greedy rows


# --- log-probabilities -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vocab", [500, 12])
def test_log_probabilities_equal_float64(vocab):
    """Of given tokens, and of the likeliest. Float32 logits up to 40 and sums of 500 numbers: 40 * 2^-24 and 500 * 2^-24."""
    rng = np.random.default_rng(2)
    logits = rng.normal(0, 10, (6, vocab)).astype(np.float32)
    tokens = rng.integers(0, vocab, 6).astype(np.int32)
    want = np.log(np.stack([oracle.probabilities(row) for row in logits.astype(np.float64)]))
    own, ids, top = jax.jit(given, static_argnums=2)(logits, tokens, TOP)
    np.testing.assert_allclose(own, want[np.arange(6), tokens], atol=3e-5)
    n = min(TOP, vocab)
    order = np.argsort(-want, axis=-1)[:, :n]
    assert (np.asarray(ids)[:, :n] == order).all() and ids.dtype == jnp.int32
    np.testing.assert_allclose(top[:, :n], np.take_along_axis(want, order, axis=-1), atol=3e-5)
    assert (np.asarray(top)[:, n:] == -np.inf).all()


@pytest.mark.parametrize("most", [None, ALL])
def test_alternatives_are_of_the_models_own(most):
    """Before any setting, of the rows that ask; ids that the tokenizer does not know are not named."""
    cases = [case({**HOT, "logit_bias": {1: 50}}, logprobs=3), case(HOT, logprobs=0), case()]
    rows = rows_of(cases)
    _, out = jit_draw(
        slots_of(cases), *rows[:1], np.tile(LOGITS, (3, 1)), *rows[1:4], np.int32(10), most=most
    )
    own = np.log(oracle.probabilities(LOGITS.astype(np.float64)))
    assert np.asarray(out.top_ids_bk)[0, :10].tolist() == np.argsort(-own[:10], kind="stable").tolist()
    np.testing.assert_allclose(out.top_logprobs_bk[0, :10], np.sort(own[:10])[::-1], atol=2e-6)
    if most is None:
        assert not np.asarray(out.top_ids_bk)[1:].any() and not np.asarray(out.top_logprobs_bk)[1:].any()


@pytest.mark.parametrize("most", [None, ALL])
def test_what_could_be_drawn(most):
    """Of rows that ask, each of all cases in one batch; others have zeros where the program branches."""
    cases = [one._replace(request=dataclasses.replace(one.request, kept=True)) for one in CASES.values()]
    cases.append(CASES["hot"])
    rows, logits = rows_of(cases), np.tile(LOGITS, (len(cases), 1))
    _, out = jit_draw(slots_of(cases), rows.slot_b, logits, *rows[1:4], most=most)
    got = np.asarray(unpacked(out.kept_bw, V))
    for could, token, one in zip(got[:-1], np.asarray(out.token_b), cases[:-1], strict=False):
        assert (could == (oracle.distribution(LOGITS, one) > 0)).all() and could[token]
    assert got[-1].any() == (most is not None)


def test_masks_are_bits():
    rng = np.random.default_rng(3)
    for vocab in (1, 64, 100):
        mask = rng.random((4, vocab)) < 0.5
        got = np.asarray(packed(mask))
        assert got.shape == (4, words(vocab)) and got.dtype == np.uint32
        bytes_ = np.packbits(np.pad(mask, ((0, 0), (0, -vocab % 32))), axis=-1, bitorder="little")
        assert (got == bytes_.view("<u4")).all() and (np.asarray(unpacked(got, vocab)) == mask).all()


# --- what it costs -----------------------------------------------------------------------------------------------------


def primitives(most) -> list[str]:
    """Of a draw of two rows, those of inner programs too."""
    slots = jax.eval_shape(lambda: empty_slots(4, 64))
    row = np.zeros(2, np.int32)
    jaxpr = jax.make_jaxpr(functools.partial(draw_rows, most=most))(
        slots, row, np.zeros((2, 64), np.float32), row, row == 0
    )
    return [equation.primitive.name for equation in equations(jaxpr.jaxpr)]


def test_the_programs_of_gpus_have_what_is_asked_for():
    """No branch and no loop in any of them; one sort serves all cuts, and one of few tokens the alternatives."""
    programs = {most: primitives(most) for most in (GREEDY, DRAWN, FILTERED, ALL)}
    for most, found in programs.items():
        assert not {"cond", "while", "scan"} & set(found)
        sorts = {
            FILTERED: 1,
            ALL: 3,
        }  # of ALL the compiler makes two: what is drawn, and what could be, are cut alike
        assert found.count("top_k") == sorts.get(most, 0) and "sort" not in found
        assert ("random_bits" in found) == (most >= DRAWN)
    assert len(programs[GREEDY]) < len(programs[DRAWN]) < len(programs[FILTERED]) < len(programs[ALL])


def test_the_state_is_small_and_is_not_copied():
    """DeepSeek-V3's vocabulary and 64 slots: 43 MB. A draw gives the state back where it lay, and needs less than its counts."""
    shapes = jax.eval_shape(lambda: empty_slots(64, 129_280))
    total = sum(int(np.prod(x.shape)) * x.dtype.itemsize for x in shapes)
    assert total < 43.1e6
    row = jax.ShapeDtypeStruct((2,), jnp.int32)
    jitted = jax.jit(draw_rows, donate_argnums=0)
    compiled = jitted.lower(
        shapes, row, jax.ShapeDtypeStruct((2, 129_280), jnp.float32), row, jax.ShapeDtypeStruct((2,), bool)
    ).compile()
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= total
    assert memory.temp_size_in_bytes < 64 * 129_280 * 4


def test_a_request_sends_what_it_asks_for():
    """Two structures, so two programs write a slot; that of a plain request has a few kilobytes."""
    rows = {name: of_request(one.request, one.answer, 129_280) for name, one in CASES.items()}
    assert len({jax.tree.structure(row) for row in rows.values()}) == 2
    for name in ("greedy", "all", "hot", "bias", "top_p", "grammar"):
        size = sum(x.nbytes for x in jax.tree.leaves(rows[name]))
        assert size < 10_000 or name == "all"
    assert {tuple((x.shape, x.dtype) for x in row if x is not None) for row in rows.values()}.__len__() == 2


def test_a_slot_forgets_its_last_request():
    slots = slots_of([CASES["all"]])
    slots = jit_put(slots, 0, of_request(CASES["greedy"].request, (), V))
    for name, got, want in zip(slots._fields, slots, empty_slots(1, V), strict=True):
        if name != "free_from_s":
            np.testing.assert_array_equal(got, want, err_msg=name)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"sampling": Sampling(logit_bias={16: 1})},
            r"logit_bias has token id 16, outside \[0, vocab_size=16\)",
        ),
        ({"seed": 1.5}, "seed=1.5 must be an integer"),
    ],
)
def test_requests_that_can_not_run(options, message):
    with pytest.raises(ValueError, match=message):
        Request("r", [1], 5, **options).check(16, 100)
