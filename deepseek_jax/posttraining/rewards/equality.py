r"""When two answers say the same: as numbers, exactly or nearly, or as text.

Numbers are read as exact fractions: 1,234.50, -3/4, \frac{3}{4}, 1\frac{1}{2}, 2.5e3, 50%, \$18. What is no number is
compared as text, without the decoration of LaTeX, case and spacing. Every function is linear in its text and bounded
in the size of numbers, so that no answer can make it slow: there is no clock that would have to stop it.
"""

import re
from fractions import Fraction

_LONGEST = 200  # characters of a number; and the largest exponent
_DECIMAL = re.compile(r"(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d*)?|\.\d+)(?:[eE]([+-]?\d{1,3}))?")
_FRACTION = re.compile(r"\\frac\{([^{}]*)\}\{([^{}]*)\}|\\frac(\d)(\d)")
_DROPPED = re.compile(r"\\[,;:! ]|\\(?:left|right|displaystyle)(?![A-Za-z])|\$")
_WRAPPED = re.compile(r"\\(?:text|textbf|mathrm|mathbf|operatorname)\s*\{([^{}]*)\}")


def plain(answer: str) -> str:
    """The answer without what only decorates it."""
    text = answer.replace("\u2212", "-").replace("\\$", "").replace("\\%", "%").replace("{,}", ",")
    text = text.replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac")
    text = _WRAPPED.sub(r"\1", _DROPPED.sub("", text))
    return " ".join(text.split()).removesuffix(".").strip()


def number(answer: str) -> Fraction | None:
    """The number that an answer is; None for other text. A percent sign divides by 100."""
    text = plain(answer).replace(" ", "") if "frac" in answer else plain(answer)
    if len(text) > _LONGEST:
        return None
    sign = -1 if text.startswith("-") else 1
    text = text[1:] if text[:1] in ("+", "-") else text
    scale = Fraction(1, 100) if text.endswith("%") else Fraction(1)
    found = _unsigned(text.removesuffix("%").strip())
    return None if found is None else sign * scale * found


def _unsigned(text: str) -> Fraction | None:
    """A decimal, a quotient of two, or a whole number and a fraction."""
    latex = _FRACTION.search(text)
    if latex:
        whole, rest = text[: latex.start()], text[latex.end() :]
        above, below = latex[1] or latex[3], latex[2] or latex[4]
        return None if rest or above is None or below is None else _mixed(whole, above, below)
    before, slash, below = text.partition("/")
    whole, _, above = before.strip().rpartition(" ")
    return _mixed(whole, above, below.strip()) if slash else _decimal(before)


def _mixed(whole: str, above: str, below: str) -> Fraction | None:
    one, a, b = _decimal(whole) if whole else Fraction(0), _signed(above), _decimal(below)
    if one is None or a is None or not b or (whole and (a < 0 or not whole.isdecimal())):
        return None
    return one + a / b


def _signed(text: str) -> Fraction | None:
    found = _decimal(text.removeprefix("-"))
    return -found if found is not None and text.startswith("-") else found


def _decimal(text: str) -> Fraction | None:
    """1,234.5e-3; the commas, if any, in groups of three."""
    found = _DECIMAL.fullmatch(text) if text.isascii() else None
    if found is None or abs(int(found[1] or 0)) > _LONGEST:
        return None
    return Fraction(text.replace(",", ""))


def same(answer: str, truth: str) -> bool:
    """Whether two answers are the same number, exactly, or else the same text."""
    a, b = number(answer), number(truth)
    if a is not None and b is not None:
        return a == b
    return plain(answer).casefold() == plain(truth).casefold()


def near(answer: str, truth: str, tolerance: float) -> bool | None:
    """Whether an answer is a number within `tolerance`, relative to the truth; None where the truth is no number."""
    a, b = number(answer), number(truth)
    if b is None:
        return None
    return a is not None and abs(a - b) <= Fraction(tolerance) * abs(b)
