"""Answers of an expert as they are drawn, in a file that goes on where it was cut off.

`answers.jsonl` has a line for each answer, problem by problem, in order; `drawn_by.json` beside it what decides them. Problems
are drawn some at a time. Their lines are on disk before the next ones are drawn; lines of problems that are not whole are taken
away when the file is opened again, and these are drawn anew, the same.
"""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from deepseek_jax.checks import names_that_differ, require
from deepseek_jax.json_files import parse_object, read_object

ANSWERS, DRAWN_BY = "answers.jsonl", "drawn_by.json"
Line = dict[str, Any]


class Drawn:
    """The answers in a folder.

    Args:
        drawn_by: all that decides the answers, as JSON has it.
        each: answers of a problem.

    Attributes:
        lines: of all problems that are whole.

    Raises ValueError for a folder with answers that something else decided, and for a damaged file.
    """

    def __init__(self, folder: Path, drawn_by: Mapping[str, Any], each: int):
        self._path, self._each = folder / ANSWERS, each
        self.lines: list[Line] = []
        if self._path.exists():
            self._check(folder / DRAWN_BY, drawn_by)
            self._read()
        else:
            write_whole(folder / DRAWN_BY, json.dumps(drawn_by, indent=2, ensure_ascii=False) + "\n")
            self._path.touch()

    @property
    def problems(self) -> int:
        """How many problems have their answers."""
        return len(self.lines) // self._each

    def add(self, lines: Sequence[Line]) -> None:
        """The answers of the next problems."""
        assert len(lines) % self._each == 0
        with open(self._path, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            file.flush()
            os.fsync(file.fileno())
        self.lines += lines

    def _check(self, path: Path, drawn_by: Mapping[str, Any]) -> None:
        before = read_object(path)
        different = names_that_differ(before, json.loads(json.dumps(drawn_by)))
        require(
            not different,
            f"{self._path} was drawn with other settings ({', '.join(different)}): choose another out_dir, or remove it",
        )

    def _read(self) -> None:
        raw = self._path.read_bytes()
        ends = [i + 1 for i, byte in enumerate(raw) if byte == ord("\n")]
        whole = len(ends) // self._each * self._each
        end = ends[whole - 1] if whole else 0
        for n, line in enumerate(raw[:end].splitlines(), start=1):
            self.lines.append(parse_object(line, f"{self._path}, line {n}"))
            place = (self.lines[-1].get("problem"), self.lines[-1].get("sample"))
            wanted = divmod(n - 1, self._each)
            require(
                place == wanted,
                f"{self._path}, line {n} is not answer {wanted[1]} to problem {wanted[0]}: remove the file",
            )
        if end < len(raw):
            os.truncate(self._path, end)


def write_whole(path: Path, text: str) -> None:
    """Writes a file so that it is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    with open(part, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def json_lines(rows: Iterable[Mapping[str, Any]]) -> str:
    """What JSON has not, as a column of dates in Parquet, as text."""
    return "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)
