"""OpenAI's conversations through DeepSeek's templates: what they render, and how an answer to it begins."""

import pytest

from deepseek_jax.data import Tokenizer
from deepseek_jax.data.chat import ChatTemplate
from deepseek_jax.serving.dialects import DIALECTS, V3_CALL, V31_CALL, dialect_of, wants_objects
from deepseek_jax.serving.messages import prompt_of, tools_in_words
from tests.data.family import CHATML
from tests.serving.answers import tokenizer
from tests.serving.templates import BOS, EOS, by_transformers, templates

ARGUMENTS = '{"city": "Köln"}'
CALL = {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": ARGUMENTS}}
NOW = {"id": "call_2", "type": "function", "function": {"name": "now", "arguments": "{}"}}
USER, ANSWER = {"role": "user", "content": "Weather?"}, {"role": "assistant", "content": "Sunny."}
RESULT = {"role": "tool", "tool_call_id": "call_1", "content": '{"high": 3}'}
TOOLS = [
    {
        "type": "function",
        "function": {"name": "now", "description": "The time.", "parameters": {"type": "object"}},
    }
]

# name -> (as OpenAI's client sends it, as DeepSeek's templates read it)
CONVERSATIONS = {
    "one turn": ([USER], [USER]),
    "parts": (
        [{"role": "user", "content": [{"type": "text", "text": "Wea"}, {"type": "text", "text": "ther?"}]}],
        [USER],
    ),
    "developer": (
        [{"role": "developer", "content": "Be brief."}, USER],
        [{"role": "system", "content": "Be brief."}, USER],
    ),
    "earlier reasoning": (
        [USER, ANSWER | {"reasoning_content": "so", "reasoning": "so"}, USER],
        [USER, ANSWER, USER],
    ),
    "fields that are null": (
        [USER, ANSWER | {"tool_calls": None, "refusal": None, "function_call": None}, USER],
        [USER, ANSWER, USER],
    ),
    "no calls": ([USER, ANSWER | {"tool_calls": []}, USER], [USER, ANSWER, USER]),
    "a call, its result": (
        [USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}, RESULT],
        [USER, {"role": "assistant", "content": "", "tool_calls": [CALL]}, RESULT],
    ),
    "arguments as an object": (
        [USER, {"role": "assistant", "tool_calls": [{**CALL, "function": {"name": "get_weather", "arguments": {"city": "Köln"}}}]}, RESULT],
        [USER, {"role": "assistant", "content": "", "tool_calls": [CALL]}, RESULT],
    ),
    "two calls, two results, an answer": (
        [USER, ANSWER | {"tool_calls": [CALL, NOW]}, RESULT, RESULT | {"content": [{"type": "text", "text": "12"}]}, ANSWER, USER],
        [USER, ANSWER | {"tool_calls": [CALL, NOW]}, RESULT, RESULT | {"content": "12"}, ANSWER, USER],
    ),
}  # fmt: skip


def chat(name) -> ChatTemplate:
    return ChatTemplate(templates()[name], {"bos_token": BOS, "eos_token": EOS})


def with_template(source) -> Tokenizer:
    return Tokenizer(tokenizer()._full, {"chat_template.jinja": source.encode()})


@pytest.mark.parametrize("name", ["v3", "r1", "r1 first", "v3.1"])
@pytest.mark.parametrize("conversation", CONVERSATIONS)
def test_conversations_render_as_by_transformers(name, conversation):
    sent, read = CONVERSATIONS[conversation]
    for add in (True, False):
        want = by_transformers(templates()[name], read, add_generation_prompt=add)
        assert prompt_of(chat(name), sent, DIALECTS["v3"], add_generation_prompt=add) == want
    if name == "v3.1":
        want = by_transformers(templates()[name], read, add_generation_prompt=True, thinking=True)
        assert prompt_of(chat(name), sent, DIALECTS["v3"], thinking=True) == want


def test_turns_of_tools_as_text():
    sent, _ = CONVERSATIONS["a call, its result"]
    result = '<｜tool▁output▁begin｜>{"high": 3}<｜tool▁output▁end｜>'
    call = '{"city": "Köln"}'
    assert prompt_of(chat("r1"), sent, DIALECTS["r1"]) == (
        f"{BOS}<｜User｜>Weather?<｜Assistant｜><｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n"
        f"```json\n{call}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>{EOS}<｜tool▁outputs▁begin｜>{result}<｜tool▁outputs▁end｜>"
    )
    assert prompt_of(chat("v3.1"), sent, DIALECTS["v3.1"]) == (
        f"{BOS}<｜User｜>Weather?<｜Assistant｜></think><｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>"
        f"{call}<｜tool▁call▁end｜><｜tool▁calls▁end｜>{EOS}{result}"
    )


@pytest.mark.parametrize("name", ["v3", "r1", "r1 first", "v3.1"])
@pytest.mark.parametrize("text", ["Sun", "Sun ", "<think>\nI wond"])
def test_the_last_message_goes_on(name, text):
    sent = [USER, {"role": "assistant", "content": text}]
    want = by_transformers(templates()[name], sent, continue_final_message=True)
    assert want.endswith(text)
    assert prompt_of(chat(name), sent, DIALECTS["v3"], continue_final_message=True) == want
    trims = "{% for m in messages %}[{{ m.content | trim }}]{% endfor %}"
    want = by_transformers(trims, sent, continue_final_message=True)
    assert (
        ChatTemplate(trims).render(sent, False, continue_final_message=True)
        == want
        == f"[Weather?][{text.strip()}"
    )


def test_what_cannot_go_on():
    with pytest.raises(ValueError, match="begins no other turn"):
        chat("v3").render([USER], continue_final_message=True)
    with pytest.raises(ValueError, match="leaves the last message out"):
        ChatTemplate("{{ messages[0].role }}").render([USER], False, continue_final_message=True)
    with pytest.raises(ValueError, match="no text content"):
        chat("v3").render([{"role": "assistant", "tool_calls": [CALL]}], False, continue_final_message=True)


def test_templates_that_write_arguments_themselves_get_objects():
    template = ChatTemplate(CHATML, {})
    assert wants_objects(template) and not any(wants_objects(chat(name)) for name in templates())
    sent = [USER, {"role": "assistant", "content": "", "tool_calls": [CALL]}]
    assert f'{{"name": "get_weather", "arguments": {ARGUMENTS}}}' in prompt_of(
        template, sent, DIALECTS["none"]
    )
    broken = {"name": "now", "arguments": "{"}
    with pytest.raises(ValueError, match=r"messages\[0\].tool_calls\[0\].function.arguments='\{' is no JSON"):
        prompt_of(template, [{"role": "assistant", "tool_calls": [{"function": broken}]}], DIALECTS["none"])


def test_tools_that_the_template_does_not_write_are_told():
    told = tools_in_words(TOOLS, V31_CALL)
    assert '### now\nDescription: The time.\n\nParameters: {"type": "object"}\n' in told
    assert (
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>tool_call_name<｜tool▁sep｜>tool_call_arguments<｜tool▁call▁end｜>"
        "{additional_tool_calls}<｜tool▁calls▁end｜>\n\nWhere:\n- `tool_call_name` must be an exact match"
    ) in told  # as the model card of V3.1 has it
    system = {"role": "system", "content": "Be brief."}
    for messages, text in (([USER], told), ([system, USER], f"Be brief.\n\n{told}")):
        found = prompt_of(chat("v3.1"), messages, DIALECTS["v3.1"], TOOLS)
        assert found == f"{BOS}{text}<｜User｜>Weather?<｜Assistant｜></think>"
    assert tools_in_words(TOOLS, V3_CALL) in prompt_of(chat("v3"), [USER], DIALECTS["v3"], TOOLS)
    assert '"name": "now"' in prompt_of(ChatTemplate(CHATML, {}), [USER], DIALECTS["none"], TOOLS)
    with pytest.raises(ValueError, match="no tool calls"):
        prompt_of(ChatTemplate(), [USER], DIALECTS["none"], TOOLS)


@pytest.mark.parametrize(
    ("messages", "error"),
    [
        ("x", "must be a list"),
        ([], "at least one message"),
        (["x"], r"messages\[0\]='x' must be an object"),
        ([{"role": "user"}], r"messages\[0\].*has no content"),
        (
            [{"role": "user", "content": [{"type": "image_url"}]}],
            r"messages\[0\].content has .*parts of text only",
        ),
        ([{"role": "assistant", "tool_calls": {"a": 1}}], "must be a list"),
        ([{"role": "assistant", "tool_calls": [{"id": "x"}]}], r"tool_calls\[0\].* must have a function"),
        ([{"role": "robot", "content": "x"}], "robot"),
    ],
)
def test_wrong_messages(messages, error):
    with pytest.raises(ValueError, match=error) as raised:
        prompt_of(chat("v3"), messages, DIALECTS["v3"])
    assert "\n" not in str(raised.value)


# --- dialects -------------------------------------------------------------------------------------------------------


def test_the_template_shows_the_dialect():
    found = {name: dialect_of(with_template(source)) for name, source in templates().items()}
    assert found == {"r1 first": DIALECTS["r1"]} | {name: DIALECTS[name] for name in ("v3", "r1", "v3.1")}
    assert dialect_of(with_template(CHATML)).call is None
    assert dialect_of(tokenizer()) == DIALECTS["none"]
    assert dialect_of(tokenizer(), "v3.1") == DIALECTS["v3.1"]
    with pytest.raises(ValueError, match=r"did you mean 'v3\.1'"):
        dialect_of(tokenizer(), "v3.1.")


@pytest.mark.parametrize(
    ("name", "switches", "conversation", "want"),
    [
        ("r1", {}, "one turn", "open"),
        ("r1 first", {}, "one turn", "possible"),
        ("r1", {}, "a call, its result", "possible"),
        ("r1", {}, "two calls, two results, an answer", "open"),
        ("v3.1", {}, "one turn", "none"),
        ("v3.1", {"thinking": True}, "one turn", "open"),
        ("v3.1", {}, "a call, its result", "possible"),
        ("v3", {}, "one turn", "none"),
    ],
)
def test_how_an_answer_begins(name, switches, conversation, want):
    dialect = dialect_of(with_template(templates()[name]))
    assert (
        dialect.thinking(prompt_of(chat(name), CONVERSATIONS[conversation][0], dialect, **switches)) == want
    )


def test_how_an_answer_goes_on():
    for text, want in (("Sun", "none"), ("<think>\nI wond", "open"), ("<think>a</think>b", "none")):
        sent = [{"role": "user", "content": "<think>"}, {"role": "assistant", "content": text}]
        prompt = prompt_of(chat("v3"), sent, DIALECTS["r1"], continue_final_message=True)
        assert DIALECTS["r1"].thinking(prompt) == want
    for prompt, want in (
        ("<|im_start|>assistant\n<think>\n", "open"),
        ("<think>\n\n</think>\n\n", "none"),
        ("<think> x", "possible"),
    ):
        assert DIALECTS["r1"].thinking(prompt) == want
