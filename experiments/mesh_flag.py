"""`--mesh`, as the commands that run a model over devices take it."""

from typing import Any

from deepseek_jax.config import MeshConfig, build
from experiments import config_flag


def parse_mesh(text: str) -> MeshConfig | None:
    """Reads "node=2,local=4" as a MeshConfig, with `data` 1 unless it is named, and "" as None. Raises ValueError."""
    values: dict[str, Any] = {"data": 1} if text else {}
    for pair in text.split(",") if text else ():
        key, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"--mesh={text}: {pair!r} should be KEY=VALUE, as node=2,local=4")
        values[key.strip()] = config_flag.read_value(f"mesh.{key.strip()}", value.strip())
    return build(MeshConfig, values, "mesh.") if values else None
