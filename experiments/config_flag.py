"""`--config=FILE` and `--config.KEY=VALUE`: the config of a command.

The file is Python with `get_config()`, which returns a `ConfigDict` or a nested dict. A value is read as the type that
the key's dataclass declares, so that keys whose default is None can be set, and set back with `None`.
"""

import ast
import dataclasses
import re
import runpy
import sys
import traceback
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags

from deepseek_jax.checks import options_of, section_of, type_of
from deepseek_jax.config import Config, build
from experiments import command_line, config_help

_FLAG = re.compile(r"--?(no)?config(\.[^=]*)?(=.*)?", re.DOTALL)


class Settings(NamedTuple):
    """The config's file on a command line, and the text of each key that it sets."""

    file: str | None
    values: dict[str, str]


def parse(
    argv: Sequence[str],
    default: str,
    values: flags.FlagValues = flags.FLAGS,
    whole: Any = Config,
    any_stage: bool = False,
) -> Any:
    """Returns the checked config, a `whole`; parses the other arguments as absl's flags (`command_line.parse_flags`).

    `--help` lists every key with its value and documentation, `--print_config` the values; both end the process.

    Args:
        argv: arguments without the program's name.
        default: the file where the command line names none.
        values: which flags.
        whole: the dataclass that the file's keys are of.
        any_stage: sections of the file that `whole` has not, as of a stage after pre-training, are left out.

    Raises:
        ValueError: names the key, the nearest valid one, or the line of the file; OSError: the file cannot be read.
    """
    settings, rest = take(argv, whole)
    file = settings.file or default
    if command_line.asks_for_help(argv):
        cfg = build(whole, _changed(_of(whole, read(file), any_stage), settings.values, whole))
        command_line.parse_flags(argv, values, config_help.keys(cfg, file))
    printed = "--print_config" in rest
    command_line.parse_flags([a for a in rest if a != "--print_config"], values)
    cfg = build(whole, _changed(_of(whole, read(file), any_stage), settings.values, whole))
    if printed:
        print(config_help.listing(cfg), end="")
        sys.exit(0)
    return cfg


def _of(whole: Any, values: dict[str, Any], any_stage: bool) -> dict[str, Any]:
    known = {field.name for field in dataclasses.fields(whole)}
    return {name: value for name, value in values.items() if name in known or not any_stage}


# --- the command line -----------------------------------------------------------------------------------------


def take(argv: Sequence[str], whole: Any = Config) -> tuple[Settings, list[str]]:
    """Splits `argv` into settings of the config and other arguments. The last of several settings of a key holds."""
    file, values, rest = None, {}, []
    arguments = iter(argv)
    for argument in arguments:
        match = _FLAG.fullmatch(argument)
        if argument == "--" or match is None:
            rest += [argument, *(arguments if argument == "--" else ())]
        elif match[2] is None and not match[1]:
            file = _value("--config", match[3], arguments)
        else:
            key = (match[2] or "")[1:]
            values[key] = _setting(whole, key, bool(match[1]), match[3], arguments)
    return Settings(file, values), rest


def _setting(whole: Any, key: str, negated: bool, text: str | None, arguments: Iterator[str]) -> str:
    if type_of(whole, key) is bool and text is None:
        return str(not negated)
    if negated:
        raise ValueError(f"--noconfig.{key}: only a switch can be negated; set --config.{key}=VALUE")
    return _value(f"--config.{key}", text, arguments)


def _value(name: str, text: str | None, arguments: Iterator[str]) -> str:
    value = text[1:] if text is not None else next(arguments, None)
    if value is None:
        raise ValueError(f"{name} needs a value: {name}=VALUE")
    return value


def _changed(values: dict[str, Any], settings: Mapping[str, str], whole: Any) -> dict[str, Any]:
    """Sets the keys of `settings` in `values`; makes a section that was None."""
    for key, text in settings.items():
        *sections, name = key.split(".")
        inner = values
        for section in sections:
            if not isinstance(inner.get(section), dict):
                inner[section] = {}
            inner = inner[section]
        inner[name] = read_value(key, text, whole)
    return values


_WORDS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
_KINDS = {bool: "True or False", int: "an integer", float: "a number", types.NoneType: "None"}


def read_value(key: str, text: str, whole: Any = Config) -> Any:
    """Reads `text` as the type that a key of the config, a `whole`, has. Raises ValueError."""
    hint = type_of(whole, key)
    if types.NoneType in options_of(hint) and text.lower() in ("none", "null"):
        return None
    if section_of(hint) is not None:
        names = ", ".join(f"{key}.{field.name}" for field in dataclasses.fields(section_of(hint))[:3])
        raise ValueError(f"--config.{key}={text}: {key} is a section; set one of its keys: {names}, ...")
    for option in options_of(hint):
        try:
            return _as(option, text)
        except (ValueError, SyntaxError, KeyError):
            continue
    wanted = " or ".join(_KINDS.get(option, str(option)) for option in options_of(hint))
    raise ValueError(f"--config.{key}={text} should be {wanted}")


def _as(option: Any, text: str) -> Any:
    if option is bool:
        return _WORDS[text.lower()]
    if option in (int, float, str):
        return option(text)
    if option is types.NoneType:
        raise ValueError
    if typing.get_origin(option) is tuple and not text.startswith(("(", "[")):
        return tuple(map(typing.get_args(option)[0], text.split(","))) if text else ()
    return ast.literal_eval(text)


# --- the file -------------------------------------------------------------------------------------------------


def read(path: str) -> dict[str, Any]:
    """Reads a config file as a nested dict.

    A path that is not there is looked for beside this package too, so that an installed command finds `configs/`.

    Raises:
        OSError: cannot be read; ValueError: is no config, with its line.
    """
    beside = Path(__file__).parents[1] / path
    found = str(beside) if not Path(path).exists() and beside.exists() else path
    open(found, "rb").close()  # a folder, or nothing, is an OSError that names it
    try:
        make = runpy.run_path(found).get("get_config")
        config: Any = make() if callable(make) else None
    except Exception as error:
        raise ValueError(f"{path}{_line(found, error)}: {type(error).__name__}: {error}") from error
    if not callable(make):
        raise ValueError(f"{path} has no function get_config() that returns a ConfigDict")
    values = config.to_dict() if hasattr(config, "to_dict") else config
    if not isinstance(values, Mapping):
        raise ValueError(f"get_config() of {path} should return a ConfigDict, not {type(config).__name__}")
    return dict(values)


def _line(path: str, error: Exception) -> str:
    """Names the line of the file where an error arose, as ", line 3"."""
    if isinstance(error, SyntaxError):
        return f", line {error.lineno}"
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    return f", line {lines[-1]}" if lines else ""
