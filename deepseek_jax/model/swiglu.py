"""SwiGLU, the gated activation of every FFN: silu(gate) * up, and its gradients where they are written by hand.

Elementwise, in the dtype that the arguments promote to.
"""

import jax


@jax.custom_vjp
def swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    """silu(gate) * up. Saves its arguments alone for the backward pass."""
    return jax.nn.silu(gate) * up


def swiglu_gradients(
    gate: jax.Array, up: jax.Array, dact: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """silu(gate) * up once more, and the gradients of gate and up, given that of silu(gate) * up."""
    sig = jax.nn.sigmoid(gate)
    silu = gate * sig
    return silu * up, dact * up * (sig + silu * (1 - sig)), dact * silu


swiglu.defvjp(
    lambda gate, up: (swiglu(gate, up), (gate, up)), lambda saved, g: swiglu_gradients(*saved, g)[1:]
)
