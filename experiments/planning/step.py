"""`python -m experiments.plan step`: what a run needs and takes on GPUs, on paper.

Prints bytes on each device part by part, bytes sent per link, seconds of the phases of a layer and of the parts of a step,
and what follows: MFU, tokens per day, GPU-hours and price of a trillion tokens. Rates that kernels and links reach are
measured ones (`planning/hardware.py`); nothing is fitted to the time of a step. The step of DeepSeek-V3's own training is
set beside what DeepSeek measured. With --compile, XLA's own bytes stand beside the predicted ones.
"""

from collections.abc import Sequence

from absl import flags

from deepseek_jax.parallel.mesh import named_devices
from experiments import config_flag
from experiments.planning import measured, tables, xla
from experiments.planning.hardware import PRESETS
from experiments.planning.prediction import predict
from experiments.planning.run import run_of

PRICE = 2.0  # dollars per GPU-hour, as the report reckons (table 1)


def common_flags(values: flags.FlagValues) -> None:
    flags.DEFINE_enum("hardware", "h800", sorted(PRESETS), "Which GPUs.", flag_values=values)
    flags.DEFINE_float(
        "price", PRICE, "Dollars per GPU-hour.", lower_bound=0.0, upper_bound=1e6, flag_values=values
    )


def main(argv: Sequence[str]) -> int:
    values = flags.FlagValues()
    common_flags(values)
    flags.DEFINE_integer(
        "devices", 0, "How many; 0: what config.mesh names.", lower_bound=0, flag_values=values
    )
    flags.DEFINE_boolean(
        "compile", False, "Compile the step for H100s, without a GPU, too.", flag_values=values
    )
    cfg = config_flag.parse(argv, "configs/v3_671b.py", values, any_stage=True)
    run = run_of(cfg, values.devices or named_devices(cfg.mesh), PRESETS[values.hardware])
    if values.compile:
        xla.check(run)
    prediction = predict(run)
    print(tables.report(prediction, values.price))
    if measured.applies(run):
        print("\n" + measured.report(prediction), flush=True)
    if values.compile:
        print("\n" + xla.report(prediction))
    return 0
