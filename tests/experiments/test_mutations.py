"""The short form of `experiments.mutations`: seeded damage ends in the right result or in one deliberate line."""

import time

import pytest

from experiments import mutation_cases, mutations


# Where one array cannot be read, orbax closes its event loop while tensorstore still reads others.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(
    ("kind", "count"),
    [("config", 40), ("build", 40), ("index", 25), ("header", 40), ("converted", 15), ("checkpoint", 15)],
)
def test_damage(kind, count, tmp_path):
    case = mutation_cases.prepare(kind, tmp_path)
    verdicts = [mutations.judge(kind, seed, case) for seed in range(7000, 7000 + count)]
    assert [v for v in verdicts if v.outcome == "unexpected"] == []
    # Neither everything refused nor everything let through.
    assert {v.outcome for v in verdicts} == {"right", "error"}


def test_command_lines():
    """In a process of their own, as commands are."""
    verdicts = mutations.run("command-train", range(7000, 7030))
    assert [v for v in verdicts if v.outcome == "unexpected"] == []
    assert {v.outcome for v in verdicts} == {"right", "error"}


def raising(error):
    def read():
        raise error

    return read


def accident():
    return str(int("x"))


@pytest.mark.parametrize(
    ("read", "outcome", "said"),
    [
        (lambda: None, "right", ""),
        (lambda: "array x differs", "unexpected", "array x differs"),
        (raising(ValueError("steps=x should be an integer")), "error", "steps=x should be an integer"),
        (accident, "unexpected", "ValueError: invalid literal for int"),
        (raising(ValueError("two\nlines")), "unexpected", "ValueError: two lines"),
        (raising(ValueError("x" * 5000)), "unexpected", "ValueError: xxx"),
        (raising(TypeError("no")), "unexpected", "TypeError: no"),
        (lambda: bytearray(8 << 30) and None, "unexpected", "MemoryError"),
        (lambda: time.sleep(5), "unexpected", "more than 1 s"),
    ],
)
def test_what_counts(read, outcome, said, monkeypatch):
    monkeypatch.setattr(mutations, "SECONDS", 1)
    verdict = mutations.judge("config", 0, lambda rng: ("nothing", read))
    assert verdict.outcome == outcome and verdict.said.startswith(said)
