"""`--mesh`, as the commands that run a model over devices take it."""

import contextlib
import re
from collections.abc import Iterator
from typing import Any

from deepseek_jax.config import MeshConfig, build
from experiments import config_flag

_KEY = re.compile(r"(?:config key |(?:--)?config\.)?\bmesh\.(\w+|\*)")


def parse_mesh(text: str) -> MeshConfig | None:
    """Reads "node=2,local=4" as a MeshConfig, with `data` 1 unless it is named, and "" as None. Raises ValueError."""
    values: dict[str, Any] = {"data": 1} if text else {}
    with named_by_the_flag():
        for pair in text.split(",") if text else ():
            key, equals, value = pair.partition("=")
            if not equals:
                raise ValueError(f"--mesh={text}: {pair!r} should be KEY=VALUE, as node=2,local=4")
            values[key.strip()] = config_flag.read_value(f"mesh.{key.strip()}", value.strip())
        return build(MeshConfig, values, "mesh.") if values else None


@contextlib.contextmanager
def named_by_the_flag() -> Iterator[None]:
    """Errors of the block, which name keys of a config, as mesh.node, name what was typed, as --mesh=node."""
    try:
        yield
    except ValueError as error:
        said = _KEY.sub(lambda key: "--mesh" if key[1] == "*" else f"--mesh={key[1]}", str(error))
        if said == str(error):
            raise
        raise ValueError(said) from error
