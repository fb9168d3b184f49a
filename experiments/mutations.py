"""Damages what the library reads, a thousand times by seed: each must end in the right result or in one deliberate line.

    python -m experiments.mutations [--count=1000] [--seed=0] [--kind=config]

Kinds: `config` (config.json), `build` (the mapping of a run's config), `index`, `header` (of safetensors), `converted` (a
checkpoint converted to orbax), `checkpoint` (a training run's), `command-*` (command lines, up to where work begins).
A result is right if an independent reading of the damaged file agrees with it, or if it is the undamaged one. An error
is deliberate if a `raise` of this project made it, a ValueError of one line; in a command, if the command turns it into
one line. Neither may take more than 20 seconds or 4 GiB. Each kind runs in a process of its own, so that one that hangs
can be ended. The exit status is 0 if nothing else happened.
"""

import contextlib
import dis
import multiprocessing
import os
import random
import resource
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from absl import flags

from experiments import command_line
from experiments.mutators import Case

# How many of a thousand are of each kind.
SHARES = {
    "config": 150,
    "build": 150,
    "index": 100,
    "header": 150,
    "converted": 120,
    "checkpoint": 130,
    "command-train": 60,
    "command-generate": 40,
    "command-convert": 40,
    "command-plan": 30,
    "command-launch": 30,
}
SECONDS, MEMORY = 20, 4 << 30
_START = 600  # seconds to prepare a process
_SPAWN = multiprocessing.get_context("spawn")
_ROOT = str(Path(__file__).parents[1])
_LONGEST = 1000  # characters of a line that somebody reads


class Verdict(NamedTuple):
    """`outcome`: "right", "error" (a deliberate one) or "unexpected"; `said`: the error, or what was not right."""

    kind: str
    seed: int
    outcome: str
    what: str
    said: str
    seconds: float = 0.0
    megabytes: int = 0


class TooSlow(BaseException):
    """Raised by the clock."""


def judge(kind: str, seed: int, case: Case) -> Verdict:
    """Runs one case within the limits."""
    what, read = case(random.Random(f"{kind} {seed}"))
    began = time.monotonic()
    outcome, said = "right", ""
    try:
        with _limits():
            wrong = read()
        if wrong:
            outcome, said = "unexpected", wrong
    except TooSlow:
        outcome, said = "unexpected", f"more than {SECONDS} s"
    except (Exception, SystemExit) as error:
        message = command_line.one_line(str(error)) if kind.startswith("command-") else str(error)
        kept = deliberate(error, message)
        outcome, said = ("error", message) if kept else ("unexpected", _described(error))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    return Verdict(kind, seed, outcome, what, said, time.monotonic() - began, peak)


def deliberate(error: BaseException, message: str) -> bool:
    """Says whether this project raised the error on purpose, with a message that fits a line."""
    if not message or not message.isprintable() or len(message) > _LONGEST:
        return False
    if isinstance(error, flags.Error):  # commands say it as it is
        return True
    if isinstance(error, OSError):  # likewise, with the name of the file
        return error.filename is not None
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    if not isinstance(error, ValueError) or place is None:
        return False
    code = place.tb_frame.f_code
    raised = code.co_code[place.tb_lasti] == dis.opmap["RAISE_VARARGS"]
    return raised and code.co_filename.startswith(_ROOT) and ".venv" not in code.co_filename


def _described(error: BaseException) -> str:
    frames = []
    place = error.__traceback__
    while place is not None:
        file = place.tb_frame.f_code.co_filename
        frames.append(f"{file.removeprefix(_ROOT + '/')}:{place.tb_lineno}")
        place = place.tb_next
    own = [f for f in frames if not f.startswith("/")]
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]} (at {', '.join({*own[-1:], frames[-1]})})"


@contextlib.contextmanager
def _limits() -> Iterator[None]:
    """Allows the block SECONDS, and MEMORY more address space than the process has now."""

    def on_alarm(signum: int, frame: object) -> None:
        raise TooSlow

    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if sys.platform == "linux" else None
    previous = signal.signal(signal.SIGALRM, on_alarm)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        if pages is not None:
            resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, before[1]))
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
        resource.setrlimit(resource.RLIMIT_AS, before)


# --- one process per kind ---------------------------------------------------------------------------------


_case: Case | None = None  # in a process that judges


def _begin(kind: str, folder: str) -> None:
    """Prepares a process that judges; what it prints is dropped."""
    global _case
    os.environ |= {"JAX_PLATFORMS": "cpu", "DEEPSEEK_JAX_TRACEBACK": "1"}
    for stream in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    from experiments import mutation_cases

    _case = mutation_cases.prepare(kind, Path(tempfile.mkdtemp(dir=folder)))


def _judge(kind: str, seed: int) -> Verdict:
    assert _case is not None
    return judge(kind, seed, _case)


def run(kind: str, seeds: Sequence[int]) -> list[Verdict]:
    """Judges one kind, in a process of its own and a new one after it hung or died."""
    verdicts: list[Verdict] = []
    while len(verdicts) < len(seeds):
        with tempfile.TemporaryDirectory() as folder, _SPAWN.Pool(1, _begin, (kind, folder)) as process:
            process.apply_async(int).get(_START)
            for seed in seeds[len(verdicts) :]:
                try:
                    verdicts.append(process.apply_async(_judge, (kind, seed)).get(2 * SECONDS))
                except multiprocessing.TimeoutError:
                    verdicts.append(Verdict(kind, seed, "unexpected", "", "the process hung or died"))
                    break
    return verdicts


def summary(kind: str, verdicts: Sequence[Verdict]) -> str:
    outcomes = Counter(v.outcome for v in verdicts)
    slowest, largest = max(v.seconds for v in verdicts), max(v.megabytes for v in verdicts)
    return (
        f"{kind:17} {len(verdicts):4} cases: {outcomes['right']:4} right, {outcomes['error']:4} deliberate errors, "
        f"{outcomes['unexpected']:3} unexpected; at most {slowest:.1f} s, {largest} MiB"
    )


def main(argv: Sequence[str]) -> int:
    parser = command_line.Parser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=1000, help="cases of all kinds together")
    parser.add_argument("--seed", type=int, default=0, help="of the first case; each has its own")
    parser.add_argument("--kind", choices=tuple(SHARES), help="this kind alone")
    args = parser.parse_args(argv)
    if args.count < 1:
        raise ValueError(f"--count={args.count} must be at least 1")
    unexpected: list[Verdict] = []
    for kind, share in SHARES.items() if args.kind is None else [(args.kind, 1000)]:
        verdicts = run(kind, range(args.seed, args.seed + max(1, args.count * share // 1000)))
        print(summary(kind, verdicts), flush=True)
        unexpected += [v for v in verdicts if v.outcome == "unexpected"]
    for v in unexpected:
        print(f"{v.kind} {v.seed} ({v.what}): {v.said}")
    return command_line.FAILURE if unexpected else 0


if __name__ == "__main__":
    command_line.run(main)
