"""What is said while the library works: on a terminal, in a file, above a progress bar, and nothing by default."""

import io
import time

import pytest
from tqdm import tqdm

from deepseek_jax import now
from experiments import screen
from experiments.screen import Screen


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(screen, "_LONG", 0.05)


def shown(file, seconds, quiet=False):
    screen = Screen(file)
    screen.quiet = quiet
    with now.shown_by(screen.doing), now.doing("compiling"):
        time.sleep(seconds)
    return file.getvalue()


def test_a_terminal_counts_and_keeps_what_took_long():
    assert shown(Terminal(), 0.1) == "\r\x1b[Kcompiling ...\r\x1b[Kcompiling: 0 s\n"
    assert shown(Terminal(), 0.0) == "\r\x1b[Kcompiling ...\r\x1b[K"
    assert "\r\x1b[Kcompiling ... 1 s" in shown(Terminal(), 1.2)


def test_a_file_gets_lines_for_what_takes_long():
    assert shown(io.StringIO(), 0.2) == "compiling ...\ncompiling: 0 s\n"
    assert shown(io.StringIO(), 0.0) == ""


def test_within_other_work_the_innermost_is_shown():
    file = Terminal()
    show = Screen(file).doing
    with now.shown_by(show), now.doing("outer"), now.doing("inner"):
        time.sleep(1.2)
    assert "\r\x1b[Kinner ... 1 s" in file.getvalue() and "outer ... 1 s" not in file.getvalue()


def test_a_stop_says_what_goes_on():
    screen = Screen(io.StringIO())
    with screen.doing("reading"), screen.doing("compiling"):
        screen.stopping("stopping")
    screen.stopping("stopping")
    assert screen._file.getvalue() == "stopping (now: compiling)\nstopping\n"


def test_lines_stand_above_a_bar():
    file = Terminal()
    with tqdm(total=3, file=file) as bar:
        bar.update(1)
        text = shown(file, 0.2)
    assert "compiling ...\n" in text and "compiling: 0 s\n" in text and "\x1b[K" not in text


def test_errors_pass_and_nobody_listens_by_default(capsys):
    with pytest.raises(ValueError), now.shown_by(Screen(io.StringIO()).doing), now.doing("x"):
        raise ValueError
    with now.doing("x"):
        pass
    assert shown(io.StringIO(), 0.1, quiet=True) == "" and capsys.readouterr().err == ""
