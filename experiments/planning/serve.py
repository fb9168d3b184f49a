"""`python -m experiments.plan serve`: what a deployment unit holds and how fast it should be, on paper.

Prints bytes on each device part by part, how many sequences fit, bytes per link of a step, and seconds of a step part by part,
one after the other and with two micro-batches. Rates of kernels and links are measured ones (`planning/hardware.py`,
`planning/serving_links.py`); everything else is computed, and nothing is fitted to the time of a step. With --compile, XLA's
own bytes stand beside the predicted ones.
"""

from collections.abc import Sequence

from absl import flags

from deepseek_jax.serving.deployment import Deployment
from experiments import config_flag
from experiments.planning import serving_compiled, serving_tables
from experiments.planning.hardware import PRESETS
from experiments.planning.serving_prediction import predict

CONTEXT = 4989  # tokens of a sequence on DeepSeek's day, in the mean
ACCEPTANCE = 0.85  # of drafts: the report's, 85 to 90%


def main(argv: Sequence[str]) -> int:
    values = flags.FlagValues()
    hardware = flags.DEFINE_enum("hardware", "h800", sorted(PRESETS), "Which GPUs.", flag_values=values)
    context = flags.DEFINE_integer(
        "context", CONTEXT, "Tokens of a sequence; of a prompt in prefill.", 1, 1 << 24, flag_values=values
    )
    cached = flags.DEFINE_integer(
        "cached", 0, "Of a prompt's tokens, those found in the cache.", 0, 1 << 24, flag_values=values
    )
    acceptance = flags.DEFINE_float(
        "acceptance", ACCEPTANCE, "Drafts that are accepted, of one.", 0.0, 1.0, flag_values=values
    )
    compiled = flags.DEFINE_boolean(
        "compile", False, "Compile the unit's programs for H100s, without a GPU, too.", flag_values=values
    )
    unit = config_flag.parse(argv, "configs/serve_decode_ep144.py", values, Deployment)
    if cached.value >= context.value:
        raise ValueError(
            f"--cached={cached.value}: the last token at least is computed; give less than --context"
        )
    if compiled.value:
        serving_compiled.check(hardware.value)
    prediction = predict(unit, PRESETS[hardware.value], context.value, cached.value, acceptance.value)
    print(serving_tables.report(prediction), flush=True)
    if compiled.value:
        print("\n" + serving_compiled.report(prediction))
    return 0
