"""`python -m experiments.plan memory`: bytes of state and weights per device; see `experiments/plan.py`."""

import sys
from collections.abc import Sequence

from absl import flags
from ml_collections import config_flags

from deepseek_jax.config import from_config_dict
from deepseek_jax.parallel.mesh import abstract_mesh
from deepseek_jax.training.memory import Memory, state_memory
from experiments import command_line

GIB = 1 << 30
NAMES = {
    "master": "master weights",
    "moments": "moments",
    "compute": "compute copy",
    "gradients": "gradients, a micro-batch",
    "accumulated": "  accumulated, float32",
    "scattered": "  scattered, float32",
}


def _line(name: str, dense: int, experts: int) -> str:
    return f"  {name:<26}" + "".join(f"{n / GIB:>12.2f}" for n in (dense, experts, dense + experts))


def report(memory: dict[str, Memory]) -> str:
    """The table, GiB."""
    dense, experts = memory["dense"], memory["experts"]
    lines = [f"  {'GiB per device':<26}{'dense':>12}{'experts':>12}{'all':>12}"]
    rows = [(NAMES[key], getattr(dense, key), getattr(experts, key)) for key in NAMES]
    lines += [_line(*row) for row in rows if row[1] + row[2]]
    lines.append(_line("between steps", dense.between_steps, experts.between_steps))
    lines.append(_line("in a step", dense.in_step, experts.in_step))
    return "\n".join(lines)


def main(argv: Sequence[str]) -> int:
    """argv: the command's name, then flags."""
    values = flags.FlagValues()
    config = config_flags.DEFINE_config_file(
        "config", None, "The run's config.", flag_values=values, sys_argv=list(argv)
    )
    devices = flags.DEFINE_integer("devices", 0, "How many; 0: what config.mesh names.", flag_values=values)
    rest = command_line.parse(argv, default="configs/v3_671b.py", values=values)
    try:
        if len(rest) > 1:
            raise ValueError(
                f"unexpected arguments {rest[1:]}; settings are --config.KEY=VALUE and --devices=N"
            )
        cfg = from_config_dict(config.value)
        m = cfg.mesh
        named = m.pipe * max(1, m.data) * m.node * m.local * m.tensor
        mesh = abstract_mesh(m, devices.value or named)
        memory = state_memory(cfg, mesh)
    except (OSError, ValueError) as error:  # a config file that cannot be read shows where it is used
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    axes = " x ".join(f"{axis}={n}" for axis, n in mesh.shape.items() if n > 1) or "no axes"
    print(f"{mesh.size} device(s): {axes}; zero={cfg.mesh.zero}, precision={cfg.precision}")
    print(report(memory))
    print("  without activations, buffers of the exchange and temporary copies")
    return 0
