"""Makers of problems that can be checked: arithmetic, order, memory, small programs.

Each draws from a `random.Random` alone. The work that it writes is what a small model can follow step by step: digits
from the units up with their carry, each comparison that decides.
"""

import random
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple


class Problem(NamedTuple):
    """A question, the steps that lead to its answer, the answer, and the tests of an answer that is a program."""

    question: str
    work: str
    answer: str
    tests: str | None = None


class Task(NamedTuple):
    """Makes problems whose size counts `what`; `sizes` are those it can make, `usual` is that of a source without one."""

    make: Callable[[random.Random, int], Problem]
    what: str
    sizes: range
    usual: int


# --- arithmetic -------------------------------------------------------------------------------------------


def _number(draw: random.Random, digits: int) -> int:
    """A number of just so many digits."""
    return draw.randrange(10 ** (digits - 1), 10**digits)


def _digits(number: int, width: int) -> list[int]:
    """Digits from the units up, zeros in front of a shorter number."""
    return [number // 10**i % 10 for i in range(width)]


def _addition(draw: random.Random, size: int) -> Problem:
    a, b = _number(draw, size), _number(draw, size)
    steps, carry = [], 0
    for x, y in zip(_digits(a, size), _digits(b, size), strict=True):
        total = x + y + carry
        steps.append(f"{x}+{y}{'+1' if carry else ''}={total}")
        carry = total // 10
    return Problem(f"{a} + {b} = ?", ", ".join(steps), str(a + b))


def _subtraction(draw: random.Random, size: int) -> Problem:
    a, b = sorted((_number(draw, size), _number(draw, size)), reverse=True)
    steps, borrowed = [], 0
    for x, y in zip(_digits(a, size), _digits(b, size), strict=True):
        lent = 10 if x - borrowed < y else 0
        steps.append(f"{x + lent}-{y}{'-1' if borrowed else ''}={x + lent - y - borrowed}")
        borrowed = 1 if lent else 0
    return Problem(f"{a} - {b} = ?", ", ".join(steps), str(a - b))


def _multiplication(draw: random.Random, size: int) -> Problem:
    a, b = _number(draw, size), draw.randrange(2, 10)
    parts = [digit * 10**i for i, digit in enumerate(_digits(a, size)) if digit]
    steps = [f"{part}*{b}={part * b}" for part in parts]
    total = [f"{'+'.join(str(part * b) for part in parts)}={a * b}"] if len(parts) > 1 else []
    return Problem(f"{a} * {b} = ?", ", ".join(steps + total), str(a * b))


def _arithmetic(draw: random.Random, size: int) -> Problem:
    """A chain of sums and differences of one-digit numbers, worked from the left."""
    value = draw.randrange(1, 10)
    text, steps = str(value), []
    for _ in range(size):
        operand = draw.randrange(1, 10)
        sign = "+" if value < operand or draw.random() < 0.5 else "-"
        after = value + operand if sign == "+" else value - operand
        steps.append(f"{value}{sign}{operand}={after}")
        text, value = f"{text} {sign} {operand}", after
    return Problem(f"{text} = ?", ", ".join(steps), str(value))


# --- order ------------------------------------------------------------------------------------------------

# Frequent in programs, and their first letters differ.
_WORDS = (
    *(
        "add",
        "break",
        "call",
        "def",
        "else",
        "for",
        "get",
        "hash",
        "int",
        "join",
        "key",
        "list",
        "map",
        "name",
    ),
    *("open", "path", "queue", "return", "set", "try", "use", "value"),
)


def _compare(draw: random.Random, size: int) -> Problem:
    a = _number(draw, size)
    b = next(b for b in iter(lambda: _number(draw, size), None) if b != a)
    steps = []
    for x, y in zip(reversed(_digits(a, size)), reversed(_digits(b, size)), strict=True):
        steps.append(f"{x}{'=' if x == y else '<' if x < y else '>'}{y}")
        if x != y:
            break
    return Problem(f"Which is larger, {a} or {b}?", ", ".join(steps), str(max(a, b)))


def _largest(draw: random.Random, size: int) -> Problem:
    numbers = draw.sample(range(10, 100), size)
    steps = [f"{max(numbers[: i + 1])}" for i in range(size)]
    return Problem(
        f"Which is the largest of {' '.join(map(str, numbers))}?", " ".join(steps), str(max(numbers))
    )


def _sorted(items: Sequence[Any]) -> Problem:
    given, ordered = " ".join(map(str, items)), " ".join(map(str, sorted(items)))
    steps = [f"{sorted(items)[0]} is first", f"{sorted(items)[-1]} is last"]
    return Problem(f"Sort {given}", ", ".join(steps), ordered)


def _sort_digits(draw: random.Random, size: int) -> Problem:
    return _sorted(draw.sample(range(10), size))


def _sort_words(draw: random.Random, size: int) -> Problem:
    return _sorted(draw.sample(_WORDS, size))


def _reverse(draw: random.Random, size: int) -> Problem:
    digits = [str(draw.randrange(10)) for _ in range(size)]
    return Problem(f"Reverse {' '.join(digits)}", f"{digits[-1]} is last", " ".join(digits[::-1]))


# --- memory -----------------------------------------------------------------------------------------------


def _recall(draw: random.Random, size: int) -> Problem:
    keys = draw.sample("abcdefghijklmnopqrstuvwxyz", size)
    values = [draw.randrange(10) for _ in keys]
    asked = draw.randrange(size)
    pairs = [f"{key}={value}" for key, value in zip(keys, values, strict=True)]
    return Problem(f"{', '.join(pairs)}. What is {keys[asked]}?", pairs[asked], str(values[asked]))


def _count(draw: random.Random, size: int) -> Problem:
    digits = [draw.randrange(3) for _ in range(size)]
    asked = draw.randrange(3)
    found = [str(digit) for digit in digits if digit == asked]
    return Problem(
        f"How often is {asked} in {' '.join(map(str, digits))}?",
        f"{' '.join(found) or 'none'}",
        str(len(found)),
    )


# --- programs ---------------------------------------------------------------------------------------------

_STEPS = (("plus", "+"), ("minus", "-"), ("times", "*"))
_ARGUMENTS = (0, 7, -3)


def _program(draw: random.Random, size: int) -> Problem:
    """A function of a line per step, with a test per argument."""
    steps = [(*draw.choice(_STEPS), draw.randrange(2, 10)) for _ in range(size)]
    lines = [f"    x = x {sign} {n}" for _, sign, n in steps]
    program = "\n".join(["def f(x):", *lines, "    return x"])
    tests = "\n".join(f"assert f({x}) == {_run(steps, x)}" for x in _ARGUMENTS)
    asked = ", ".join(f"{word} {n}" for word, _, n in steps)
    return Problem(f"Write f(x): x {asked}", "", program, tests)


def _run(steps: Sequence[tuple[str, str, int]], x: int) -> int:
    for _, sign, n in steps:
        x = x + n if sign == "+" else x - n if sign == "-" else x * n
    return x


TASKS = {
    "addition": Task(_addition, "digits", range(1, 13), 2),
    "subtraction": Task(_subtraction, "digits", range(1, 13), 2),
    "multiplication": Task(_multiplication, "digits", range(1, 13), 2),
    "arithmetic": Task(_arithmetic, "operations", range(1, 13), 2),
    "compare": Task(_compare, "digits", range(1, 13), 2),
    "largest": Task(_largest, "numbers", range(2, 33), 3),
    "sort_digits": Task(_sort_digits, "digits", range(2, 11), 3),
    "sort_words": Task(_sort_words, "words", range(2, len(_WORDS) + 1), 3),
    "reverse": Task(_reverse, "digits", range(2, 33), 3),
    "recall": Task(_recall, "pairs", range(1, 27), 3),
    "count": Task(_count, "digits", range(1, 65), 4),
    "program": Task(_program, "steps", range(1, 9), 1),
}
