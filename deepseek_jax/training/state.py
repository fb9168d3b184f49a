"""What a training run carries from step to step, and the scalars that the host hands to each step.

The number of tokens consumed is not part of `TrainState`: it reaches 14.8e12, which neither int32 nor float32
holds exactly. It lives on the host as a Python int (and in the checkpoint's metadata); the host evaluates the
schedules with it and passes the results into the jitted step as a `Hyper`.

Legend: L MoE layers (MTP modules last), E routed experts.
"""

from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np


class Hyper(NamedTuple):
    """Scheduled scalars of one step, float32 [] but the last. Arguments of the jitted step, so no value is compiled in."""

    lr: jax.Array
    gamma: jax.Array  # speed of the balance-bias update (report section 2.1.2)
    mtp_lambda: jax.Array  # weight of the MTP loss (equation 25)
    # int32 []: of the grad_accumulation micro-batches that a batch has room for, the first so many are there; None: all
    micro_batches: jax.Array | np.int32 | None = None


class TrainState(flax.struct.PyTreeNode):
    """All arrays of a run; donated to the jitted step and written whole to the checkpoint."""

    step: jax.Array  # int32 []: steps taken, skipped ones included
    params: Any  # float32 master parameters, nested dict
    opt_state: Any  # what the optimizer's `init` returned
    balance_bias: jax.Array  # float32 [L, E]
    bad_steps: jax.Array  # int32 []: skipped steps in a row, up to now
    skipped: jax.Array  # int32 []: skipped steps in total

    @classmethod
    def create(cls, params: Any, opt_state: Any, balance_bias: jax.Array) -> "TrainState":
        """State before the first step."""
        # One array each: a donated state must not hold the same buffer twice.
        step, bad_steps, skipped = (jnp.zeros((), jnp.int32) for _ in range(3))
        return cls(step, params, opt_state, balance_bias, bad_steps, skipped)
