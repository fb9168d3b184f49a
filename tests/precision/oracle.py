"""The GEMMs of a precision policy in NumPy float64, on values quantised by the float8 oracle of the kernels."""

import numpy as np

from tests.kernels import float8_oracle


def rounded(x, fmt) -> np.ndarray:
    """What a matrix [rows, depth] is once quantised in `fmt`, float64."""
    x = np.asarray(x, np.float32)
    block = (fmt.rows or x.shape[0], fmt.depth or x.shape[1])
    q, scale = float8_oracle.quantize(x, block, fmt.scale)
    return float8_oracle.dequantize(q, scale, block)


def product(a, b, formats) -> tuple[np.ndarray, np.ndarray]:
    """a @ b.T of the quantised operands, and the sum of absolute products."""
    a, b = rounded(a, formats[0]), rounded(b, formats[1])
    return a @ b.T, np.abs(a) @ np.abs(b).T


def linear(policy, x, w, dy):
    """(y, dx, dw) of y = x w, each with its sum of absolute products."""
    kept = rounded(x, policy.fprop[0])
    return (
        product(x, w.T, policy.fprop),
        product(dy, w, policy.dgrad),
        product(kept.T, dy.T, policy.wgrad),
    )


def silu(x):
    return x / (1 + np.exp(-x))


def swiglu_backward(gate, up, dact):
    sig = 1 / (1 + np.exp(-gate))
    return dact * up * sig * (1 + gate * (1 - sig)), dact * gate * sig


def mlp(policy, x, gate_w, up_w, down_w, dy):
    """(y, dx, dw_gate, dw_up, dw_down) of the SwiGLU FFN; intermediate results in float32 like the arrays."""
    f32 = np.float32
    fprop, dgrad, wgrad = policy.fprop, policy.dgrad, policy.wgrad
    gate, up = (f32(product(x, w.T, fprop)[0]) for w in (gate_w, up_w))
    y = product(silu(gate) * up, down_w.T, fprop)[0]
    kept = rounded(x, fprop[0])
    gate, up = (f32(rounded(part, fprop[0])) for part in (gate, up))
    d_gate, d_up = (f32(d) for d in swiglu_backward(gate, up, f32(product(dy, down_w, dgrad)[0])))
    dx = product(d_gate, gate_w, dgrad)[0] + product(d_up, up_w, dgrad)[0]
    pairs = ((kept, d_gate), (kept, d_up), (silu(gate) * up, dy))
    return (y, dx, *(product(a.T, b.T, wgrad)[0] for a, b in pairs))
