"""`TrainState` is carried from step to step; `Hyper` has the scalars that the host passes to each step.

The number of tokens consumed is not part of `TrainState`: it reaches 14.8e12, which neither int32 nor float32
holds exactly. It lives on the host as a Python int (and in the checkpoint's metadata); the host evaluates the
schedules with it and passes the results into the jitted step as a `Hyper`.

Between steps, parameters and moments lie where the rules of the mesh put them, divided further by `mesh.zero`
(`parallel/zero.py`); the rest is whole on every device.

Legend: L MoE layers (MTP modules last), E routed experts.
"""

from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding

from deepseek_jax.config import Config
from deepseek_jax.model.transformer import model_params
from deepseek_jax.parallel.mesh import replicated, rules
from deepseek_jax.parallel.zero import shares
from deepseek_jax.precision import preset
from deepseek_jax.training.optimizer import AdamWState


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


def parameter_shares(cfg: Config, mesh: Mesh | AbstractMesh) -> Any:
    """`zero.Share` of every parameter. Raises ValueError, with names and numbers, for what does not divide."""
    table, quantised = rules(cfg.mesh, mesh), preset(cfg.precision) is not None
    return shares(model_params(cfg.model), mesh, table, cfg.model.dtype, quantised, cfg.mesh.zero)


def state_shardings(cfg: Config, mesh: Mesh | AbstractMesh) -> Any:
    """A `TrainState` of shardings: the moments lie where their parameters are, the rest is everywhere."""
    params = jax.tree.map(lambda share: NamedSharding(mesh, share.held), parameter_shares(cfg, mesh))
    whole: Any = replicated(mesh)
    return TrainState(whole, params, AdamWState(whole, params, params), whole, whole, whole)
