"""Command lines with a config: mistakes end with one line that names the key and the nearest valid one."""

import sys
from collections.abc import Sequence

from absl import flags

from deepseek_jax.config import from_config_dict

_PREFIX = "--config."


def _unknown_key(argv: Sequence[str]) -> str | None:
    """What is wrong with the first `--config.KEY` of `argv` whose KEY does not exist, or None."""
    for argument in argv:
        if not argument.startswith(_PREFIX):
            continue
        key = argument[len(_PREFIX) :].split("=")[0]
        values: object = None
        for name in reversed(key.split(".")):
            values = {name: values}
        try:
            from_config_dict(values)
        except ValueError as error:  # or of the value None, which is no mistake in the key
            if str(error).startswith("unknown config key"):
                return str(error)
    return None


def parse(argv: Sequence[str], default: str, values: flags.FlagValues = flags.FLAGS) -> list[str]:
    """For `absl.app.run(flags_parser=...)`: the arguments that are no flags (of `values`).

    `default` is the config file where none is named. (As the flag's own default it would be read, and mistakes
    in overrides raised, while the module is imported.) Exits with status 2 on a mistake.
    """
    if not any(a.startswith("--config=") or a == "--config" for a in argv):
        argv = [argv[0], f"--config={default}", *argv[1:]]
    try:
        return values(argv)
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        unknown = _unknown_key(argv)
        if unknown is None and not isinstance(error, flags.Error | OSError):
            raise
        print(f"error: {unknown or ' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
