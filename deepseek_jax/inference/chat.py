"""Chat prompts through the tokenizer's own Jinja template: chat_template.jinja or tokenizer_config.json.

Templates see the environment that `transformers` gives them (a sandbox, the same filters and functions), so
that they render the same text.
"""

import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

# DeepSeek-V3's turns, for tokenizers that come without a template.
DEFAULT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] }}"
    "{% elif m['role'] == 'user' %}{{ '<｜User｜>' + m['content'] }}"
    "{% elif m['role'] == 'assistant' %}{{ '<｜Assistant｜>' + m['content'] + eos_token }}"
    "{% else %}{{ raise_exception('no turns for role ' + m['role']) }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜>' }}{% endif %}"
)
ROLES = ("system", "user", "assistant", "tool")


def _token(config: Mapping[str, Any], name: str, default: str) -> str:
    value = config.get(name) or default
    return value["content"] if isinstance(value, Mapping) else value


def _raise(message: str) -> None:
    raise ValueError(f"chat template: {message}")


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **kwargs: Any) -> str:
    """Plain JSON; Jinja's own filter escapes HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **kwargs)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment


def _read_config(path: Path) -> Mapping[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(config, Mapping):
        raise ValueError(f"{path} holds a {type(config).__name__}, not a JSON object")
    return config


def _source(folder: Path, config: Mapping[str, Any]) -> str:
    """The template's text: a file of its own goes before the entry of tokenizer_config.json."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, Sequence) and not isinstance(template, str):  # several, by name
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    return template or DEFAULT_TEMPLATE


class ChatTemplate:
    """Messages -> prompt text.

    Args:
        folder: holds chat_template.jinja or tokenizer_config.json; without a template in them, DeepSeek-V3's
            turns.

    Raises:
        ValueError: a file that is no JSON object, or a template that is no Jinja; names the folder.
    """

    def __init__(self, folder: str | Path | None = None):
        config: Mapping[str, Any] = {}
        source, where = DEFAULT_TEMPLATE, "the default template"
        if folder is not None:
            path = Path(folder) / "tokenizer_config.json"
            config = _read_config(path) if path.is_file() else {}
            source, where = _source(Path(folder), config), str(folder)
        self.bos = _token(config, "bos_token", "<｜begin▁of▁sentence｜>")
        self.eos = _token(config, "eos_token", "<｜end▁of▁sentence｜>")
        try:
            self._template = _environment().from_string(source)
        except TemplateError as error:
            raise ValueError(f"chat template of {where}: {error}") from error

    def render(self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool = True) -> str:
        """The prompt of a conversation of {"role", "content"} messages, oldest first.

        Raises ValueError for no message, one without these keys or with an unknown role, and for what the
        template itself refuses.
        """
        if not messages:
            raise ValueError("a conversation needs at least one message")
        for i, message in enumerate(messages):
            if message.get("role") not in ROLES or not isinstance(message.get("content"), str):
                raise ValueError(
                    f"message {i} is {dict(message)}: it needs a role of {ROLES} and text content"
                )
        try:
            return self._template.render(
                messages=messages,
                add_generation_prompt=add_generation_prompt,
                bos_token=self.bos,
                eos_token=self.eos,
            )
        except TemplateError as error:
            raise ValueError(f"chat template: {error}") from error
