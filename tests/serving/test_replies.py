"""What a client reads does not depend on how the text came in tokens, and nothing of it is lost."""

import itertools

import numpy as np
import pytest

from deepseek_jax.serving.dialects import CALL, CALLS, DIALECTS, END_CALL, END_CALLS, SEP, V3_CALL, V31_CALL
from deepseek_jax.serving.replies import Delta, Reply, Speller
from tests.serving.answers import byte_ids, cut, read, shown, tokenizer, tokens

WEATHER = '{"city": "Köln", "days": [1, 2]}'
V3 = CALLS + V3_CALL.write("get_weather", WEATHER) + END_CALLS
V31 = CALLS + V31_CALL.write("get_weather", WEATHER) + END_CALLS
ONE = [(0, "get_weather", WEATHER)]

# name -> (dialect, thinking, text, content, reasoning, calls)
ANSWERS = {
    "plain": ("none", "none", " the ± 木\n", " the ± 木\n", "", []),
    "tags without a dialect": ("none", "none", f"<think>a</think>{V3}", f"<think>a</think>{V3}", "", []),
    "the prompt opened it": ("r1", "open", "\nso\n\n</think>\n\nYes.\n", "Yes.\n", "so", []),
    "the model opens it": ("r1", "possible", "\n<think>\n so it </thin </think> Yes", "Yes", "so it </thin", []),
    "nobody opens it": ("r1", "possible", " <thin > Yes </think>", " <thin > Yes </think>", "", []),
    "never closed": ("r1", "open", "\nso it \n", "", "so it \n", []),
    "nothing in it": ("r1", "open", "\n</think>\n", "", "", []),
    "closed at once": ("r1", "possible", "<think></think>Yes", "Yes", "", []),
    "opened twice": ("r1", "open", "a<think>b</think>c</think>", "c</think>", "a<think>b", []),
    "a call": ("v3", "none", f"I look.\n{V3}", "I look.\n", "", ONE),
    "a call of V3.1": ("v3.1", "none", f"I look.\n{V31}", "I look.\n", "", ONE),
    "a call after reasoning": ("r1", "open", f"so\n</think>\n\n{V3}", "", "so", ONE),
    "a call in the reasoning": ("r1", "open", f"so {V3}", "", f"so {V3}", []),
    "no arguments": ("v3", "none", CALLS + V3_CALL.write("now", "{}") + END_CALLS, "", "", [(0, "now", "{}")]),
    "no arguments, V3.1": ("v3.1", "none", CALLS + V31_CALL.write("now", "{}") + END_CALLS, "", "", [(0, "now", "{}")]),
    "two calls": (
        *("v3", "none"),
        f"{CALLS}{V3_CALL.write('a', '{}')}\n{V3_CALL.write('b', WEATHER)}\n{END_CALLS}\nDone",
        *("\nDone", "", [(0, "a", "{}"), (1, "b", WEATHER)]),
    ),
    "two lists of calls": ("v3.1", "none", V31 + " and " + V31, " and ", "", [*ONE, (1, *ONE[0][1:])]),
    "the list has no begin": ("v3", "none", V3_CALL.write("a", "{}"), "", "", [(0, "a", "{}")]),
    "the list has no end": ("v3", "none", V3.removesuffix(END_CALLS) + "\n", "", "", ONE),
    "text in the list": ("v3", "none", V3.replace(END_CALLS, f"\n or {END_CALLS}"), f"\n or {END_CALLS}", "", ONE),
    "a fence and json of V3 in V3.1": ("v3.1", "none", f"{CALLS}{CALL}a{SEP}```json\n{{}}\n```{END_CALL}", "", "", [(0, "a", "{}")]),
    "fences in the arguments": (
        *("v3", "none", CALLS + V3_CALL.write("a", '{"md": "```json\\n{}\\n```"}') + END_CALLS, "", ""),
        [(0, "a", '{"md": "```json\\n{}\\n```"}')],
    ),
}  # fmt: skip
# What is no call comes back as it stands there.
BROKEN = {
    "unfinished": V3[:-40],
    "a name alone": f"{CALLS}{CALL}function{SEP}get",
    "the marker alone": CALLS,
    "an empty list": CALLS + END_CALLS,
    "no JSON": V3.replace("[1, 2]", "[1, 2"),
    "no object": V3.replace(WEATHER, "[1]"),
    "a number that is none": V3.replace("[1, 2]", "NaN"),
    "no name": V3.replace("get_weather", ""),
    "no separator": V3.replace(SEP, " "),
    "a call in a call": f"{CALLS}{CALL}function{SEP}{CALLS} ",
    "calls of V3.1": V31,
    "ends alone": f"{END_CALL}{END_CALLS}{SEP}",
    "begins twice": f"{CALLS}{CALLS}",
    "half a marker": "look: <｜tool▁call",
}
for name, text in BROKEN.items():
    ANSWERS[name] = ("v3", "none", text, text, "", [])
ANSWERS |= {
    "a broken call before a good one": (
        *("v3", "none", BROKEN["no JSON"].removesuffix(END_CALLS) + V3.removeprefix(CALLS)),
        *(BROKEN["no JSON"].removesuffix(END_CALLS), "", ONE),
    ),
    "an unfinished call after a good one": ("v3", "none", V3.removesuffix(END_CALLS) + CALL + "f", CALL + "f", "", ONE),
}  # fmt: skip


@pytest.mark.parametrize("name", ANSWERS)
def test_any_cutting_gives_the_same(name):
    dialect, thinking, text, content, reasoning, calls = ANSWERS[name]
    rng = np.random.default_rng(len(text))
    want = (content, reasoning, calls, "tool_calls" if calls else "stop")
    for trial in range(12):
        own = tokenizer(special=trial % 2 == 0)
        ids = cut(text, rng, own, whole=trial % 3 > 0)
        if trial % 3 and trial % 2 == 0 and dialect == "none":
            continue  # special tokens that no dialect knows are left out
        sizes = iter(lambda: int(rng.integers(1, 9)), None) if trial else itertools.repeat(10**6)
        reply, deltas = read(ids, sizes, dialect, own, thinking=thinking, tools=True)
        assert shown(reply) == want
        assert "".join(d.content for d in deltas) == content
        assert "".join(d.reasoning for d in deltas) == reasoning
        given = [call for d in deltas for call in d.calls]
        assert given == reply.calls and len({call.id for call in given}) == len(given)
        assert reply.count == len(ids) and not reply.ended


def test_begin_and_end_of_a_call_in_one_delta():
    """vllm#48020: such a call was dropped."""
    reply = Reply(tokenizer(), dialect=DIALECTS["v3"], tools=True)
    delta = reply.push(tokens(tokenizer().encode(V3, allow_special=True)))
    assert [(c.name, c.arguments) for c in delta.calls] == [("get_weather", WEATHER)]
    assert reply.close("stop") == Delta() and reply.finish_reason == "tool_calls"


def test_empty_arguments_come_out_when_streamed():
    """sglang#18236: `{}` was lost, one token at a time."""
    for dialect, form in (("v3", V3_CALL), ("v3.1", V31_CALL)):
        text = CALLS + form.write("now", "{}") + END_CALLS
        reply, _ = read(tokenizer().encode(text, allow_special=True), dialect=dialect, tools=True)
        assert [c.arguments for c in reply.calls] == ["{}"]


def test_the_fence_is_no_part_of_the_arguments():
    """`json` came before the arguments where V3's calls were read as V3.1's."""
    for dialect, text in (("v3", V3), ("v3.1", ANSWERS["a fence and json of V3 in V3.1"][2])):
        reply, _ = read(tokenizer().encode(text, allow_special=True), dialect=dialect, tools=True)
        (call,) = reply.calls
        assert call.arguments.startswith("{") and call.arguments.endswith("}")


def test_calls_are_content_where_no_tools_are_given():
    for special, want in ((False, V3), (True, None)):
        own = tokenizer(special)
        reply, _ = read(own.encode(V3, allow_special=True), dialect="v3", own=own, tools=False)
        assert not reply.calls and reply.finish_reason == "stop"
        assert reply.content == (want or own.decode(own.encode(V3, allow_special=True), skip_special=True))


def test_stop_strings_end_the_answer_not_the_reasoning():
    """vllm#3574, vllm#14399: one in the reasoning ended it."""
    text = "\nfirst STOP then\n</think>\n\nthe STOP never"
    rng = np.random.default_rng(0)
    for _ in range(20):
        ids = cut(text, rng, tokenizer())
        reply, _ = read(ids, None, "r1", thinking="open", stop=("STOP",))
        assert shown(reply) == ("the ", "first STOP then", [], "stop") and reply.ended
        before = [tokenizer().decode(ids[:n]).count("STOP") for n in (reply.count - 1, reply.count)]
        assert before == [1, 2]
        kept, _ = read(ids, None, "r1", thinking="open", stop=("STOP",), include_stop=True)
        assert kept.content == "the STOP" and kept.count == reply.count


def test_a_stop_string_in_what_was_no_call():
    """Known late, it ends the answer where it stands all the same, and counts the tokens up to there."""
    rng = np.random.default_rng(1)
    for text, want in ((f"a{CALLS}{CALL}x STOP{END_CALL} b STOP", f"a{CALLS}{CALL}x "), ("a STOP b", "a ")):
        for _ in range(10):
            ids = cut(text, rng, tokenizer())
            reply, deltas = read(
                ids, iter(lambda: int(rng.integers(1, 9)), None), "v3", tools=True, stop=("STOP",)
            )
            assert reply.content == "".join(d.content for d in deltas) == want and reply.ended
            assert "STOP" in tokenizer().decode(ids[: reply.count])
            assert "STOP" not in tokenizer().decode(ids[: reply.count - 1])


def test_stop_strings_are_not_looked_for_in_calls_nor_across_them():
    text = f"weat{V3}her and }}"
    reply, _ = read(
        tokenizer().encode(text, allow_special=True), None, "v3", tools=True, stop=("weather", "city")
    )
    assert reply.content == "weather and }" and len(reply.calls) == 1 and not reply.ended


def test_only_what_may_begin_a_marker_is_held_back():
    own = tokenizer()
    reply = Reply(own, dialect=DIALECTS["v3"], tools=True)
    given = [reply.push(tokens(own.encode(c))).content for c in "a<|<｜tool▁sep"]
    assert given == ["a", "", "<|", "", "", "", "", "", "", "", "<｜tool▁s", "e", "p"]


@pytest.mark.parametrize("stop", [(), ("zz", "\n\n")])
def test_characters_come_whole_and_once(stop):
    """sglang#31598: U+FFFD for bytes that were to come, and the character again after it."""
    text = "日本 é 🙂 e\u0301 \ufffd 木" * 3
    own = tokenizer()
    reply, deltas = read(byte_ids(own, text.encode()), stop=stop)
    assert "".join(d.content for d in deltas) == reply.content == text
    assert sum("\ufffd" in d.content for d in deltas) == 3  # the text's own


def test_ids_that_end_a_generation_have_no_text():
    own = tokenizer()
    ids = [*own.encode("a ±"), own.eos_id]
    assert read(ids)[0].content == "a ±"
    assert read(ids, silent=None)[0].content == "a ±" + own.token(own.eos_id)


def test_pieces_of_tokens():
    own, speller = tokenizer(), Speller(tokenizer())
    ids = [*own.encode("is é"), *byte_ids(own, "日".encode()), own.eos_id]
    reply = Reply(own, speller=speller)
    pieces = [reply.push([t._replace(top=((5, -0.5), (t.id, -1.0)))]).pieces[0] for t in tokens(ids)]
    text = reply.content
    assert [p.token.id for p in pieces] == ids and text == "is é日"
    assert b"".join(p.token.raw for p in pieces[:-1]) == text.encode()
    assert [p.token.text for p in pieces[-4:-1]] == ["bytes:\\xe6", "bytes:\\x97", "bytes:\\xa5"]
    assert all(text[p.offset :].startswith(p.token.text) for p in pieces[:2])
    assert [p.offset for p in pieces[-4:]] == [4, 4, 4, 5]
    assert pieces[0].top == (speller(5, -0.5), speller(ids[0], -1.0)) and pieces[0].token.logprob == -1.0
