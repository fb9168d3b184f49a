r"""Rewards by rules: is the answer right, has the text its form, is it too long, is it in one language.

Each is a reward function (`combination.py`) without state, for any thread. The truth of a row is its column "answer",
"solution" or "ground_truth", or verl's reward_model["ground_truth"]; a row without one gets None.
"""

import functools
import hashlib
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from deepseek_jax.checks import require, shown
from deepseek_jax.posttraining.rewards import equality, texts
from deepseek_jax.posttraining.rewards.combination import RewardFunction

_TRUTHS = ("answer", "solution", "ground_truth")


def by_row(name: str, score: Callable[[str, Mapping[str, Any]], float | None]) -> RewardFunction:
    """The reward function that scores each completion's text by itself, with the columns of its row."""

    def reward(prompts: Any, completions: Sequence[Any], completion_ids: Any = None, **columns: Any) -> list:
        lists = {key: values for key, values in columns.items() if isinstance(values, Sequence)}
        rows = ({key: values[i] for key, values in lists.items()} for i in range(len(completions)))
        return [
            score(texts.text_of(completion), row) for completion, row in zip(completions, rows, strict=True)
        ]

    reward.__name__ = name
    return reward


# --- answers ----------------------------------------------------------------------------------------------


def truth_of_row(row: Mapping[str, Any]) -> Any:
    """The row's truth as it stands there, or None."""
    model = row.get("reward_model")
    of_verl = model.get("ground_truth") if isinstance(model, Mapping) else None
    return next((row[name] for name in _TRUTHS if row.get(name) is not None), of_verl)


def right_answer_of(row: Mapping[str, Any]) -> str | None:
    r"""The row's right answer: of a worked one, what it boxes, or what stands after GSM8K's "####"."""
    truth = truth_of_row(row)
    return None if truth is None else texts.boxed(str(truth)) or str(truth).rpartition("####")[2].strip()


def _boxed(text: str) -> str | None:
    answer = texts.said(text)
    return None if answer is None else texts.boxed(answer)


def _tagged(text: str) -> str | None:
    answer = texts.said(text)
    return None if answer is None else texts.tagged(answer)


def _either(text: str) -> str | None:
    """What the last tag holds, or what the box in it holds; without a tag, the last box."""
    inside = _tagged(text)
    return _boxed(text) if inside is None else texts.boxed(inside) or inside


def right_answer(
    name: str, read: Callable[[str], str | None], same: Callable[[str, str], bool | None]
) -> RewardFunction:
    """1 if what `read` finds in the text is the same as the truth, 0 if not, or if it finds nothing; None where `same` or the
    truth is."""

    def score(text: str, row: Mapping[str, Any]) -> float | None:
        truth = right_answer_of(row)
        if truth is None:
            return None
        found = read(text) or ""
        right = same(found, truth)
        return None if right is None else float(right and bool(found))

    return by_row(name, score)


answer = right_answer("answer", _either, equality.same)
boxed = right_answer("boxed", _boxed, equality.same)
tagged = right_answer("tagged", _tagged, equality.same)


def numeric(tolerance: float) -> RewardFunction:
    """1 for a number within `tolerance`, relative to the truth; None where the truth is no number."""
    return right_answer("numeric", _either, functools.partial(equality.near, tolerance=tolerance))


# --- form -------------------------------------------------------------------------------------------------

_TAGS = ("<think>", "</think>", "<answer>", "</answer>")


def _is_tagged(text: str) -> bool:
    """<think>...</think><answer>...</answer>, each tag once, nothing around; a prompt may have opened the first."""
    text = text if text.lstrip().startswith(_TAGS[0]) else _TAGS[0] + text
    if any(text.count(tag) != 1 for tag in _TAGS):
        return False
    shape = re.fullmatch(r"\s*<think>(.*)</think>\s*<answer>(.*)</answer>\s*", text, re.DOTALL)
    return shape is not None and all(part.strip() for part in shape.groups())


def _is_boxed(text: str) -> bool:
    answer = texts.said(text) or ""
    return answer.count("\\boxed") == 1 and bool(texts.boxed(answer))


def _is_program(text: str) -> bool:
    answer = texts.said(text) or ""
    return answer.count("```") == 2 and texts.program(answer) is not None


format_tagged = by_row("format_tagged", lambda text, row: float(_is_tagged(text)))
format_boxed = by_row("format_boxed", lambda text, row: float(_is_boxed(text)))
format_code = by_row("format_code", lambda text, row: float(_is_program(text)))


# --- length -----------------------------------------------------------------------------------------------


def overlong_penalty(length: int, longest: int, margin: int) -> float:
    """DAPO's (arXiv 2503.14476, eq. 13): 0 up to longest - margin tokens, then linear to -1 at longest, -1 beyond."""
    return -min(max(length - (longest - margin), 0) / margin, 1.0)


def overlong(longest: int, margin: int) -> RewardFunction:
    """The penalty of each completion's number of tokens. Raises ValueError: a margin outside [1, longest]."""
    require(1 <= margin <= longest, f"the margin of {margin} tokens must lie in [1, longest {longest}]")

    def reward(
        prompts: Any, completions: Any, completion_ids: Sequence[Sequence[int]], **columns: Any
    ) -> list:
        return [overlong_penalty(len(ids), longest, margin) for ids in completion_ids]

    reward.__name__ = "overlong"
    return reward


# --- a control ------------------------------------------------------------------------------------------


def coin(
    prompts: Sequence[Any], completions: Any, completion_ids: Sequence[Sequence[int]], **columns: Any
) -> list:
    """0 or 1 by a hash of prompt and tokens, whatever they say: what a run learns from it, it learns from no task."""
    keys = (repr((prompt, [*map(int, ids)])) for prompt, ids in zip(prompts, completion_ids, strict=True))
    return [float(hashlib.sha256(key.encode()).digest()[0] & 1) for key in keys]


# --- language ---------------------------------------------------------------------------------------------

# Scripts, as Unicode names them, of languages; those of one script are not told apart.
_SCRIPTS = {
    **dict.fromkeys(("en", "de", "fr", "es", "it", "pt", "nl", "pl", "tr", "vi"), ("LATIN",)),
    **dict.fromkeys(("ru", "uk", "bg"), ("CYRILLIC",)),
    "zh": ("CJK",),
    "ja": ("CJK", "HIRAGANA", "KATAKANA"),
    "ko": ("HANGUL",),
    "ar": ("ARABIC",),
    "hi": ("DEVANAGARI",),
    "el": ("GREEK",),
    "he": ("HEBREW",),
    "th": ("THAI",),
}
# Written in no language: programs, formulas' commands, tags.
_NO_WORDS = re.compile(r"```.*?```|`[^`\n]*`|\\[A-Za-z]+|</?[a-z]+>", re.DOTALL)
_WORD = re.compile(r"[^\W\d_]+")
_ONE_A_CHARACTER = ("CJK", "HIRAGANA", "KATAKANA", "THAI")


@functools.lru_cache(maxsize=1 << 16)
def _script(character: str) -> str:
    return unicodedata.name(character, "NONE").split()[0]


def consistency(text: str, language: str) -> float:
    """Share of the text's words in the script of `language`; 1 if there are no words.

    A word is a run of letters of one script; where a script puts no space between words, each character counts.
    """
    wanted = counted = 0
    for run in _WORD.findall(_NO_WORDS.sub(" ", text)):
        scripts = [_script(character) for character in run]
        words = [s for i, s in enumerate(scripts) if s in _ONE_A_CHARACTER or i == 0 or s != scripts[i - 1]]
        counted += len(words)
        wanted += sum(script in _SCRIPTS[language] for script in words)
    return wanted / counted if counted else 1.0


def language(target: str) -> RewardFunction:
    """DeepSeek-R1's: the share of words of the target language in the reasoning. Raises ValueError: an unknown one."""
    require(target in _SCRIPTS, f"language {shown(target)} is not one of {sorted(_SCRIPTS)}")
    return by_row("language", lambda text, row: consistency(texts.reasoning(text), target))
