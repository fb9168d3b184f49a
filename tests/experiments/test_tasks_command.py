"""The command writes what the library makes, and a mistake is one line."""

import json

import pytest

from deepseek_jax.posttraining.tasks import rows
from experiments import command_line, tasks


def test_both_sides_are_written(tmp_path, capsys):
    sources = ["tasks:addition/2/boxed/30", "tasks:program/1/boxed/20"]
    assert command_line.status(tasks.main, [*sources, f"--out={tmp_path / 'new'}", "--seed=3"]) == 0
    for name, held_out, count in (("train.jsonl", False, 50), ("held_out.jsonl", True, 5)):
        lines = (tmp_path / "new" / name).read_text().splitlines()
        assert [json.loads(line) for line in lines] == [row for s in sources for row in rows(s, held_out, 3)]
        assert f"{name}: {count} rows\n" in capsys.readouterr().out or name == "held_out.jsonl"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["tasks:adition", "--out=x"], "did you mean 'addition'?"),
        (["--out=x"], "the following arguments are required: SOURCE"),
        (["tasks:addition"], "the following arguments are required: --out"),
        (["tasks:addition", "--out=x", "--seed=y"], "invalid int value: 'y'"),
    ],
)
def test_mistakes(argv, message, capsys):
    assert command_line.status(tasks.main, argv) == command_line.MISTAKE
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error
