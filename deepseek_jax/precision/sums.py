"""In which precision things are added up, said once for the whole library.

- **Sums over tokens, experts, heads and vocabulary are float32**, whatever the model computes in, and are rounded once,
  to the dtype of their result: RMSNorm, softmax and log-sum-exp, the gradients of embedding, norms, shared rotary key
  and weights, a token's sum over its experts (on one device and at each hop of an exchange), losses and gradient norm.
  Gradients are added over micro-batches and devices in float32.
- **Matrix products** accumulate in float32. Weight gradients come out in float32 and are rounded to the dtype of the
  parameter that was read: float32 masters, or the BF16 copies that ZeRO gathers, once per micro-batch. In FP8 they are added
  to the float32 sum over micro-batches by the product. FP8 products are
  promoted every 128 of the contraction (`pallas_kernels`).
- **Two terms** are added in the dtype of the activation: residuals (a MoE block adds its shared and its routed experts to
  the stream one after the other), and cotangents of an activation with several users.
- **Counts** are int32 per expert, and no product of two of them is formed: 63M tokens of a step, times 8 selected
  experts, times 256 experts would not fit. Token counts of a run are Python integers on the host.
- **The tensor axis** sums the partial outputs of heads in the compute dtype, as the combine of experts travels in BF16.

`tests/model/test_sums.py` reads all of this off the traced training step.
"""

from typing import Any

import jax.numpy as jnp
from jax import lax


def precision(dtype: Any) -> lax.Precision | None:
    """The precision that a product of operands in `dtype` needs: HIGHEST for float32, which GPUs else round to TF32's 10
    bits (TPUs to BF16); None for narrower dtypes, whose products are exact in float32."""
    return lax.Precision.HIGHEST if jnp.dtype(dtype) == jnp.float32 else None
