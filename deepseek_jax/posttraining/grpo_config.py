"""The options of GRPO's loss, and how the papers set them (DeepSeek-V3 report section 5.2.2 and those named below)."""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from deepseek_jax.checks import choice, ranges, require

RATIOS = ("token", "sequence_mean", "sequence")
KLS = ("k3", "unbiased")
AGGREGATES = ("output", "token", "constant")
SCALES = ("none", "std", "sample_std")
IMPORTANCES = ("none", "truncated", "masked")

_MANY = 1 << 31


@dataclasses.dataclass(frozen=True)
class GRPOLossConfig:
    """What `grpo_loss` and `advantages` make of rewards and log-probabilities. The defaults are DeepSeek-V3.2's (arXiv
    2512.02556 section 3.1), which gives neither clip nor delta: those are DeepSeek-R1's beta, PPO's clip and a guess."""

    # whose probabilities the ratio new / old compares: "token"; "sequence_mean": their geometric mean over an output (GSPO);
    # "sequence": their product, an output's probability, as the DeepSeek-V3 report writes it (equation 26)
    ratio: str = "token"
    clip_low: float = 0.2  # the ratio of a bad output counts down to 1 - clip_low
    clip_high: float = 0.2  # that of a good one up to 1 + clip_high
    beta: float = 0.001  # weight of the KL divergence from the reference; 0: none is needed
    # estimate of it: "k3" (equation 28), or times the ratio new / old, so that its gradient is that of the divergence
    kl: str = "unbiased"
    # mean over outputs of each one's mean ("output"), over all tokens ("token"), over outputs of sums / constant_length
    aggregate: str = "output"
    constant_length: int = 0  # tokens; of aggregate "constant"
    # a bad output is left out where its tokens' mean ln(sampled / new) is larger; 0: never
    off_policy_delta: float = 0.1
    # tokens' weights old / sampled, where these differ: "truncated" at importance_bound, or "masked": 0 beyond it
    importance: str = "none"
    importance_bound: float = 2.0  # see importance
    # advantage: reward minus the group's mean, over "none", the "std" of the group, or its "sample_std" (n - 1)
    scale: str = "none"
    mask_truncated: bool = False  # outputs cut off at the largest length teach nothing
    drop_silent: bool = False  # groups of equal rewards, which only pay their KL divergence, are left out

    def __post_init__(self):
        choice("loss.ratio", self.ratio, RATIOS)
        choice("loss.kl", self.kl, KLS)
        choice("loss.aggregate", self.aggregate, AGGREGATES)
        choice("loss.importance", self.importance, IMPORTANCES)
        choice("loss.scale", self.scale, SCALES)
        ranges("loss", self, "clip_low clip_high beta off_policy_delta", 0, 1e6)
        ranges("loss", self, "importance_bound", 1, 1e6)
        ranges("loss", self, "constant_length", 0, _MANY)
        require(
            self.aggregate != "constant" or self.constant_length > 0,
            'loss.aggregate="constant" needs loss.constant_length, in tokens, by which each output\'s sum is divided',
        )


# What each differs in from DeepSeek-V3.2; in a config file: config.loss.update(**PRESETS["dapo"]).
PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "v32": {},
        # arXiv 2402.03300
        "deepseekmath": {"kl": "k3", "beta": 0.04, "off_policy_delta": 0.0, "scale": "std"},
        # equations 26 to 28 of the DeepSeek-V3 report, beta of DeepSeek-R1
        "report": {"ratio": "sequence", "kl": "k3", "off_policy_delta": 0.0, "scale": "std"},
        # arXiv 2503.20783; constant_length: the largest of an output
        "dr_grpo": {"aggregate": "constant", "beta": 0.0, "off_policy_delta": 0.0},
        # arXiv 2503.14476
        "dapo": {
            "aggregate": "token",
            "clip_high": 0.28,
            "beta": 0.0,
            "off_policy_delta": 0.0,
            "scale": "std",
            "mask_truncated": True,
            "drop_silent": True,
        },
        # arXiv 2507.18071
        "gspo": {
            "ratio": "sequence_mean",
            "clip_low": 3e-4,
            "clip_high": 4e-4,
            "beta": 0.0,
            "off_policy_delta": 0.0,
            "scale": "std",
        },
    }
)


def preset(name: str, **changes: Any) -> GRPOLossConfig:
    """The options of a paper, with `changes`. Raises ValueError for an unknown name or value."""
    choice("preset", name, tuple(PRESETS))
    return GRPOLossConfig(**{**PRESETS[name], **changes})
