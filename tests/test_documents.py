"""What the documents say of the commands is so."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from configs import small_1b
from deepseek_jax.config import from_config_dict
from experiments import __main__ as commands
from experiments import dry_run

ROOT = Path(__file__).parents[1]


def test_the_first_1b_run_has_the_figures_of_the_command():
    cfg = from_config_dict(small_1b.get_config())
    one = dataclasses.replace(cfg, mesh=dataclasses.replace(cfg.mesh, data=1))
    lines = [line for line in dry_run.report(one).splitlines() if "device(s)" not in line]
    page = (ROOT / "configs" / "FIRST_1B_RUN.md").read_text()
    assert [line for line in lines if line not in page] == []


def test_the_table_has_all_commands():
    found = {p.stem for p in (ROOT / "experiments").glob("*.py") if "command_line.run(main)" in p.read_text()}
    assert found - {"command_line"} == set(commands.COMMANDS)
    readme = (ROOT / "README.md").read_text()
    assert all(f"| `{name}` |" in readme for name in commands.COMMANDS)
    assert all(
        0 < len(commands.about(name)) < 140 and f"  {name} " in commands.table() for name in commands.COMMANDS
    )


@pytest.mark.parametrize(
    ("argv", "status", "out", "err"),
    [
        ([], 0, "kill_test", ""),
        (["trian"], 2, "", "error: no command 'trian'; did you mean train?\n"),
    ],
)
def test_deepseek_jax(argv, status, out, err, monkeypatch, capsys):
    monkeypatch.setattr(commands.sys, "argv", ["deepseek-jax", *argv])
    try:
        commands.main()
        code = 0
    except SystemExit as end:
        code = end.code
    printed = capsys.readouterr()
    assert (code, printed.err) == (status, err) and out in printed.out


def test_a_command_runs_as_the_program():
    command = [sys.executable, "-m", "experiments", "launch", "--processes=x"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: argument --processes: invalid int value: 'x' (see --help)\n"
