"""A stream that was broken off and begun anew gives what the whole stream does."""

import random

import pytest

from deepseek_jax.serving.router.told import DiffersError, Told

IDS = list(range(40))


def completion(draw, n=2, begun="a"):
    """Events of two choices of 40 tokens, cut anyhow: text, ids, log-probabilities, and usage at the end."""
    events, at, held = [], [0] * n, [""] * n
    while any(i < len(IDS) for i in at):
        index = draw.choice([i for i in range(n) if at[i] < len(IDS)])
        first, size = at[index], draw.randrange(1, 6)
        ids = [i + 100 * index for i in IDS[first : first + size]]
        at[index] += len(ids)
        text = held[index] + "".join(f"<{i}>" for i in ids)
        last = at[index] >= len(IDS)
        keep = 0 if last else draw.randrange(0, 4)  # characters that are held back
        text, held[index] = text[: len(text) - keep], text[len(text) - keep :]
        logprobs = {"tokens": [str(i) for i in ids], "token_logprobs": [draw.random() for _ in ids]}
        choice = {"index": index, "text": text, "token_ids": ids, "logprobs": logprobs, "finish_reason": None}
        if first == 0:
            choice["prompt_token_ids"] = [1, 2]
        choice["finish_reason"] = "length" if last else None
        events.append({"id": begun, "created": ord(begun), "model": "m", "choices": [choice]})
    return [*events, {"id": begun, "created": ord(begun), "model": "m", "choices": [], "usage": {"n": 1}}]


def joined(events, n=2):
    found = [{"text": "", "ids": [], "tokens": [], "logprobs": 0, "ends": [], "prompt": 0} for _ in range(n)]
    for event in events:
        for choice in event["choices"]:
            own = found[choice["index"]]
            own["text"] += choice["text"]
            own["ids"] += choice["token_ids"]
            own["tokens"] += choice["logprobs"]["tokens"]
            own["logprobs"] += len(choice["logprobs"]["token_logprobs"])
            own["ends"] += [choice["finish_reason"]] if choice["finish_reason"] else []
            own["prompt"] += bool(choice.get("prompt_token_ids"))
    return found


@pytest.mark.parametrize("seed", range(30))
def test_a_stream_that_breaks_any_number_of_times(seed):
    draw = random.Random(seed)
    told, got = Told(), []
    for life in "abc":
        events = completion(draw, begun=life)
        told.begin()
        for event in events[: draw.randrange(len(events)) if life != "c" else None]:
            new = told.new(event)
            if new is not None:
                got.append(new)
                assert life != "a" or new is event
    assert told.new(events[-1]) is None  # usage, of a stream that breaks behind it
    assert joined(got) == joined(completion(draw))
    assert {(e["id"], e["created"]) for e in got} == {(got[0]["id"], got[0]["created"])}


def chat(*deltas, id="a"):
    return [{"id": id, "choices": [{"index": 0, "delta": delta, "finish_reason": None}]} for delta in deltas]


def call(id, arguments="{}"):
    return {"index": 0, "id": id, "type": "function", "function": {"name": "f", "arguments": arguments}}


def test_turns_with_reasoning_and_calls():
    told = Told()
    told.begin()
    first = chat(
        {"role": "assistant", "content": ""},
        {"reasoning": "hm", "reasoning_content": "hm"},
        {"tool_calls": [call("x")]},
    )
    assert [told.new(e) for e in first] == first
    told.begin()
    assert told.new(chat({"role": "assistant", "content": ""})[0]) is None
    again = told.new(chat({"reasoning": "hmm.", "reasoning_content": "hmm."}, id="b")[0])
    assert again == chat({"reasoning": "m.", "reasoning_content": "m."})[0]
    assert told.new(chat({"tool_calls": [call("y")]})[0]) is None  # its id was drawn anew
    assert told.new(chat({"content": "so"}, id="b")[0]) == chat({"content": "so"})[0]


@pytest.mark.parametrize("other", [{"tool_calls": [call("y", "[]")]}, {"content": "b"}, {"reasoning": "c"}])
def test_another_answer(other):
    told = Told()
    told.begin()
    for event in chat({"content": "a", "reasoning": "a"}, {"tool_calls": [call("x")]}):
        told.new(event)
    told.begin()
    with pytest.raises(DiffersError):
        told.new(chat(other)[0])
