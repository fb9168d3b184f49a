"""Shapes of the family's attention, and the configuration of its kernels."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    """Tiling of the attention kernels, whose tiles are 128 rows high.

    Attributes:
      block_k: keys per step of the forward kernel; the backward kernels take 64.
      stages: steps in flight.
      num_sms: thread blocks in flight, one per SM.
    """

    block_k: int = 128
    stages: int = 2
    num_sms: int = 132

    def __post_init__(self):
        if self.block_k not in (64, 128):
            raise ValueError(f"block_k={self.block_k}: must be 64 or 128")
        if self.stages < 2:
            raise ValueError(f"stages={self.stages}: a pipeline needs at least 2")


DEFAULT = AttentionConfig()


@dataclasses.dataclass(frozen=True)
class AttentionShape:
    """Causal attention of one batch.

    Attributes:
      pass_: "forward", or "backward": gradients of queries, keys and values.
      documents: packed into each sequence, all of one length.
      queries: the last ones of a sequence, behind a prefix in the cache; None for all.
      qk, v: widths of a head.
    """

    name: str
    pass_: str
    batch: int
    heads: int
    tokens: int
    documents: int = 1
    queries: int | None = None
    qk: int = 192
    v: int = 128

    @property
    def rows(self) -> int:
        return self.tokens if self.queries is None else self.queries

    @property
    def pairs(self) -> int:
        """Pairs of a query and a key that it sees, of one head."""
        length, prefix = self.tokens // self.documents, self.tokens - self.rows
        return self.batch * (self.documents * length * (length + 1) - prefix * (prefix + 1)) // 2

    @property
    def flops(self) -> int:
        """Of the products there are: scores and output, or (backward) scores, dp, dq, dk, dv."""
        widths = self.qk + self.v if self.pass_ == "forward" else 3 * self.qk + 2 * self.v
        return 2 * self.heads * self.pairs * widths

    @property
    def bytes(self) -> int:
        """q, k, v, out and log-sum-exp; backward also dout, dq, dk, dv."""
        wide, narrow = self.rows + self.tokens, self.tokens + self.rows
        per_head = 2 * (wide * self.qk + narrow * self.v) + 4 * self.rows
        if self.pass_ == "backward":
            per_head += 2 * (wide * self.qk + narrow * self.v)
        return self.batch * self.heads * per_head


SHAPES = (
    AttentionShape("v3_4k", "forward", 1, 128, 4096),
    AttentionShape("v3_4k_packed", "forward", 1, 128, 4096, documents=8),
    AttentionShape("v3_32k", "forward", 1, 16, 32768),
    AttentionShape("v3_chunk", "forward", 1, 128, 8192, queries=1024),
    AttentionShape("lite_4k", "forward", 4, 16, 4096),
    AttentionShape("v3_4k_backward", "backward", 1, 128, 4096),
    AttentionShape("v3_4k_packed_backward", "backward", 1, 128, 4096, documents=8),
    AttentionShape("lite_4k_backward", "backward", 4, 16, 4096),
)
