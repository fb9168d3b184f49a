"""FP8 mixed-precision training (report section 3.3): `policy` says what is quantised, `linear` and `experts` do it."""

from deepseek_jax.precision.policy import PRESETS, Policy, preset

__all__ = ["PRESETS", "Policy", "preset"]
