"""`place` says where a long text may be cut so that its pieces have the ids of the whole.

A cut is made only where no word of the pre-tokenizer and no added token can span it, and where the words on both sides
are the same as without it. Texts of a pre-tokenizer that is not listed here are not cut.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from deepseek_jax.data.byte_level import PATTERNS

# A match ends where a cut may be.
LINES = re.compile(r"\n(?=\S)")
WORDS = re.compile(r"[A-Za-z](?= [A-Za-z])")

# One pattern for all words, of Llama 3 and of Qwen: a line break ends a word, and no word has one inside.
_ONE_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{DIGITS}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_KNOWN = (
    PATTERNS,  # DeepSeek-V3's
    *((_ONE_PATTERN.replace("{DIGITS}", digits),) for digits in ("", "{1,3}")),
)


def place(spec: Mapping[str, Any], ordinary: Sequence[Mapping[str, Any]]) -> re.Pattern[str] | None:
    """Where texts of a tokenizer may be cut: a pattern that ends there, None if nothing is known.

    Args:
        spec: a parsed tokenizer.json.
        ordinary: its added tokens that are matched in documents.
    """
    if (spec["normalizer"] or {}).get("normalizers", spec["normalizer"]) or spec["model"].get("dropout"):
        return None
    found = _of_words(spec)
    for token in ordinary:
        reaches = token["lstrip"] or token["rstrip"] or token["single_word"]
        if reaches or (found and found.search(token["content"])):
            return None
    return found


def _of_words(spec: Mapping[str, Any]) -> re.Pattern[str] | None:
    pre = spec["pre_tokenizer"] or {"type": "none"}
    if pre["type"] == "ByteLevel" and pre["use_regex"]:
        return WORDS  # GPT-2's look from white space to what follows it, so a line's end is no place
    if pre["type"] == "Metaspace" and (pre["split"] or _spaces_begin(spec["model"], pre["replacement"])):
        return WORDS  # and a piece that begins with a space gets no further one
    return LINES if pre["type"] == "Sequence" and _line_breaks_end(pre["pretokenizers"]) else None


def _line_breaks_end(steps: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a line break ends a word: by the first split, as in DeepSeek-V2's, or by a pattern that is known."""
    if any(step["type"] not in ("Split", "Digits", "ByteLevel") for step in steps):
        return False
    splits = [step for step in steps if step["type"] == "Split"]
    patterns = tuple(_spelled(s["pattern"].get("Regex", "")) for s in splits if s["behavior"] == "Isolated")
    if patterns[:1] == (r"[\r\n]",) and steps[0] is splits[0]:
        return True
    return len(patterns) == len(splits) and patterns in _KNOWN and not any(s.get("use_regex") for s in steps)


def _spelled(pattern: str) -> str:
    """A pattern that holds line breaks as they are, with escapes instead."""
    return pattern.replace("\r", r"\r").replace("\n", r"\n")


def _spaces_begin(model: Mapping[str, Any], space: str) -> bool:
    """Whether no token has a space after something else, so that no merge of BPE reaches over its beginning."""
    inside = re.compile(f"[^{re.escape(space)}]{re.escape(space)}")
    return model["type"] == "BPE" and space in model["vocab"] and not any(map(inside.search, model["vocab"]))
