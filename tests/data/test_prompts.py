"""Prompts and their columns, their order, and the side of the split on which each is."""

import json

import numpy as np
import pytest

from deepseek_jax.data import prompts
from deepseek_jax.data.held_out import share

VERL = {
    "data_source": "openai/gsm8k",
    "prompt": [{"role": "user", "content": "2 + 2?"}],
    "ability": "math",
    "reward_model": {"style": "rule", "ground_truth": "4"},
    "extra_info": {"index": 7},
}


@pytest.fixture
def load(tokenizer, tmp_path):
    def load(*sources, **settings):
        names = []
        for i, (rows, weight) in enumerate(sources):
            (tmp_path / f"{i}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            names.append(f"{tmp_path}/{i}.jsonl={weight}")
        return prompts.load(prompts.PromptConfig(sources=tuple(names), **settings), tokenizer)

    return load


def asked(i):
    return {"prompt": f"What is {i}?", "answer": str(i)}


def test_rows_become_prompts_with_columns(tokenizer):
    question = {"role": "user", "content": "2 + 2?"}
    answer = {"role": "assistant", "content": "4"}
    system = {"role": "system", "content": "Be brief."}
    ids = tokenizer.encode_chat([question])
    for row, prompt, columns, want in (
        ({"prompt": "2 + 2?", "answer": "4"}, "2 + 2?", {"answer": "4"}, tokenizer.encode("2 + 2?")),
        ({"prompt": [question], "answer": 4}, [question], {"answer": 4}, ids),
        ({"messages": [question, answer], "n": 1}, [question], {"n": 1, "completion": [answer]}, ids),
        ({"messages": [question]}, [question], {}, ids),
        (VERL, VERL["prompt"], {k: v for k, v in VERL.items() if k != "prompt"} | {"ground_truth": "4"}, ids),
        ({"prompt": [system, question]}, [system, question], {}, tokenizer.encode_chat([system, question])),
    ):
        (made,) = prompts.prompts_of([prompts.Row("f:1", row)], tokenizer)
        assert (made.prompt, made.columns, made.ids.tolist()) == (prompt, columns, want)
        assert made.name == "f:1" and made.ids.dtype == np.int32
        # A question is on one side, whatever stands before it and whichever kind of row it is in.
        assert made.share == share("2 + 2?")


@pytest.mark.parametrize(
    ("row", "error"),
    [
        ({"question": "?"}, r'f:3: no "prompt" and no "messages": \[\'question\'\]'),
        ({"prompt": "  "}, "f:3: the prompt is empty"),
        ({"prompt": []}, "f:3: messages=.* should be a list of messages"),
        ({"prompt": 3}, "f:3: messages=3 should be a list of messages"),
        ({"prompt": [{"role": "assistant", "content": "4"}]}, "f:3: the prompt ends with an answer"),
        ({"messages": [{"role": "assistant", "content": "4"}]}, "f:3: there is no message before the answer"),
        ({"prompt": [{"role": "user"}]}, "f:3: message 0 is .*role"),
        ({"prompt": [{"role": "user", "content": "?"}], "tools": "{"}, "f:3: tools='{' is no JSON"),
        (
            {"prompt": [{"role": "user", "content": "?"}], "tools": [{}]},
            "f:3: tools: the chat template does not",
        ),
    ],
)
def test_no_prompt_is_an_error_with_its_line(tokenizer, row, error):
    with pytest.raises(ValueError, match=error):
        prompts.prompts_of([prompts.Row("f:3", row)], tokenizer)


def test_an_epoch_has_each_prompt_once_in_an_order_of_its_own(load):
    made = load((map(asked, range(50)), 1), seed=3)
    names = [p.name for p in made.train.take(2 * len(made.train))]
    first, second = names[: len(made.train)], names[len(made.train) :]
    assert sorted(first) == sorted(second) == sorted({*first})
    assert first != second and first != sorted(first)
    assert [p.name for p in load((map(asked, range(50)), 1), seed=4).train.take(9)] != first[:9]
    held = {p.name for p in made.validation}
    assert held and not held & {*first} and len(held) + len({*first}) == 50
    assert {p.share < 0.1 for p in made.validation} == {True}
    assert made.report.summary() == f"{50 - len(held)} prompts, {len(held)} held out"


def test_sources_take_turns_by_weight(load):
    taken = load((map(asked, range(40)), 3), (map(asked, range(100, 105)), 1)).train.take(80)
    assert [p.name.rpartition("/")[2][0] for p in taken].count("1") == 20


def test_a_stream_goes_on_from_its_state(load):
    sources = (map(asked, range(40)), 3), (map(asked, range(100, 105)), 1)
    sources = tuple((list(rows), weight) for rows, weight in sources)
    stream = load(*sources).train
    stream.take(33)
    state = json.loads(json.dumps(stream.state()))
    want = [p.name for p in stream.take(50)]
    again = load(*sources).train
    again.restore(state)
    assert [p.name for p in again.take(50)] == want
    with pytest.raises(ValueError, match="other prompts: prompts was"):
        load((map(asked, range(41)), 3), sources[1]).train.restore(state)
    with pytest.raises(ValueError, match="other prompts: seed was 0, is now 1"):
        load(*sources, seed=1).train.restore(state)
    with pytest.raises(ValueError, match="not a state of prompts"):
        again.restore({"taken": 3})


def test_validation_in_files_of_its_own_and_long_prompts(load, tmp_path):
    (tmp_path / "held.jsonl").write_text("\n".join(json.dumps(asked(i)) for i in (3, 5, 1000)))
    long = {"prompt": "why " * 100}
    made = load(([*map(asked, range(9)), long], 1), validation=str(tmp_path / "held.jsonl"), max_tokens=50)
    assert [p.columns["answer"] for p in made.validation] == ["3", "5", "1000"]
    assert sorted(p.columns["answer"] for p in made.train.take(7)) == list("0124678")
    assert "1 longer than 50 tokens, refused: " in made.report.summary()
    assert "2 that ask what validation asks, left out: " in made.report.summary()
    assert "0.jsonl:10 (" in made.report.summary()
    with pytest.raises(ValueError, match=r"no prompt fits prompts.max_tokens=1: .*0.jsonl:1: longer than 1"):
        load((map(asked, range(9)), 1), max_tokens=1)
    with pytest.raises(ValueError, match="all rows ask the same"):
        load(([asked(1), asked(1)], 1))
