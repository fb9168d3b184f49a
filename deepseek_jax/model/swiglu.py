"""SwiGLU, the gated activation of every FFN: silu(gate) * up, and its gradients where they are written by hand.

Elementwise, in the dtype that the arguments promote to.
"""

import jax

# Name of what the recompute policy "deepseek" keeps of an FFN: its SwiGLU's arguments, not the result.
SWIGLU_INPUTS = "swiglu_inputs"


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


def _swiglu_bwd(saved: tuple[jax.Array, jax.Array], dact: jax.Array) -> tuple[jax.Array, jax.Array]:
    gate, up = saved
    return swiglu_gradients(gate, up, dact)[1:]


swiglu.defvjp(lambda gate, up: (swiglu(gate, up), (gate, up)), _swiglu_bwd)
