"""Programs that try to escape, to do harm or to cheat: each is contained, scores 0, and leaves nothing behind."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from deepseek_jax.posttraining import sandbox as sandbox_module
from deepseek_jax.posttraining import sandbox_process
from deepseek_jax.posttraining.rewards import RewardConfig, code, rewards_named
from deepseek_jax.posttraining.sandbox import Limits, Sandbox, Verdict
from deepseek_jax.posttraining.sandboxed import wire
from deepseek_jax.posttraining.tasks import rows
from tests.posttraining import escapes
from tests.posttraining.leftovers import left_over

RIGHT = "def f(x):\n    return x + 1\n"


@pytest.fixture(scope="module")
def sandbox():
    return Sandbox(Limits(seconds=20))


@pytest.fixture(scope="module")
def hasty():
    return Sandbox(Limits(seconds=0.6))


@pytest.fixture(scope="module")
def aims():
    """A port and a socket without a file on which this process listens."""
    abstract = f"escapes-{os.getpid()}"
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as unnamed:
        unnamed.bind(f"\0{abstract}")
        unnamed.listen()
        yield server.getsockname()[1], abstract


def said(verdict: Verdict) -> str:
    return f"{verdict.reason}: {verdict.detail}"


def contained(box: Sandbox, escape: escapes.Escape) -> None:
    verdict = box.check(escape.program, escape.tests)
    assert not verdict.passed and re.match(escape.contained, said(verdict)), (escape.name, verdict)
    assert not left_over()


def test_there_are_forty_of_them():
    names = [escape.name for escape in escapes.ALL]
    assert len(names) == len({*names}) >= 40


def raises(escape: escapes.Escape) -> bool:
    """Whether it is stopped by an error that the program itself sees, and leaves nothing else to look for."""
    return "Error" in escape.contained and "Assertion" not in escape.contained and "bomb" not in escape.name


QUIET = (*escapes.FILES, *escapes.NETWORK, *filter(raises, escapes.PROCESSES))


def test_what_is_out_of_reach(sandbox, aims):
    """All in one program, which says what stopped each."""
    placed = [escapes.placed(escape, *aims) for escape in QUIET]
    tries = [
        f"{p.program.replace('def f(x)', f'def f{i}(x)')}"
        f"try: print({p.name!r}, 'passed:', f{i}(1))\n"
        f"except BaseException as e: print({p.name!r}, 'failed:', type(e).__name__ + ':', e)\n"
        "for name in os.listdir('/tmp'): os.remove('/tmp/' + name)\n"
        for i, p in enumerate(placed)
    ]
    ended = sandbox.run("".join(tries))
    lines = ended.output.decode().splitlines()
    assert (len(lines), ended.status) == (len(QUIET), 0), ended
    for escape, line in zip(QUIET, lines, strict=True):
        assert re.match(f"{escape.name} {escape.contained}", line), line


@pytest.mark.parametrize(
    "escape", [e for e in escapes.PROCESSES if not raises(e)], ids=lambda escape: escape.name
)
def test_processes(escape, sandbox, aims):
    contained(sandbox, escapes.placed(escape, *aims))


@pytest.mark.parametrize("escape", escapes.ENDLESS, ids=lambda escape: escape.name)
def test_what_has_no_end(escape, sandbox, hasty):
    contained(hasty if escape.contained == "time" else sandbox, escape)


@pytest.mark.parametrize("escape", escapes.CHEATS, ids=lambda escape: escape.name)
def test_cheats(escape, sandbox):
    contained(sandbox, escape)


def test_without_walls_the_same_programs_get_through(monkeypatch):
    """So that the tests above can fail."""
    box = Sandbox.__new__(Sandbox)
    box.limits, box.walls = Limits(), "none"
    (reads,) = (escape for escape in escapes.FILES if escape.name == "reads the machine's files")
    assert box.check(reads.program, reads.tests).passed
    assert box.check(RIGHT, "assert f(1) == 2").passed
    assert box.check(RIGHT, "assert f(1) == 3").reason == "failed"


def test_where_no_walls_can_be_built_nothing_is_run_unless_told(monkeypatch):
    def refused(walls):
        raise OSError(1, f"{walls}: not here")

    monkeypatch.setattr(sandbox_module, "_try", refused)
    sandbox_module._walls_here.cache_clear()
    try:
        with pytest.raises(
            ValueError, match=r"cannot be run safely here .*namespaces: not here.*say unsandboxed"
        ):
            Sandbox()
        with pytest.raises(ValueError, match="cannot be run safely here"):
            rewards_named(("code",))
        assert Sandbox(unsandboxed=True).walls == "none"
    finally:
        sandbox_module._walls_here.cache_clear()


def test_walls_that_do_not_hold_are_no_walls():
    """The trial looks for this machine's files: with limits alone it finds them."""
    with pytest.raises(OSError, match="the walls do not hold: failed"):
        sandbox_module._try("none")


def test_walls_hold_where_the_project_lies_beside_the_standard_library(sandbox, monkeypatch):
    monkeypatch.setattr(sandbox_module, "__file__", os.__file__)
    sandbox_module._try(sandbox.walls)


def test_a_sandbox_that_fails_is_an_error_not_a_score(sandbox, monkeypatch):
    monkeypatch.setattr(sandbox_process, "readable", lambda: ("/no/such/folder",))
    with pytest.raises(OSError, match=r"did not start: .*No such file or directory"):
        sandbox.check(RIGHT, "assert f(1) == 2")
    assert not left_over()


# --- what is right ----------------------------------------------------------------------------------------

RICH = """
from __future__ import annotations
import collections, dataclasses
@dataclasses.dataclass
class Point:
    x: int
class Stack:
    size = 3
    def __init__(self, *items): self.items = list(items)
    def push(self, x): self.items.append(x)
    def pop(self): return self.items.pop()
def echo(*args, **kwargs): return [*args, kwargs]
def numbers():
    yield from range(3)
def counted(text): return collections.Counter(text)
def wrong(x): raise ValueError(f"no {x}")
class Own(KeyError): pass
def own(): raise Own("mine")
def sum(values): return 17
"""

RICH_TESTS = """
import math
stack = Stack(1, 2)
stack.push(5)
assert Point(4).x == 4
assert stack.pop() == 5 and stack.pop() == 2 and stack.size == 3
value = [None, True, -7, 2**200, 0.1, float("inf"), 2j, "\\ud800é", b"\\x00", (1, [2]), {3}, frozenset({4}), {5: {"a": ()}}]
assert echo(*value, key=value) == [*value, {"key": value}]
assert [type(x) for x in echo(*value)[:-1]] == [type(x) for x in value]
assert math.isnan(echo(math.nan)[0])
assert numbers() == [0, 1, 2] and counted("aab") == {"a": 2, "b": 1}
for error, function in ((ValueError, lambda: wrong(1)), (KeyError, own)):
    try:
        function()
    except error as raised:
        assert "no 1" in str(raised) or "mine" in str(raised)
    else:
        assert False
assert sum([1, 2]) == 3  # the builtin: no solution hides one
print("a test may print")
def check(candidate):
    assert candidate(3) == [3, {}]
check(echo)
"""


def test_functions_classes_values_and_errors_cross_over(sandbox):
    assert sandbox.check(RICH, RICH_TESTS) == Verdict(True, "passed")
    assert sandbox.check(
        RICH, "assert sum([1, 2]) == 17", name="sum"
    ).passed  # unless it is the one to be tested
    found = sandbox.check(RICH, "assert echo(1) == [1, {}]", name="sum")
    assert found.detail == "line 1 of the tests: NameError: name 'echo' is not defined"


def test_programs_that_read_and_write(sandbox):
    program = "a, b = map(int, input().split())\nprint(a + b)\nprint('done')"
    assert sandbox.check_output(program, "1 2\n", "3\ndone\n").passed
    assert said(sandbox.check_output(program, "1 2\n", "4\ndone\n")) == "failed: done"
    assert sandbox.check_output(program, "1\n", "3").reason == "status"
    assert sandbox.run("import sys; print(len(sys.stdin.read()))", "x" * 300_000).output == b"300000\n"
    assert sandbox.run("import sys; sys.exit(7)").status == 7
    warned = "import sys\nassert input() is not 2\nprint('so far', file=sys.stderr)\nprint(3)"  # by the interpreter, too
    assert sandbox.check_output(warned, "2\n", "3").passed


def test_a_program_starts_with_nothing(sandbox):
    program = (
        "import os\nprint(dict(os.environ), os.listdir('.'), sorted(os.listdir('/dev')), os.getpgid(0) == os.getpid(),"
        " sorted(int(fd) for fd in range(64) if not __import__('contextlib').suppress(OSError).__exit__(None, None, None)"
        " and _open(fd)))\n"
    )
    helper = "import os\ndef _open(fd):\n    try: os.fstat(fd)\n    except OSError: return False\n    return True\n"
    assert sandbox.run(helper + program).output == b"{} [] ['null', 'urandom', 'zero'] True [0, 1, 2]\n"


def test_tests_that_are_none_are_an_error(sandbox):
    with pytest.raises(ValueError, match="there are no tests"):
        sandbox.check(RIGHT, " \n")


def test_tests_that_end_early_prove_nothing(sandbox):
    """Status 0 without the secret."""
    assert (
        said(sandbox.check(RIGHT, "import os\nos._exit(0)"))
        == "ended: the tests' process ended with status 0"
    )
    assert sandbox.check(RIGHT, "raise SystemExit(0)").reason == "failed"


def test_what_cannot_be_started_leaves_nothing_behind(sandbox, monkeypatch):
    start = sandbox._start

    def once(role, *args):
        if role == "functions":
            raise OSError("no more processes")
        return start(role, *args)

    monkeypatch.setattr(sandbox, "_start", once)
    with pytest.raises(OSError, match="no more processes"):
        sandbox.check(RIGHT, "assert f(1) == 2")
    assert not left_over()


def test_tests_of_the_wrong_shape(sandbox):
    assert sandbox.check("def f(x) return", "assert f(1) == 2").detail.startswith("SyntaxError")
    assert sandbox.check(RIGHT, "assert g(1) == 2").detail.endswith("name 'g' is not defined")
    uncalled = "def check(candidate):\n    assert candidate(1) == 2\n"  # as HumanEval's are
    assert said(sandbox.check("", uncalled)).startswith("failed: the tests call nothing of the solution")
    assert sandbox.check(RIGHT, f"{uncalled}check(f)").passed


@pytest.mark.parametrize("value", [object(), lambda: 0, type, 1 + 0j, [object()]])
def test_only_plain_data_is_packed(value):
    if value == 1 + 0j:
        assert wire.unpack(wire.pack(value)) == value
        return
    with pytest.raises(TypeError, match="is no plain data"):
        wire.pack(value)


# --- the trainer ------------------------------------------------------------------------------------------


def test_many_threads(sandbox):
    """Each gets its own verdict; nothing needs the main thread."""

    def one(i):
        assert threading.current_thread() is not threading.main_thread()
        return sandbox.check(f"def f(x):\n    return x + {i % 2}", "assert f(1) == 2").passed

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(one, range(4))) == [False, True] * 2
    assert not left_over()


TRAINER = """
import sys, types
for name in ("deepseek_jax", "deepseek_jax.posttraining"):  # without JAX
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [name.replace(".", "/")]
from deepseek_jax.posttraining.sandbox import Limits, Sandbox
box = Sandbox(Limits(seconds=600))
print("ready", flush=True)
box.check("import os, time\\nif os.fork() == 0: os.setsid()\\ntime.sleep(600)", "assert f(1) == 2")
"""


def test_a_trainer_that_is_killed_takes_its_programs_with_it():
    root = Path(__file__).parents[2]
    with subprocess.Popen([sys.executable, "-c", TRAINER], cwd=root, stdout=subprocess.PIPE) as trainer:
        assert trainer.stdout.readline() == b"ready\n"
        assert soon(lambda: len(left_over(trainer.pid)) >= 6)  # three of the tests, four of the solution
        trainer.send_signal(signal.SIGKILL)
    assert soon(lambda: not left_over(trainer.pid))


def soon(condition) -> bool:
    deadline = time.monotonic() + 10
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


# --- the reward -------------------------------------------------------------------------------------------


def test_the_reward_of_programs():
    reward = rewards_named(("code", "format_code=0.5"), RewardConfig(code_seconds=1.5, code_workers=4))
    fenced = "So:\n```python\n{}\n```".format
    completions = [
        fenced(RIGHT),
        fenced("def f(x): return 0"),
        "no program",
        fenced("import time\ntime.sleep(60)"),
        "prose",
    ]
    tests = ["assert f(1) == 2"] * 4 + [None]
    scores = reward(["?"] * 5, completions, [[0]] * 5, tests=tests)
    assert (
        scores.parts["code"][:4].tolist() == [1, 0, 0, 0]
        and scores.parts["code"][4] != scores.parts["code"][4]
    )
    assert scores.timeouts == {"code": 1, "format_code": 0}
    assert list(scores.parts) == ["code", "code_timed_out", "format_code"]
    assert scores.parts["code_timed_out"].tolist() == [0, 0, 0, 1, 0]
    assert scores.total.tolist() == [1.5, 0.5, 0, 0.5, 0]


def test_the_programs_of_the_tasks_pass(sandbox):
    (row,) = rows("tasks:program/3/boxed/1")
    answer = row["completion"][0]["content"]
    reward = code.code(sandbox, 1)
    assert reward(["?"], [answer], tests=[row["tests"]]) == [1.0]
    assert reward(["?"], [answer], tests=[row["tests"]], entry_point=["f"]) == [1.0]
    assert reward(["?"], [answer.replace("return x", "return -x - 1")], tests=[row["tests"]]) == [0.0]


def test_cases_of_input_and_output(sandbox):
    double = "print(int(input()) * 2)"
    cases = [{"input": "2", "output": "4"}, {"input": "3", "output": "6"}]
    assert code.score(sandbox, double, cases) == 1 and code.score(sandbox, "print(4)", cases) == 0
    assert code.read_tests('{"inputs": ["2", "3"], "outputs": ["4", "6"]}') == [("2", "4"), ("3", "6")]
    assert code.read_tests('[{"input": 2, "output": 4}]') == [("2", "4")]
    for tests in ([], [{"input": "2"}], {"inputs": ["2"]}, 7):
        with pytest.raises(ValueError, match="are no cases"):
            code.read_tests(tests)
    with pytest.raises(
        ValueError, match="are arguments of a function: write them as a program that calls it"
    ):
        code.read_tests({"fn_name": "f", "inputs": [[1]], "outputs": [2]})
