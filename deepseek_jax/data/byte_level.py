"""Byte-level BPE as DeepSeek's tokenizers do it: what stands for a byte, what is a word, where a text may be cut."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import Regex, pre_tokenizers

_DIGITS = r"\p{N}{1,3}"
_CJK = "[一-龥぀-ゟ゠-ヿ]+"
_WORDS = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"""
    r"|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PATTERNS = (_DIGITS, _CJK, _WORDS)


def words() -> pre_tokenizers.PreTokenizer:
    """DeepSeek-V3's pre-tokenizer."""
    splits = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in _PATTERNS]
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([*splits, to_bytes])


def cuts_at_line_breaks(spec: Mapping[str, Any], ordinary: Sequence[Mapping[str, Any]]) -> bool:
    """Whether no token reaches over the place between a line break and a visible character, or depends on it.

    Known of DeepSeek-V3's pre-tokenizer, which ends a word there, and of those that split off line breaks first, as
    DeepSeek-V2's. Not of others, which see where a text begins (Metaspace) or look ahead (GPT-2's).

    Args:
        spec: a parsed tokenizer.json.
        ordinary: its added tokens that are matched in documents.
    """
    if (spec["normalizer"] or {}).get("normalizers", spec["normalizer"]):
        return False
    if any(t["lstrip"] or t["rstrip"] or t["single_word"] or "\n" in t["content"] for t in ordinary):
        return False
    steps = (spec["pre_tokenizer"] or {}).get("pretokenizers", [])
    if not steps or any(step["type"] not in ("Split", "Digits", "ByteLevel") for step in steps):
        return False
    splits = [step for step in steps if step["type"] == "Split"]
    patterns = [
        _spelled(split["pattern"].get("Regex", "")) for split in splits if split["behavior"] == "Isolated"
    ]
    breaks_first = steps[0]["type"] == "Split" and patterns[:1] == [r"[\r\n]"]
    known = len(splits) == len(patterns) and patterns == [_spelled(pattern) for pattern in _PATTERNS]
    return breaks_first or (known and not any(step.get("use_regex") for step in steps))


def _spelled(pattern: str) -> str:
    """A pattern that holds line breaks as they are, with escapes instead."""
    return pattern.replace("\r", r"\r").replace("\n", r"\n")


@functools.cache
def _alphabet() -> dict[str, int]:
    """Byte-level vocabularies write one character per byte: itself if it is visible, else one from U+0100 on."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + i): byte for i, byte in enumerate(hidden)}


def token_bytes(token: str) -> bytes:
    """The bytes that a token of a byte-level vocabulary stands for; an added one with other characters, its own."""
    alphabet = _alphabet()
    if all(character in alphabet for character in token):
        return bytes(alphabet[character] for character in token)
    return token.encode()
