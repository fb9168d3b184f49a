"""Precision policies: the format of both operands of each GEMM, of what is saved, and of what travels.

A linear layer has three GEMMs (report figure 6): fprop y = x W, dgrad dx = dy W^T, wgrad dW = x^T dy. Embedding,
output head, gate, norms and attention core are in no policy: they keep BF16 or FP32 (section 3.3.1).

The report leaves per-token and per-channel quantisation undiscussed; `per_token_channel` compares them.
"""

import dataclasses

from deepseek_jax.checks import choice
from deepseek_jax.precision.operands import ROW, SQUARE, TENSOR, TILE, Format, power_of_two

Formats = tuple[Format, Format]


@dataclasses.dataclass(frozen=True)
class Policy:
    """fprop: (activation, weight); dgrad: (gradient, weight); wgrad: (activation, gradient), along the tokens.

    expert_input: format of the routed experts' input and of the gradient of their output, which travel between
    devices: power-of-two scales (section 3.3.3). saved_attention: "e5m6" or "fp8", how the attention output is kept
    for the backward pass. dispatch, combine: number formats of the expert exchange.
    """

    name: str
    fprop: Formats
    dgrad: Formats
    wgrad: Formats
    expert_input: Format
    saved_attention: str = "e5m6"
    dispatch: str = "fp8_ue8m0"
    combine: str = "bf16"

    def __post_init__(self):
        for gemm in ("fprop", "dgrad", "wgrad"):
            a, b = getattr(self, gemm)
            if a.fine != b.fine:
                raise ValueError(
                    f"policy {self.name!r}: {gemm} mixes scales along the contraction, {a} and {b}"
                )


def _fine(name: str, scale: str) -> Policy:
    tile, square = dataclasses.replace(TILE, scale=scale), dataclasses.replace(SQUARE, scale=scale)
    return Policy(name, (tile, square), (tile, square), (tile, tile), power_of_two(TILE))


def _coarse(name: str, fmt: Format) -> Policy:
    return Policy(name, (fmt, fmt), (fmt, fmt), (fmt, fmt), fmt, saved_attention="fp8", dispatch="bf16")


_DEEPSEEK = _fine("deepseek_fp8", "fp32")

PRESETS: dict[str, Policy | None] = {
    "bf16": None,
    "deepseek_fp8": _DEEPSEEK,
    "deepseek_fp8_ue8m0": _fine("deepseek_fp8_ue8m0", "ue8m0"),
    "per_token_channel": _coarse("per_token_channel", ROW),
    "per_tensor": _coarse("per_tensor", TENSOR),
    # Appendix B.2: activation gradients in 128x128 blocks; a 16B model diverged.
    "block_wise_grads": dataclasses.replace(
        _DEEPSEEK, name="block_wise_grads", dgrad=(SQUARE, SQUARE), wgrad=(TILE, SQUARE)
    ),
}


def preset(name: str) -> Policy | None:
    """The policy of that name; None for "bf16". Raises ValueError for an unknown name."""
    choice("precision", name, tuple(PRESETS))
    return PRESETS[name]
