"""A tokenizer's files: tokenizer.json and the files beside it that define special tokens, stops and chat turns.

Their bytes stay as they are, and they are copied with the tokenizer: to a run, a conversion, an export.
"""

import json
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deepseek_jax.json_files import parse_object

TOKENIZER, CONFIG, GENERATION = "tokenizer.json", "tokenizer_config.json", "generation_config.json"
SPECIAL_MAP, ADDED = "special_tokens_map.json", "added_tokens.json"
TEMPLATE, TEMPLATES = "chat_template.jinja", "additional_chat_templates"
# What we read, and what other programs read instead of it.
_NAMES = (
    *(TOKENIZER, CONFIG, GENERATION, SPECIAL_MAP, ADDED, TEMPLATE, "chat_template.json"),
    *("tokenizer.model", "tiktoken.model", "vocab.json", "vocab.txt", "merges.txt"),
)
_PATTERNS = (f"{TEMPLATES}/*.jinja", "tokenization_*.py")

Files = Mapping[str, bytes]


def read(folder: Path) -> dict[str, bytes]:
    """The text files of a folder, by their path in it."""
    found = [folder / name for name in _NAMES]
    found += [path for pattern in _PATTERNS for path in sorted(folder.glob(pattern))]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found if path.is_file()}


def write(folder: Path, files: Files) -> None:
    """Writes the files, each whole or not at all, and removes the files of another tokenizer in the folder."""
    for name in read(folder) if _of_another(folder, files) else ():
        if name not in files:
            (folder / name).unlink()
    for name, content in files.items():
        write_file(folder / name, content)


def write_file(path: Path, content: bytes) -> None:
    """Writes a file whole or not at all, whoever else does so at the same time. A kill can leave a `*.partial`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
    temporary.write_bytes(content)
    os.replace(temporary, path)


def _of_another(folder: Path, files: Files) -> bool:
    there = folder / TOKENIZER
    return there.is_file() and there.read_bytes() != files.get(TOKENIZER)


def to_object(files: Files, name: str) -> dict[str, Any]:
    """The JSON object in a file, {} where there is none. Raises ValueError naming the file."""
    return parse_object(files[name], name) if name in files else {}


def from_object(value: Mapping[str, Any]) -> bytes:
    """A JSON file's content, as `transformers` writes it."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def has_template(files: Files) -> bool:
    """Whether there is a file of a chat template."""
    return any(name == TEMPLATE or name.startswith(f"{TEMPLATES}/") for name in files)


def templates(files: Files) -> dict[str, str]:
    """Chat templates by name, "default" among them; {} where there is none.

    Files of their own replace the entry of tokenizer_config.json. Raises ValueError: no text.
    """
    found = {
        Path(name).stem if name != TEMPLATE else "default": _text(content, name)
        for name, content in files.items()
        if name == TEMPLATE or name.startswith(f"{TEMPLATES}/")
    }
    given = to_object(files, CONFIG).get("chat_template")
    if found or given is None:
        return found
    if isinstance(given, list):  # several, by name
        given = {entry.get("name"): entry.get("template") for entry in given if isinstance(entry, dict)}
    named = given if isinstance(given, dict) else {"default": given}
    if not all(isinstance(part, str) for pair in named.items() for part in pair):
        raise ValueError(f"{CONFIG}: chat_template is neither a text nor a list of named texts")
    return named


def _text(content: bytes, name: str) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8 text: {error}") from error
