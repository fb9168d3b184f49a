"""The reward of a program: 1 if it passes its tests in the sandbox, 0 if not.

The program is the last fenced block of the answer. Tests are the row's column "tests":
- a Python program that calls the solution's functions, alone the one of column "entry_point" if there is one (one that only
  defines a `check`, as HumanEval's, needs its call at the end: what calls nothing scores 0); or
- cases of a program that reads and writes: [{"input": ..., "output": ...}, ...], or verl's {"inputs": [...],
  "outputs": [...]}; either may be JSON text.
"""

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from deepseek_jax.checks import require, shown
from deepseek_jax.posttraining.rewards import texts
from deepseek_jax.posttraining.rewards.combination import RewardFunction, TimedOut
from deepseek_jax.posttraining.sandbox import Sandbox, Verdict

Cases = list[tuple[str, str]]  # what is read, what should be written


def code(sandbox: Sandbox, workers: int) -> RewardFunction:
    """The reward of programs, `workers` at the same time; None for rows without tests.

    A check that takes too long scores `TimedOut(0.0)`. Raises ValueError for tests that are none, OSError if the
    sandbox fails: neither is the solution's fault.
    """

    def reward(
        prompts: Any,
        completions: Sequence[Any],
        completion_ids: Any = None,
        tests: Sequence[Any] | None = None,
        entry_point: Sequence[str | None] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        n = len(completions)
        solutions = (texts.program(texts.said(texts.text_of(completion)) or "") for completion in completions)
        with ThreadPoolExecutor(workers, thread_name_prefix="sandbox") as pool:
            scores = pool.map(
                lambda solution, test, name: score(sandbox, solution, test, name),
                solutions,
                tests or [None] * n,
                entry_point or [None] * n,
            )
            return list(scores)

    reward.__name__ = "code"
    reward.may_time_out = True  # type: ignore[attr-defined]
    return reward


def score(sandbox: Sandbox, solution: str | None, tests: Any, name: str | None = None) -> float | None:
    """The reward of one program; None without tests, 0 without a program."""
    if tests is None:
        return None
    wanted = read_tests(tests)
    if solution is None:
        return 0.0
    verdict = _verdict(sandbox, solution, wanted, name)
    return TimedOut(0.0) if verdict.reason == "time" else float(verdict.passed)


def _verdict(sandbox: Sandbox, solution: str, tests: str | Cases, name: str | None) -> Verdict:
    """Of all cases, or the first that fails."""
    if isinstance(tests, str):
        return sandbox.check(solution, tests, name)
    verdicts = (sandbox.check_output(solution, given, wanted) for given, wanted in tests)
    return next((verdict for verdict in verdicts if not verdict.passed), Verdict(True, "passed"))


def read_tests(tests: Any) -> str | Cases:
    """A column's tests as a program or as cases. Raises ValueError for what is neither."""
    if isinstance(tests, str) and not tests.lstrip().startswith(("[", "{")):
        return tests
    found = json.loads(tests) if isinstance(tests, str) else tests
    if isinstance(found, Mapping) and found.get("fn_name"):
        raise ValueError(
            f"tests {shown(tests)} are arguments of a function: write them as a program that calls it"
        )
    if isinstance(found, Mapping) and {"inputs", "outputs"} <= found.keys():
        found = [{"input": a, "output": b} for a, b in zip(found["inputs"], found["outputs"], strict=True)]
    ok = isinstance(found, Sequence) and bool(found) and all(isinstance(case, Mapping) for case in found)
    require(
        ok and all({"input", "output"} <= case.keys() for case in found), f"tests {shown(tests)} are no cases"
    )
    return [(str(case["input"]), str(case["output"])) for case in found]
