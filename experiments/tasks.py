"""Writes generated problems to files, for training, for people to read, or for other programs.

    python -m experiments.tasks tasks:addition/2 tasks:sort_words/3/tagged --out=problems

A source is tasks:NAME[/SIZE][/FORM][/COUNT]. The folder gets train.jsonl and held_out.jsonl, whose rows have "prompt" and
"completion" as messages, "task", and "answer" or "tests". Commands that train take a source as it is, without files. A
tenth of all questions is held out, by a hash of the question: no seed, size or count moves one to the other side.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from deepseek_jax.posttraining.problems import TASKS
from deepseek_jax.posttraining.tasks import COUNT, FORMS, rows
from experiments import command_line

_SIDES = {"train.jsonl": False, "held_out.jsonl": True}


def _tasks() -> str:
    lines = [
        f"  {name:<16}{task.usual} {task.what} ({task.sizes[0]} to {task.sizes[-1]})"
        for name, task in TASKS.items()
    ]
    return "\n".join(
        ["tasks, their usual size and its range:", *lines, f"forms: {', '.join(FORMS)}; count: {COUNT}"]
    )


def main(argv: Sequence[str]) -> int:
    parser = command_line.Parser(
        prog="tasks",
        description=__doc__,
        epilog=_tasks(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("sources", nargs="+", metavar="SOURCE", help="tasks:NAME[/SIZE][/FORM][/COUNT]")
    parser.add_argument("--out", required=True, help="the folder")
    parser.add_argument("--seed", type=int, default=0, help="which questions, and their order")
    given = parser.parse_args(argv)
    made = {
        name: [row for source in given.sources for row in rows(source, held_out, given.seed)]
        for name, held_out in _SIDES.items()
    }
    folder = Path(given.out)
    folder.mkdir(parents=True, exist_ok=True)
    for name, found in made.items():
        with command_line.writing(str(folder / name)):
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found)
            (folder / name).write_text(text, encoding="utf-8")
        print(f"{folder / name}: {len(found):,} rows")
    return 0


if __name__ == "__main__":
    command_line.run(main)
