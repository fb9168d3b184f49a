"""Shapes of the family's attention, and the configuration of its kernels."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    """Tiling of an attention kernel, whose tiles are 128 rows high.

    Attributes:
      block_k: keys per step.
      stages: steps in flight.
      num_sms: thread blocks in flight, one per SM.
    """

    block_k: int = 128
    stages: int = 2
    num_sms: int = 132
