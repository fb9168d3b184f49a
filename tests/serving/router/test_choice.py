"""Which servers get a request: by load, by prefix, the same always, and none that is lost."""

import random

import pytest

from deepseek_jax.serving.router.choice import Ask, Choice, Load
from deepseek_jax.serving.router.prefix import ask_of

ROOMY = Load(tokens=64_000, rows=32)


def fleet(prefill=2, decode=2, **loads):
    choice = Choice(silence=10)
    for role, many in (("prefill", prefill), ("decode", decode)):
        for i in range(many):
            name = f"{role[0]}{i}"
            choice.heard(name, role, loads.get(name, ROOMY), now=0)
    return choice


def ask(tokens, first="x"):
    return Ask([(first, i) for i in range(tokens // 64)], tokens)


def pair(choice, *args, **kwargs):
    sent = choice.send(*args, **kwargs)
    return None if sent is None else (sent.prefill, sent.decode)


def test_equals_are_taken_by_name_and_what_was_sent_counts():
    choice = fleet()
    assert [pair(choice, ask(640, i)) for i in range(4)] == [("p0", "d0"), ("p1", "d1")] * 2


def test_prefill_goes_where_the_fewest_tokens_are_computed_before():
    choice = fleet(p0=Load(queued=1000), p1=Load(queued=900))
    first = choice.send(ask(640, "a"))
    assert first.prefill == "p1" and first.uncached == 640
    assert choice.send(ask(64, "b")).prefill == "p0"  # 1000 before it, and 1540
    choice.prefilled(first)
    assert choice.send(ask(64, "c")).prefill == "p1"  # 900 now, and 1064


def test_a_prefix_is_worth_what_it_saves_and_no_more():
    choice = fleet()
    long = ask(64_000)
    choice.ended(choice.send(long))
    choice.heard("p0", "prefill", Load(queued=10_000), now=1)
    again = choice.send(long)
    assert again.prefill == "p0" and again.uncached == 1  # one token at least is computed
    choice.heard("p0", "prefill", Load(queued=70_000), now=2)
    assert choice.send(long).prefill == "p1"


def test_the_first_block_that_is_missing_ends_a_prefix():
    choice = fleet(prefill=1)
    choice.ended(choice.send(Ask("abc", 192 + 7)))
    sent = choice.send(Ask("abxd", 256 + 7))
    assert sent.uncached == 256 + 7 - 128 == sent.held


def test_decode_goes_by_cache_and_requests():
    choice = fleet(d0=Load(held=32_000, tokens=64_000, rows=32), d1=Load(requests=17, tokens=64_000, rows=32))
    assert choice.send(ask(64, "a")).decode == "d0"  # 0.5 + 1/32 against 18/32
    assert choice.send(ask(64, "b")).decode == "d1"


def test_a_request_that_ended_leaves_nothing_behind():
    choice, draw = fleet(), random.Random(0)
    open_ = []
    for i in range(500):
        open_.append(choice.send(ask(draw.randrange(1, 5000), i)))
        if draw.random() < 0.5:
            open_[-1] = choice.prefilled(open_[-1])
        while len(open_) > draw.randrange(10):
            choice.ended(open_.pop(draw.randrange(len(open_))))
    for sent in open_:
        choice.ended(sent)
    assert {(s.requests, s.queued, s.held) for s in choice.servers.values()} == {(0, 0, 0)}


def test_a_lost_server_gets_nothing_until_it_is_heard_again():
    choice = fleet()
    first = choice.send(ask(640))
    choice.lost("p0")
    choice.lost("d0")
    assert pair(choice, ask(640)) == ("p1", "d1")
    choice.heard("p0", "prefill", ROOMY, now=5)
    choice.ended(first)  # of its former life: not counted now
    assert choice.servers["p0"].requests == 0 and choice.servers["p0"].queued == 0
    sent = choice.send(ask(640))
    assert (
        sent.prefill == "p0" and sent.uncached == 640
    )  # p1 would have 641 to do: p0 has computed nothing in this life


def test_silence_loses_a_server():
    choice = fleet()
    for name, role in (("p0", "prefill"), ("d1", "decode")):
        choice.heard(name, role, None, now=7)
    assert (
        choice.silent(now=10) == []
        and choice.silent(now=10.5) == ["p1", "d0"]
        and choice.silent(now=11) == []
    )
    assert pair(choice, ask(64)) == ("p0", "d1")


def test_who_answers_where_nobody_prefills():
    choice = fleet(prefill=1, decode=1)
    assert pair(choice, ask(64), without={"p0"}) == (None, "d0")
    assert pair(choice, ask(64), without={"d0"}) is None
    choice.heard("b0", "both", ROOMY, now=0)
    assert pair(choice, ask(64), without={"d0"}) == (None, "b0")
    choice.forget("p0")
    choice.lost("b0")
    assert pair(choice, ask(64)) == (None, "d0")
    choice.lost("d0")
    assert pair(choice, ask(64)) is None


def test_a_decode_server_that_cannot_prefill_waits_for_one_that_can():
    choice = fleet(prefill=1, decode=0)
    choice.heard("d0", "decode", ROOMY, now=0, alone=False)
    assert pair(choice, ask(64)) == ("p0", "d0")
    choice.lost("p0")
    assert pair(choice, ask(64)) is None


def test_memory_of_prefixes_is_bounded_and_keeps_their_beginnings():
    choice = fleet(prefill=1, p0=Load(tokens=640))
    choice.ended(choice.send(ask(64 * 30)))
    server = choice.servers["p0"]
    assert len(server._blocks) == 10 and server.hits(ask(64 * 30)) == 640


def test_wrong_values():
    with pytest.raises(ValueError, match=r"role='decoder' is not one of .*did you mean 'decode'"):
        Choice().heard("a", "decoder", None, now=0)
    with pytest.raises(ValueError, match="silence=0 must be positive"):
        Choice(silence=0)


# --- names of beginnings ----------------------------------------------------------------------------------------------


def common(one, other):
    pairs = zip(one.keys, other.keys, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one.keys), len(other.keys)))


def test_beginnings_of_token_ids():
    draw = random.Random(1)
    ids = [draw.randrange(1000) for _ in range(300)]
    whole = ask_of({"prompt": ids})
    assert len(whole.keys) == 4 and whole.tokens == 300
    assert common(whole, ask_of({"prompt": ids[:200] + [1] * 100})) == 3
    assert common(whole, ask_of({"prompt": [*ids[:3], 5000, *ids[4:]]})) == 0
    assert common(whole, ask_of({"prompt": ids, "cache_salt": "mine"})) == 0
    assert ask_of({"prompt": [ids, ids]}) == Ask(whole.keys, 600)


def test_beginnings_of_texts_and_turns():
    text = "the latent is shared; " * 100
    assert common(ask_of({"prompt": text}), ask_of({"prompt": text[:1000] + "!"})) == 3  # of 256 characters
    turns = [{"role": "user", "content": text}]
    more = [*turns, {"role": "assistant", "content": "yes"}, {"role": "user", "content": text}]
    first, second = ask_of({"messages": turns}), ask_of({"messages": more})
    assert common(first, second) == len(first.keys) == 8 and len(second.keys) > 16
    assert common(first, ask_of({"messages": turns, "tools": [{"type": "function"}]})) == 0


@pytest.mark.parametrize(
    "prompt", [None, 3, [], {}, [None], [1.5], [1 << 70], ["a", 3], [[], "x"], "\ud800" * 300]
)
def test_a_prompt_of_any_kind_has_an_ask(prompt):
    assert ask_of({"prompt": prompt}).tokens >= 0
