"""The long form of the checks of supervised fine-tuning, on many random batches:

    python -m tests.posttraining.sft_check --batches=100
    python -m tests.float64 tests.posttraining.sft_check --batches=20 --notrl     # rounding 2^29 times as small

Packed samples against each alone; both against the training step in micro-batches, over devices, and with experts and windows
divided; labels, loss and gradients against TRL's, of conversations and of texts.
"""

import argparse
import dataclasses
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.config import MeshConfig
from deepseek_jax.parallel.mesh import batch_sharding, make_mesh, named_devices
from deepseek_jax.training.optimizer import adamw
from deepseek_jax.training.state import TrainState, state_shardings
from deepseek_jax.training.step import make_train_step
from tests.oracle.tiny import weights
from tests.posttraining.sft_cases import (
    CFG,
    alone,
    apart,
    apart_in_all,
    conversations,
    loss_and_gradient,
    packed,
)
from tests.tiny_run import HYPER

_ROWS = 8  # windows of a step
# float64 under tests.float64, so that gradients are not rounded to float32
PARAMS, BIAS = jax.tree.map(lambda x: x.astype(jnp.float32), weights(CFG.model, 1))


class Steps:
    """The training step in so many micro-batches over a mesh; the gradient is read off the first moment."""

    def __init__(self, micro_batches: int, **mesh: int):
        train = dataclasses.replace(CFG.train, batch_size=_ROWS, grad_accumulation=micro_batches)
        over = MeshConfig(**{"data": 1} | mesh)
        self._cfg = dataclasses.replace(CFG, train=train, mesh=over)
        self._mesh = make_mesh(over, jax.devices()[: named_devices(over)])
        self._step = make_train_step(self._cfg, self._mesh)

    def __call__(self, batch):
        """({metric: float}, gradient)"""
        params = jax.tree.map(jnp.asarray, PARAMS)
        state = TrainState.create(params, adamw(self._cfg.optimizer).init(params), jnp.asarray(BIAS))
        state = jax.device_put(state, state_shardings(self._cfg, self._mesh))
        state, metrics = self._step(state, jax.device_put(batch, batch_sharding(self._mesh)), HYPER)
        b1 = self._cfg.optimizer.b1
        mu = jax.tree.map(lambda x: np.asarray(x, np.float64) / (1 - b1), state.opt_state.mu)
        return {name: float(x) for name, x in metrics.objective.items()}, mu


def of_packing(batches: int) -> None:
    """Prints the largest relative distances of loss, MTP loss and gradient from those of samples alone: of the whole gradient,
    and of the parameter where it is largest."""
    ways = {
        "packed": lambda found: loss_and_gradient(PARAMS, BIAS, packed(found)),
        "the step": _fed(Steps(1)),
        "4 micro-batches": _fed(Steps(4)),
        "2 devices": _fed(Steps(1, data=2)),
        "2 x 2": _fed(Steps(2, data=2)),
        "experts over 2 x 2": _fed(Steps(2, node=2, local=2)),
        "and 2 per window": _fed(Steps(1, node=2, tensor=2)),
    }
    worst = {way: np.zeros(4) for way in ways}
    for seed in range(batches):
        found = conversations(np.random.default_rng(seed), 9)
        want, wanted = loss_and_gradient(PARAMS, BIAS, alone(found))
        for way, of in ways.items():
            got, gradient = of(found)
            here = [abs(got[name] / want[name] - 1) for name in ("loss", "mtp_loss")]
            worst[way] = np.maximum(
                worst[way], [*here, apart_in_all(gradient, wanted), apart(gradient, wanted)]
            )
    print(f"from samples alone, worst of {batches}:")
    for way, (loss, mtp, gradient, one) in worst.items():
        print(f"  {way:20} loss {loss:.1e}, MTP {mtp:.1e}, gradient {gradient:.1e} (a parameter's {one:.1e})")


def _fed(steps: Steps):
    return lambda found: steps(packed(found, _ROWS))


def of_trl(batches: int) -> None:
    """Prints the largest relative distances from TRL."""
    from tests.posttraining.trl_sft import Peer, random_rows

    for kind, conversational in (("conversations", True), ("texts", False)):
        rows = random_rows(np.random.default_rng(7), 6 * batches, conversational)
        with tempfile.TemporaryDirectory() as folder:
            peer = Peer(PARAMS, BIAS, rows, Path(folder))
            same = sum(
                all(map(np.array_equal, sample, peer.example(i))) for i, sample in enumerate(peer.samples)
            )
            found = [peer.compared(range(i, i + 6)) for i in range(0, 6 * batches, 6)]
        loss = max(abs(one.ours / one.theirs - 1) for one in found)
        gradient = max(max(one.gradients.values()) for one in found)
        print(
            f"TRL, {kind}: labels of {same} of {len(rows)} rows the same; loss {loss:.1e}, gradient {gradient:.1e}, worst of "
            f"{batches} batches"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", type=int, default=100)
    parser.add_argument("--notrl", action="store_true", help="without TRL")
    args = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", 4)
    of_packing(args.batches)
    if not args.notrl:
        of_trl(args.batches)


if __name__ == "__main__":
    main()
