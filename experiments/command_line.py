"""All commands begin here, and end here with one line when something is wrong.

    if __name__ == "__main__":
        command_line.run(main)

`main` takes the arguments without the program's name and returns the exit status. Does not import JAX.
"""

import argparse
import contextlib
import difflib
import errno
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

from absl import flags, logging

from experiments import compiled
from experiments.screen import SCREEN

_LONGEST = 700  # characters
_IN_BACKGROUND = "in the background"  # as `deepseek_jax.training.preflight` names a thread that compiles
MISTAKE, FAILURE, INTERRUPTED = 2, 1, 128 + signal.SIGINT  # exit statuses

Main = Callable[[Sequence[str]], int]

# Errors of the operating system that the next attempt meets again: a wrong path, a folder that cannot be written.
_WRONG_PATH = frozenset(
    (
        *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY, errno.ENAMETOOLONG),
        *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOEXEC, errno.ELOOP, errno.EINVAL),
    )
)


def run(main: Main) -> NoReturn:
    """Runs a command on the process's arguments and exits with its status."""
    compiled.keep()
    with _showing():
        code = status(main, sys.argv[1:])
    if code or _IN_BACKGROUND in [thread.name for thread in threading.enumerate()]:
        # at once: a thread may be compiling, and would abort the interpreter's own end
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):
                stream.flush()
        os._exit(code)
    sys.exit(code)


def _showing() -> contextlib.AbstractContextManager[None]:
    """Commands that load the library show its work on standard error."""
    if "deepseek_jax" not in sys.modules:
        return contextlib.nullcontext()
    from deepseek_jax import now

    return now.shown_by(SCREEN.doing)


def status(main: Main, argv: Sequence[str]) -> int:
    """Runs a command; returns its exit status. An error that a user can mend, or that the machine caused, is one line.

    2: a mistake in the command line, a config or a path; 1: what else the operating system refused (a full disk, no
    memory); 130: Ctrl-C. With DEEPSEEK_JAX_TRACEBACK=1 in the environment, errors are raised.
    """
    try:
        _check_text(argv)
        try:
            return main(argv)
        finally:
            sys.stdout.flush()  # here, where it is known what to do if nobody reads any more
    except KeyboardInterrupt:
        complain("interrupted")
        return INTERRUPTED
    except BrokenPipeError:  # what reads our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILURE
    except (ValueError, OverflowError, OSError, MemoryError, flags.Error) as error:
        if os.environ.get("DEEPSEEK_JAX_TRACEBACK", "0") != "0":
            raise
        complain(one_line(_said(error)))
        if isinstance(error, MemoryError):
            return FAILURE
        return FAILURE if isinstance(error, OSError) and error.errno not in _WRONG_PATH else MISTAKE


@contextlib.contextmanager
def writing(path: str) -> Iterator[None]:
    """Adds `path` to errors of the operating system that name no file, such as a full disk's."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise type(error)(error.errno, error.strerror, path) from error


def complain(message: str) -> None:
    print(f"error: {message}", file=sys.stderr, flush=True)


def one_line(message: str) -> str:
    """Puts a message on one line and cuts it: somebody may have typed an endless argument."""
    line = " ".join(message.split())
    return line if len(line) <= _LONGEST else f"{line[:_LONGEST]}..."


def _said(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        other = f" -> {error.filename2!r}" if error.filename2 is not None else ""
        return f"{error.strerror}: {error.filename!r}{other}"
    if isinstance(error, MemoryError):
        return f"out of memory: {error}".rstrip(": ")
    return str(error) or type(error).__name__


def _check_text(argv: Sequence[str]) -> None:
    for argument in argv:
        try:
            argument.encode()
        except UnicodeEncodeError:
            raise ValueError(f"the argument {os.fsencode(argument)!r} is not UTF-8 text") from None


class Parser(argparse.ArgumentParser):
    """An argparse that raises ValueError for a mistake, as `run` expects."""

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parses as argparse does, but refuses "--name=--": argparse takes that "--" for the end of the options."""
        for argument in args or ():
            if argument == "--":
                break
            if argument.startswith("-") and argument.endswith("=--"):
                self.error(f"argument {argument.removesuffix('=--')}: expected a value, not '--'")
        return super().parse_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (see --help)")


def asks_for_help(argv: Sequence[str]) -> bool:
    options = argv[: argv.index("--")] if "--" in argv else argv
    return any(a in ("-h", "-help", "--help", "--helpfull") for a in options)


def parse_flags(argv: Sequence[str], values: flags.FlagValues = flags.FLAGS, more_help: str = "") -> None:
    """Parses absl's flags; `--help` prints the command's docstring, its flags and `more_help`, and exits.

    Raises ValueError for arguments that are no flags, flags.Error for wrong ones.
    """
    if asks_for_help(argv):
        own = values.get_key_flags_for_module(sys.argv[0]) or [values[name] for name in sorted(values)]
        print(f"{(sys.modules['__main__'].__doc__ or '').strip()}\n\nflags:\n" + "\n".join(map(_flag, own)))
        print(more_help, end="")
        sys.exit(0)
    try:
        rest = values([sys.argv[0], *argv])[1:]
    except flags.UnrecognizedFlagError as error:
        near = difflib.get_close_matches(error.flagname, list(values), n=1, cutoff=0.5)
        hint = f"did you mean --{near[0]}? " if near else ""
        raise ValueError(f"there is no flag --{error.flagname}; {hint}(see --help)") from error
    except flags.IllegalFlagValueError as error:
        missing = [name for name in values if values[name].value is None and f"--{name}=None" in str(error)]
        if not missing:
            raise
        raise ValueError(f"give --{missing[0]}={missing[0].upper()} (see --help)") from error
    if rest:
        raise ValueError(f"unexpected arguments {rest}: settings are --NAME=VALUE (see --help)")
    _quieten_failed_writes()


def _quieten_failed_writes() -> None:
    """Silences orbax's log and late futures, which show a traceback of a failed write that is raised anyway."""
    logging.set_verbosity(logging.FATAL)

    def hook(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            sys.__unraisablehook__(unraisable)

    sys.unraisablehook = hook


def _flag(flag: flags.Flag) -> str:
    default = "" if flag.default in (None, "", []) else f" [{flag.default}]"
    return f"  --{flag.name}{default}\n      {flag.help}"
