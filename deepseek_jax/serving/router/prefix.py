"""Names for the beginnings of a prompt, without its tokenizer: servers are chosen by what they have computed before."""

import hashlib
import json
from array import array
from collections.abc import Mapping, Sequence
from typing import Any

from deepseek_jax.serving.router.choice import BLOCK, Ask

_CHARACTERS = 4  # of a token, about
_LONGEST = 1 << 14  # blocks of a prompt that are named


def ask_of(body: Mapping[str, Any]) -> Ask:
    """Of the body of a request to /v1/completions or /v1/chat/completions; of several prompts, the first one's beginning
    counts. What is no request that a server takes has no beginning."""
    salt = f"{body.get('model')}\0{body.get('cache_salt')}"
    if "messages" in body:
        parts = [body.get("tools"), body["messages"]]
        return _of_text(json.dumps(parts, ensure_ascii=False), 1, salt)
    prompt = body.get("prompt")
    if isinstance(prompt, str):
        return _of_text(prompt, 1, salt)
    if not isinstance(prompt, list) or not prompt:
        return Ask()
    if isinstance(prompt[0], str):
        return _of_text(prompt[0], len(prompt), salt)
    if isinstance(prompt[0], list):
        return _of_ids(prompt[0], len(prompt), salt)
    return _of_ids(prompt, 1, salt)


def _of_text(text: str, many: int, salt: str) -> Ask:
    size = BLOCK * _CHARACTERS
    blocks = [text[i : i + size].encode("utf-8", "replace") for i in range(0, len(text) - size + 1, size)]
    return Ask(_chained(blocks, salt), many * max(1, len(text) // _CHARACTERS))


def _of_ids(ids: Sequence[Any], many: int, salt: str) -> Ask:
    try:
        raw = array("q", ids).tobytes()
    except (TypeError, OverflowError):
        return Ask()
    size = BLOCK * 8
    blocks = [raw[i : i + size] for i in range(0, len(raw) - size + 1, size)]
    return Ask(_chained(blocks, salt), many * max(1, len(ids)))


def _chained(blocks: Sequence[bytes], salt: str) -> list[bytes]:
    """16 bytes for each block, and all that come before it."""
    keys, state = [], hashlib.blake2b(salt.encode("utf-8", "replace"), digest_size=16)
    for block in blocks[:_LONGEST]:
        state.update(block)
        keys.append(state.digest())
    return keys
