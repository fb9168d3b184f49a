"""Shapes of decoding: FlashMLA's, one GPU of a data parallel deployment with all 128 heads, and V3's with heads divided."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class DecodeShape:
    """`batch` sequences of `length` tokens, the `queries` new ones included; pages of 64; latent 512 + rope 64.

    kind: "bf16", or "fp8" of the cache. peer_tflops: FlashMLA on one H800, as published by its authors.
    """

    name: str
    batch: int
    length: int
    queries: int = 1
    heads: int = 128
    kind: str = "bf16"
    peer_tflops: float | None = None
    latent: int = 512
    rope: int = 64

    @property
    def token_bytes(self) -> int:
        return (
            self.latent + self.latent // 32 + 2 * self.rope
            if self.kind == "fp8"
            else 2 * (self.latent + self.rope)
        )

    @property
    def flops(self) -> int:
        """Counts as FlashMLA does: every query over every key."""
        rows = self.batch * self.queries * self.heads
        return 2 * rows * self.length * (2 * self.latent + self.rope)

    @property
    def bytes(self) -> int:
        rows = self.batch * self.queries * self.heads
        return self.batch * self.length * self.token_bytes + 2 * rows * (2 * self.latent + self.rope)


SHAPES = (
    DecodeShape("b128_s4096", 128, 4096),
    DecodeShape("b128_s4096_q2", 128, 4096, queries=2, peer_tflops=660),
    DecodeShape("b128_s16384_q2", 128, 16384, queries=2, peer_tflops=660),
    DecodeShape("b128_s8192_h16", 128, 8192, heads=16),
    DecodeShape("b1_s32768", 1, 32768),
    DecodeShape("b128_s4096_fp8", 128, 4096, kind="fp8"),
    DecodeShape("b128_s4096_q2_fp8", 128, 4096, queries=2, kind="fp8"),
    DecodeShape("b128_s8192_h16_fp8", 128, 8192, heads=16, kind="fp8"),
)
