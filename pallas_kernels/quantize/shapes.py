"""Shapes that DeepSeek-V3 quantises in training: 4096 tokens, and the rows that 8 experts receive from them."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class QuantizeShape:
    """`op` is a function of `ops.py`; rows and cols are those of its input (of one half, for SwiGLU)."""

    name: str
    op: str
    rows: int
    cols: int
    block: tuple[int, int] = (1, 128)

    @property
    def bytes(self) -> int:
        """Counts bytes read and written once: BF16 or FP8 in, FP8 and one float32 scale per block out."""
        per_element_in = {"swiglu_quantize": 4, "requantize_transposed": 1 + 4 / 128}.get(self.op, 2)
        per_element_out = 1 + 4 / (self.block[0] * self.block[1])
        return int(self.rows * self.cols * (per_element_in + per_element_out))


SHAPES = (
    QuantizeShape("hidden", "quantize", 4096, 7168),
    QuantizeShape("attention_output", "quantize", 4096, 16384),
    QuantizeShape("hidden_columns", "quantize", 4096, 7168, (128, 1)),
    QuantizeShape("expert_weight", "quantize", 4096, 7168, (128, 128)),
    QuantizeShape("expert_swiglu", "swiglu_quantize", 32768, 2048),
    QuantizeShape("hidden_transposed", "quantize_transposed", 4096, 7168),
    QuantizeShape("hidden_requantized", "requantize_transposed", 4096, 7168),
)
