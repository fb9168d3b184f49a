"""Chat prompts through the tokenizer's own Jinja template (`chat_template` of tokenizer_config.json)."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2.sandbox import ImmutableSandboxedEnvironment

# DeepSeek-V3's turns, for tokenizers that come without a template.
DEFAULT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] }}"
    "{% elif m['role'] == 'user' %}{{ '<｜User｜>' + m['content'] }}"
    "{% else %}{{ '<｜Assistant｜>' + m['content'] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜>' }}{% endif %}"
)
ROLES = ("system", "user", "assistant", "tool")


def _token(config: Mapping[str, Any], name: str, default: str) -> str:
    value = config.get(name, default)
    return value["content"] if isinstance(value, Mapping) else (value or default)


def _raise(message: str) -> None:
    raise ValueError(f"chat template: {message}")


class ChatTemplate:
    """Messages -> prompt text.

    Args:
        folder: holds tokenizer_config.json; without it, or without a template in it, DeepSeek-V3's turns.

    Raises:
        ValueError: the file is no JSON object.
    """

    def __init__(self, folder: str | Path | None = None):
        config: Mapping[str, Any] = {}
        path = None if folder is None else Path(folder) / "tokenizer_config.json"
        if path is not None and path.is_file():
            try:
                config = json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise ValueError(f"{path} is not JSON: {error}") from error
        self.bos = _token(config, "bos_token", "<｜begin▁of▁sentence｜>")
        self.eos = _token(config, "eos_token", "<｜end▁of▁sentence｜>")
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = _raise
        self._template = environment.from_string(config.get("chat_template") or DEFAULT_TEMPLATE)

    def render(self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool = True) -> str:
        """The prompt of a conversation of {"role", "content"} messages, oldest first.

        Raises ValueError for a message without these keys or with an unknown role.
        """
        for i, message in enumerate(messages):
            if message.get("role") not in ROLES or not isinstance(message.get("content"), str):
                raise ValueError(
                    f"message {i} is {dict(message)}: it needs a role of {ROLES} and text content"
                )
        return self._template.render(
            messages=messages,
            add_generation_prompt=add_generation_prompt,
            bos_token=self.bos,
            eos_token=self.eos,
        )
