"""Converts checkpoints between Hugging Face folders and this project's orbax checkpoints.

    python -m experiments.convert --from=hf --to=orbax --input=DeepSeek-V2-Lite --output=runs/v2_lite
    python -m experiments.convert --from=orbax --to=hf --input=runs/tiny --output=tiny-hf --format=bf16
    python -m experiments.convert --from=orbax --to=hf --input=runs/tiny --output=tiny-hf --step=140 --ema
    python -m experiments.convert --from=hf --to=hf --input=bf16-folder --output=fp8-folder --format=fp8

Streams tensor by tensor; run it again after an interruption and it goes on. `--format=stored` keeps every
tensor as it is, FP8 included.
"""

from collections.abc import Sequence
from typing import Any

from absl import flags
from tqdm import tqdm

from deepseek_jax.hf import FORMATS, convert
from experiments import command_line

_FROM = flags.DEFINE_enum("from", None, ["hf", "orbax"], "Format of the input.", required=True)
_TO = flags.DEFINE_enum("to", None, ["hf", "orbax"], "Format of the output.", required=True)
_INPUT = flags.DEFINE_string("input", None, "Folder to read.", required=True)
_OUTPUT = flags.DEFINE_string("output", None, "Folder to write; must not exist or be empty.", required=True)
_FORMAT = flags.DEFINE_enum("format", "stored", list(FORMATS), "Number format of the output.")
_SCALE = flags.DEFINE_enum("scale", "fp32", ["fp32", "ue8m0"], "FP8 scales: DeepSeek-V3's, or V3.1's.")
_STEP = flags.DEFINE_integer("step", None, "A run's checkpoint of this step instead of the newest.")
_EMA = flags.DEFINE_bool("ema", False, "A run's averaged parameters instead of the last ones.")
_MTP = flags.DEFINE_bool("mtp", True, "--nomtp leaves the MTP modules of a Hugging Face folder out.")


def main(argv: Sequence[str]) -> int:
    command_line.parse_flags(argv)
    name = f"{_FROM.value} -> {_TO.value}"
    with (
        tqdm(unit="B", unit_scale=True, unit_divisor=1024, desc=name, delay=0.1) as bar,
        command_line.writing(_OUTPUT.value),
    ):

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        if _TO.value == "hf":
            options: dict[str, Any] = {flag.name: flag.value for flag in (_SCALE, _MTP, _STEP, _EMA)}
            convert.to_hf(_INPUT.value, _OUTPUT.value, _FORMAT.value, progress, **options)
        elif _STEP.value is not None or _EMA.value:
            raise ValueError(
                "--step and --ema choose among a run's parameters: use them with --from=orbax --to=hf"
            )
        elif _FROM.value == "hf":
            convert.to_orbax(_INPUT.value, _OUTPUT.value, _FORMAT.value, progress, mtp=_MTP.value)
        else:
            raise ValueError("--from=orbax --to=orbax: nothing to convert; copy the folder")
    print(f"wrote {_OUTPUT.value}")
    return 0


if __name__ == "__main__":
    command_line.run(main)
