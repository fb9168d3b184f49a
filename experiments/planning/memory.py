"""`python -m experiments.plan memory` prints bytes of state, weights and an exchange per device (`experiments/plan.py`)."""

from collections.abc import Sequence

from absl import flags

from deepseek_jax.parallel.mesh import abstract_mesh, named_devices
from experiments import config_flag
from experiments.study.exchange_memory import Buffer, exchange_buffers, tokens_at_once
from experiments.study.memory import Memory, state_memory

UNITS = {"GiB": 1 << 30, "MiB": 1 << 20}
NAMES = {
    "master": "master weights",
    "moments": "moments",
    "compute": "compute copy",
    "gradients": "gradients, a micro-batch",
    "accumulated": "  accumulated, float32",
    "scattered": "  scattered, float32",
}


def _line(name: str, dense: int, experts: int, unit: str) -> str:
    return f"  {name:<26}" + "".join(f"{n / UNITS[unit]:>12.2f}" for n in (dense, experts, dense + experts))


def report(memory: dict[str, Memory]) -> str:
    """Returns the table, in GiB, or in MiB where all is less than one."""
    dense, experts = memory["dense"], memory["experts"]
    unit = "GiB" if dense.in_step + experts.in_step >= UNITS["GiB"] else "MiB"
    lines = [f"  {unit + ' per device':<26}{'dense':>12}{'experts':>12}{'all':>12}"]
    rows = [(NAMES[key], getattr(dense, key), getattr(experts, key)) for key in NAMES]
    lines += [_line(*row, unit) for row in rows if row[1] + row[2]]
    lines.append(_line("between steps", dense.between_steps, experts.between_steps, unit))
    lines.append(_line("in a step", dense.in_step, experts.in_step, unit))
    return "\n".join(lines)


def exchange_report(buffers: list[Buffer], tokens: int) -> str:
    """The buffers of one exchange, rows also per token."""
    lines = [
        f"  {'exchange, ' + str(tokens) + ' tokens per device':<36}{'rows':>10}{'per token':>11}{'MiB':>10}"
    ]
    lines += [f"  {b.name:<36}{b.rows:>10}{b.rows / tokens:>11.2f}{b.bytes / 2**20:>10.1f}" for b in buffers]
    return "\n".join(lines)


def main(argv: Sequence[str]) -> int:
    values = flags.FlagValues()
    devices = flags.DEFINE_integer(
        "devices", 0, "How many; 0: what config.mesh names.", lower_bound=0, flag_values=values
    )
    cfg = config_flag.parse(argv, "configs/v3_671b.py", values, any_stage=True)
    mesh = abstract_mesh(cfg.mesh, devices.value or named_devices(cfg.mesh))
    memory = state_memory(cfg, mesh)
    axes = " x ".join(f"{axis}={n}" for axis, n in mesh.shape.items() if n > 1) or "no axes"
    print(f"{mesh.size} device(s): {axes}; zero={cfg.mesh.zero}, precision={cfg.precision}")
    print(report(memory))
    print("  without activations and temporary copies")
    if buffers := exchange_buffers(cfg, mesh):
        print(exchange_report(buffers, tokens_at_once(cfg, mesh)))
    return 0
