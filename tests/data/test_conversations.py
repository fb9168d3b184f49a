"""Rows become samples: what a sampler would have been given, and what it should have drawn."""

import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from deepseek_jax.data.chat import DEFAULT_TEMPLATE
from deepseek_jax.data.conversations import Conversations, answer_after
from deepseek_jax.data.row_fields import question_of
from deepseek_jax.data.rows import Row, of_row
from deepseek_jax.data.tokenizer import Tokenizer
from tests.data import templates
from tests.data.family import CHATML, FAMILY, make

QUESTION = {"role": "user", "content": "What is MLA?"}
AGAIN = {"role": "user", "content": "Why?"}
TRACE = {"role": "assistant", "content": "<think>Keys are many.</think>A low-rank cache."}
PLAIN = {"role": "assistant", "content": "Because 12 < 128."}
SYSTEM = {"role": "system", "content": "Be brief."}
CALL = {"type": "function", "function": {"name": "find", "arguments": '{"what": "MLA"}'}}
CALLS = {"role": "assistant", "content": None, "tool_calls": [CALL]}


@pytest.fixture(scope="module")
def with_template(tokenizer, tmp_path_factory):
    """Makes a tokenizer with a template, once each."""
    made = {}

    def make(template, name=""):
        if (template, name) not in made:
            folder = tmp_path_factory.mktemp("tokenizer")
            made[template, name] = templates.tokenizer_with(template, tokenizer, folder, name), folder
        return made[template, name][0]

    make.folder = lambda template, name="": made[template, name][1]
    return make


@pytest.fixture(scope="module")
def deepseek(with_template):
    """A small tokenizer with DeepSeek's own template."""
    return with_template(templates.deepseek())


def samples(tokenizer, row, learn="all"):
    conversations = Conversations(tokenizer, learn)
    return conversations.samples([conversations.turns(row)])[0]


def shown(tokenizer, row, learn="all"):
    """Of each sample, what is read and [what is learned], as text."""
    texts = []
    for ids, learned in samples(tokenizer, row, learn):
        pieces = np.split(ids, np.flatnonzero(np.diff(learned)) + 1)
        said = [bool(piece[0]) for piece in np.split(learned, np.flatnonzero(np.diff(learned)) + 1)]
        decoded = zip(map(tokenizer.decode, pieces), said, strict=True)
        texts.append("".join(f"[{text}]" if mark else text for text, mark in decoded))
    return texts


B, E, U, A = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"


def test_deepseeks_template_keeps_the_reasoning_that_is_learned(deepseek):
    """It deletes that of every answer when it renders a conversation; earlier answers lose theirs, as when sampling."""
    rendered = deepseek.chat_template.render([QUESTION, TRACE], add_generation_prompt=False)
    assert rendered == f"{B}{U}What is MLA?{A}A low-rank cache.{E}"
    row = {"messages": [SYSTEM, QUESTION, TRACE, AGAIN, PLAIN]}
    first = f"{B}Be brief.{U}What is MLA?{A}[<think>Keys are many.</think>A low-rank cache.{E}]"
    second = f"{B}Be brief.{U}What is MLA?{A}A low-rank cache.{E}{U}Why?{A}[Because 12 < 128.{E}]"
    assert shown(deepseek, row) == [first, second]
    assert shown(deepseek, row, "last") == [second]
    # Without reasoning, the second prompt begins with the first answer: one sample, each turn learned once.
    plain = {"messages": [QUESTION, PLAIN, AGAIN, PLAIN]}
    text = f"{B}{U}What is MLA?{A}[Because 12 < 128.{E}]{U}Why?{A}[Because 12 < 128.{E}]"
    assert shown(deepseek, plain) == [text]


def test_prompt_and_answer_are_what_a_sampler_would_see(deepseek, with_template):
    """The prompt's ids are those that generation encodes, the answer's are encoded behind them, not with them."""
    for tokenizer in (deepseek, with_template(CHATML)):
        for content in ("\nA line.", " spaced ", "don't", f"quoted {E} and <|im_end|>"):
            (one,) = samples(tokenizer, {"messages": [QUESTION, {"role": "assistant", "content": content}]})
            prompt = tokenizer.encode_chat([QUESTION])
            assert one.ids[: len(prompt)].tolist() == prompt and not one.learned[: len(prompt)].any()
            answer = one.ids[len(prompt) :].tolist()
            assert answer[:-1] == tokenizer.encode(content) and one.learned[len(prompt) :].all()
            assert answer[-1] in tokenizer.stop_ids and not {*answer[:-1]} & tokenizer.control_ids
            assert one.ids.dtype == np.int32 and one.learned.dtype == bool
    # "\n" ends ChatML's prompt; encoded together with an answer that begins with one, it is another token.
    tokenizer = with_template(CHATML)
    together = tokenizer.encode("assistant\n\nA line.", allow_special=True)
    assert together != tokenizer.encode("assistant\n") + tokenizer.encode("\nA line.")


def test_an_answer_has_its_own_text_behind_any_prompt(tmp_path):
    """Tokenizers that put a space before a text put none before an answer."""
    spaces = set()
    for name in FAMILY:
        tokenizer = Tokenizer.load(make(name, tmp_path / name))
        for answer in ("the cat", " the rat", "that killed the cat"):
            ((ids, learned),) = samples(tokenizer, {"prompt": "the malt", "completion": answer})
            prompt, said = ids[~learned], ids[learned][:-1]
            assert prompt.tolist() == tokenizer.encode_prompt("the malt") and ids[-1] == tokenizer.eos_id
            assert tokenizer.text_after(prompt, said) == answer, name
            if tokenizer.text_after(prompt, tokenizer.encode(answer)) != answer:
                spaces.add(name)
    assert spaces == {"metaspace", "metaspace_words", "llama_2", "sentencepiece"}


def test_rows_of_all_kinds(deepseek, tokenizer):
    answer = {"role": "assistant", "content": "Yes."}
    chat = f"{B}{U}What is MLA?{A}[Yes.{E}]"
    for row, want in (
        ({"messages": [QUESTION, answer]}, [chat]),
        ({"messages": [QUESTION, answer], "prompt": "What is MLA?", "text": None}, [chat]),
        ({"prompt": [QUESTION], "completion": [answer]}, [chat]),
        ({"prompt": "2 + 2 =", "completion": " 4"}, [f"2 + 2 =[ 4{E}]"]),
        ({"prompt": "2 + 2 =", "completion": f" 4{E}"}, [f"2 + 2 =[ 4{E}]"]),
        ({"messages": [QUESTION, answer, AGAIN]}, [chat]),
        ({"messages": [QUESTION, answer | {"content": [{"type": "text", "text": "Yes."}]}]}, [chat]),
        ({"messages": [QUESTION, answer | {"tool_calls": []}]}, [chat]),
        (
            {"messages": [QUESTION, answer | {"weight": 0}, AGAIN, answer | {"weight": 1}]},
            [f"{B}{U}What is MLA?{A}Yes.{E}{U}Why?{A}[Yes.{E}]"],
        ),
        # A prompt may hold answers: they are not the completion.
        (
            {"prompt": [QUESTION, answer, AGAIN], "completion": [answer]},
            [f"{B}{U}What is MLA?{A}Yes.{E}{U}Why?{A}[Yes.{E}]"],
        ),
    ):
        assert shown(deepseek, row) == want, row
    # A text is a document of pre-training: all of it is learned but its first token, which nothing comes before.
    (one,) = samples(deepseek, {"text": "Attention is all"})
    assert one.ids.tolist() == [*deepseek.encode("Attention is all"), deepseek.eos_id]
    assert one.learned.tolist() == [False] + [True] * (len(one.ids) - 1)


def test_tool_calls_are_learned_as_the_template_writes_them(deepseek, with_template):
    row = {"messages": [QUESTION, CALLS, {"role": "tool", "content": "{}"}, PLAIN]}
    marks = [f"<｜tool▁{name}｜>" for name in ("calls▁begin", "call▁begin", "sep", "call▁end", "calls▁end")]
    begin, one, sep, end, ends = marks
    text = (
        f'{B}{U}What is MLA?{A}[{begin}{one}function{sep}find\n```json\n{{"what": "MLA"}}\n```{end}{ends}{E}]'
    )
    outputs = "<｜tool▁outputs▁begin｜><｜tool▁output▁begin｜>{}<｜tool▁output▁end｜><｜tool▁outputs▁end｜>"
    assert shown(deepseek, row) == [f"{text}{outputs}[Because 12 < 128.{E}]"]
    assert {*map(deepseek.id_of, marks)} <= {*samples(deepseek, row)[0].ids.tolist()}
    silent = with_template(DEFAULT_TEMPLATE)
    with pytest.raises(ValueError, match="message 1: the chat template does not write its tool calls here"):
        samples(silent, {"messages": [QUESTION, {"role": "assistant", "content": "x", "tool_calls": [CALL]}]})
    with pytest.raises(ValueError, match="tools: the chat template does not write them"):
        samples(silent, {"messages": [QUESTION, PLAIN], "tools": [CALL]})


def test_reasoning_in_a_field_of_its_own(deepseek, with_template):
    message = {"role": "assistant", "content": "A cache.", "reasoning_content": "Keys."}
    row = {"messages": [QUESTION, message]}
    assert shown(deepseek, row) == [f"{B}{U}What is MLA?{A}[<think>Keys.</think>A cache.{E}]"]
    # Qwen's template writes it.
    qwen = with_template(templates.trls()["qwen3"], "qwen3")
    assert shown(qwen, row)[0].endswith("assistant\n[<think>\nKeys.\n</think>\n\nA cache.<|im_end|>]")


# As DeepSeek-V3.1's: the switch decides whether the prompt opens the reasoning or closes it.
SWITCHED = DEFAULT_TEMPLATE.replace(
    f"{{{{ '{A}' }}}}{{% endif %}}", f"{{{{ '{A}' + ('<think>' if thinking else '</think>') }}}}{{% endif %}}"
)


def test_prompts_that_open_the_reasoning(with_template):
    assert SWITCHED != DEFAULT_TEMPLATE
    switched = with_template(SWITCHED)
    row = {"messages": [QUESTION, TRACE]}
    assert shown(switched, row) == [
        f"{B}{U}What is MLA?{A}<think>[Keys are many.</think>A low-rank cache.{E}]"
    ]
    assert shown(switched, {"messages": [QUESTION, PLAIN]}) == [
        f"{B}{U}What is MLA?{A}</think>[Because 12 < 128.{E}]"
    ]
    with pytest.raises(ValueError, match="the prompt ends with </think>, the answer reasons"):
        samples(switched, row | {"chat_template_kwargs": {"thinking": False}})
    # DeepSeek-R1's newer prompt ends with a line break; an answer without reasoning closes it at once.
    for prompt, content, text in (
        ("<think>\n", "<think>\nKeys.\n</think>\n\nA.", "Keys.\n</think>\n\nA."),
        ("<think>\n", "<think>Keys.</think>A.", "Keys.</think>A."),
        ("<think>\n", "A.", "\n</think>\n\nA."),
        ("<think>", "A.", "</think>A."),
        ("", "<think>Keys.</think>A.", "<think>Keys.</think>A."),
    ):
        assert answer_after(f"Why?{prompt}", "", content) == text
    assert answer_after("Why?<think>\n", "Keys.", "A.") == "Keys.\n</think>\n\nA."


@pytest.mark.parametrize(
    ("row", "error"),
    [
        ({"question": "?"}, r"nothing to learn: a row has .*\"text\"; this one has \['question'\]"),
        ({"prompt": "?"}, r"nothing to learn: .* this one has \['prompt'\]"),
        ({"messages": [QUESTION]}, "nothing to learn: none of 1 messages is an answer"),
        ({"messages": [QUESTION, PLAIN | {"weight": 0}]}, "nothing to learn: none of 2 messages"),
        ({"messages": [QUESTION, PLAIN | {"weight": 2}]}, '"weight"=2 of a message should be 0 or 1'),
        (
            {"messages": [QUESTION, {"role": "assistant", "content": " "}]},
            "nothing to learn: message 1, .* is empty",
        ),
        ({"messages": [QUESTION, {"role": "assistant"}]}, "nothing to learn: message 1"),
        ({"messages": [PLAIN]}, "message 0 is the assistant's"),
        ({"messages": []}, r"messages=\[\] should be a list of messages"),
        ({"messages": "hello"}, "messages='hello' should be a list"),
        ({"messages": [QUESTION, "yes"]}, "message 1 is 'yes'"),
        ({"messages": [{"content": "x"}, PLAIN]}, 'message 0 is .*: it should be {"role", "content"}'),
        ({"messages": [{"role": "user", "content": 3}, PLAIN]}, "message 0 has no text content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}, PLAIN]},
            "message 0 has parts that are no text",
        ),
        ({"messages": [{"role": "robot", "content": "x"}, PLAIN]}, "message 0 is .*robot.*role of"),
        ({"prompt": "?", "completion": ""}, "nothing to learn: completion is empty"),
        ({"prompt": "?", "completion": E}, "nothing to learn: completion is empty"),
        ({"prompt": "?", "completion": [PLAIN]}, r"prompt='\?' and completion=.* should both be texts"),
        ({"prompt": [QUESTION], "completion": "yes"}, "prompt=.* should both be texts"),
        ({"prompt": [QUESTION], "completion": [AGAIN]}, "nothing to learn: none of 1 messages"),
        ({"text": "\n"}, "nothing to learn: text is empty"),
        ({"text": 3}, "text=3 should be a text"),
        ({"messages": [QUESTION, PLAIN], "tools": "{"}, "tools='{' is no JSON"),
        ({"messages": [QUESTION, PLAIN], "tools": {}}, "tools={} should be a list"),
        (
            {"messages": [QUESTION, PLAIN], "chat_template_kwargs": 3},
            "chat_template_kwargs=3 should be an object",
        ),
        ({"messages": [QUESTION, PLAIN | {"reasoning": 3}]}, "reasoning_content=3 should be a text"),
    ],
)
def test_nothing_to_learn_is_an_error(deepseek, row, error):
    with pytest.raises(ValueError, match=error) as raised:
        Conversations(deepseek).turns(row)
    assert "\n" not in str(raised.value)


# --- TRL's labels -------------------------------------------------------------------------------------------------------

# Templates whose labels differ from TRL's, and why ours are what a sampler should draw.
_DIFFERENT = {
    **dict.fromkeys(("idefics3", "llava_next", "smolvlm"), "they read parts of content, for pictures"),
    **dict.fromkeys(
        ("deepseekv3", "deepseek_r1_distill", "qwen3_5_think", "qwen3_6", "qwen3_8"),
        "the prompt has opened the reasoning, which TRL's labels open again, or leave out",
    ),
    **dict.fromkeys(
        [f"nemotron_3{name}" for name in ("_5_lightning", "_nano", "_super", "_ultra")],
        "the prompt has opened the reasoning with a line break",
    ),
    "gptoss": "an answer ends with <|return|>, which the template makes <|end|> of in earlier turns",
}


def _spans(ids, learned):
    """(ids before, ids) of each run of learned tokens."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], learned, [0]]).astype(int)))
    return [(ids[:begin].tolist(), ids[begin:end].tolist()) for begin, end in edges.reshape(-1, 2)]


def _same_as_trls(ours, tokenizer, theirs):
    """Whether each span of TRL's has ours in it, and else only the end of the prompt and what follows an answer's end."""
    if len(ours) != len(theirs):
        return False
    for (prompt, said), (_, marked) in zip(ours, theirs, strict=True):
        place = next((i for i in range(len(marked)) if marked[i : i + len(said)] == said), None)
        if place is None or prompt[len(prompt) - place :] != marked[:place]:
            return False
        rest = [i for i in marked[place + len(said) :] if i not in tokenizer.stop_ids]
        if tokenizer.decode(rest).strip():
            return False
    return True


def test_labels_are_trls_where_a_template_marks_them(with_template):
    """TRL takes its labels from `return_assistant_tokens_mask`, of its own copies of templates with marks in them."""
    trls, same, different = templates.trls(), set(), set()
    conversation = [QUESTION, {"role": "assistant", "content": "It is attention."}, AGAIN, PLAIN]
    for name in (name for name in trls if name.endswith("_training")):
        short = name.removesuffix("_training")
        if "pictures" in _DIFFERENT.get(short, ""):
            continue
        tokenizer = with_template(trls[name], name)
        theirs = PreTrainedTokenizerFast.from_pretrained(with_template.folder(trls[name], name))
        given = {"return_assistant_tokens_mask": True, "return_dict": True}
        marked = theirs.apply_chat_template(conversation, **given)
        ours = [span for one in samples(tokenizer, {"messages": conversation}) for span in _spans(*one)]
        trl = _spans(np.array(marked["input_ids"]), np.array(marked["assistant_masks"]))
        (same if _same_as_trls(ours, tokenizer, trl) else different).add(short)
    assert different == {name for name, why in _DIFFERENT.items() if "pictures" not in why}
    assert len(same) >= 17 and {"llama3", "qwen2_5", "qwen3", "gemma3", "glm4moe", "cohere2"} <= same


def test_templates_need_no_marks(with_template):
    """The same labels of the template that the model came with: marks do not matter."""
    trls = templates.trls()
    conversation = {"messages": [QUESTION, PLAIN, AGAIN, PLAIN]}
    for name in ("qwen2_5", "llama3", "gemma3", "glm4moe", "phi3"):
        assert "generation %}" not in trls[name]
        assert shown(with_template(trls[name], name), conversation) == shown(
            with_template(trls[f"{name}_training"], f"{name}_training"), conversation
        )


# --- any row ------------------------------------------------------------------------------------------------------------

_TEXT = st.text(max_size=12) | st.sampled_from(["", " ", "<think>", "a</think>b", E, A, "{{ 1 }}", "\n"])
_VALUE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | _TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_TEXT, inner, max_size=3),
    max_leaves=6,
)
_ROLE = st.sampled_from(["system", "user", "assistant", "tool", "robot"]) | _VALUE
_FIELDS = {"content": _TEXT | _VALUE, "reasoning_content": _VALUE, "tool_calls": _VALUE, "weight": _VALUE}
_MESSAGE = st.fixed_dictionaries({"role": _ROLE}, optional=_FIELDS) | _VALUE
_MESSAGES = st.lists(_MESSAGE, max_size=4) | st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": _TEXT}), max_size=5
)
_ROW = st.fixed_dictionaries(
    {},
    optional={
        "messages": _MESSAGES | _VALUE,
        "prompt": _MESSAGES | _TEXT,
        "completion": _MESSAGES | _TEXT,
        "text": _VALUE,
        "tools": _VALUE,
        "chat_template_kwargs": _VALUE,
    },
)


@settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(row=_ROW, learn=st.sampled_from(["all", "last"]))
def test_any_row_is_samples_or_one_clear_line(deepseek, row, learn):
    row = json.loads(json.dumps(row).encode("utf-8", "replace"))
    try:
        with of_row(Row("rows.jsonl:7", row)):
            turns = Conversations(deepseek, learn).turns(row)
            question = question_of(row)
    except ValueError as error:
        assert str(error).startswith("rows.jsonl:7: ") and len(str(error).splitlines()) == 1, str(error)
        return
    assert isinstance(question, str)
    for ids, learned in Conversations(deepseek, learn).samples([turns])[0]:
        assert len(ids) == len(learned) and learned.any() and not learned[0]
        assert learned[-1] and ids[-1] in deepseek.stop_ids
