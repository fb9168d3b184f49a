"""DeepSeek-V3 over the devices of its deployment units, all 61 layers at their real dimensions, lowered for GPUs without any:
prefill over 32 (with and without heads divided over 4), decoding over 144 and 320, latents in BF16 and FP8.

    python -m tests.serving.deployment
"""

import dataclasses
import importlib
import re
import time

from deepseek_jax.serving.deployment import from_config_dict
from experiments.planning.serving_programs import placed_weights, traced
from experiments.planning.serving_weights import num_bytes, weight_bytes

UNITS = ("prefill_ep32", "prefill_ep32_tp4", "decode_ep144", "decode_ep320")
PAGES = 2048  # on each device


def unit(name, **changes):
    found = from_config_dict(importlib.import_module(f"configs.serve_{name}").get_config())
    return dataclasses.replace(found, **changes)


def check(of, lowered):
    """A device's share of the arguments is what the planner counts; between nodes tokens of decoding travel in fixed places, and
    inside of one as rows; nothing but counts is gathered."""
    text = lowered.as_text()
    ready = placed_weights(of).ready
    experts = num_bytes(ready["moe_layers"]["ffn"]["experts"])
    tables = num_bytes(ready["moe_layers"]["ffn"]["placement"])
    on_device = num_bytes(ready) - tables - experts + experts // of.devices
    assert on_device == sum(weight_bytes(of).values()), (on_device, weight_bytes(of))
    assert re.search(r'"stablehlo.custom_call"|stablehlo.custom_call', text)  # kernels
    if of.role == "decode":
        gathered = re.findall(r'"stablehlo.all_gather".*?-> tensor<([\dxa-z]+)>', text, re.DOTALL)
        assert gathered == ["8x8xi32"], gathered  # how many rows each device of a node has for each
        assert len(re.findall(r'"stablehlo.all_to_all"', text)) == 2
        assert len(re.findall(r"@ragged_all_to_all", text)) == 2
    return len(text)


def main():
    for name in UNITS:
        for cache in ("model", "fp8"):
            of = unit(name, cache=cache)
            for program, made in traced(of, PAGES).items():
                began = time.perf_counter()
                size = check(of, made.lower(lowering_platforms=("cuda",)))
                print(
                    f"{name}, latents {cache}, {program}: {of.devices} devices, {of.experts} experts each, "
                    f"{size / 1e6:.1f} MB of text, lowered in {time.perf_counter() - began:.1f} s",
                    flush=True,
                )


if __name__ == "__main__":
    main()
