"""Average of the parameters in host memory, updated beside the training step (report section 3.2.3).

The report keeps an exponential moving average of the parameters in CPU memory and updates it asynchronously
after each step; it gives no decay. Two choices here:
- the initial parameters have no weight: e_n = sum_i d^(n-i) p_i / sum_i d^(n-i) over the n snapshots so far,
  which makes the average useful from the first update on, in short runs too;
- it is float32, computed by one thread in a fixed order, so that it is bitwise the same in a resumed run.
"""

import concurrent.futures
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

PyTree = Any


@jax.jit
def _copy(params: PyTree) -> PyTree:
    # Arrays of their own, whatever becomes of the inputs: nothing is donated here.
    return jax.tree.map(jnp.copy, params)


class EMA:
    """Exponential moving average of a tree of arrays.

    Args:
        params: the tree to average: its shapes, and the value before the first update. Arrays of any float
            dtype, fully addressable from this process.
        decay: per update, in [0, 1).

    Raises:
        ValueError: `decay` out of range; arrays spread over several processes.
    """

    def __init__(self, params: PyTree, decay: float):
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"EMA decay={decay} must lie in [0, 1)")
        self._decay = decay
        self._updates = 0
        self._average = jax.tree.map(_on_host, params)
        self._worker = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="ema")
        self._pending: concurrent.futures.Future | None = None

    def update(self, params: PyTree) -> None:
        """Averages `params` in, in the background.

        Queues a copy on the device and returns: the caller may donate `params` to the next step at once, which
        then runs after the copy. Waits only for the update before, so at most one snapshot is alive.

        Raises:
            ValueError: another tree than the constructor's. What the update before raised is raised here.
        """
        shapes = jax.tree.map(lambda x: x.shape, params)
        if shapes != (expected := jax.tree.map(lambda x: x.shape, self._average)):
            raise ValueError(f"EMA.update got arrays of shapes {shapes}, the average has {expected}")
        snapshot = _copy(params)
        self.wait()
        self._pending = self._worker.submit(self._average_in, snapshot)

    def wait(self) -> None:
        """Returns when no update is pending."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def value(self) -> PyTree:
        """The average, float32 NumPy arrays of their own, after waiting."""
        self.wait()
        return jax.tree.map(np.copy, self._average)

    def state(self) -> PyTree:
        """What a checkpoint keeps: {"params": the average, "updates": int32 []}. Copies, after waiting."""
        return {"params": self.value(), "updates": np.asarray(self._updates, np.int32)}

    def restore(self, state: PyTree) -> None:
        """Continues from a `state()`.

        Raises:
            ValueError: it belongs to another tree.
        """
        self.wait()
        params = state["params"]
        shapes, expected = (jax.tree.map(lambda x: x.shape, tree) for tree in (params, self._average))
        if shapes != expected:
            raise ValueError(f"EMA state has arrays of shapes {shapes}, expected {expected}")
        self._average = jax.tree.map(_on_host, params)
        self._updates = int(state["updates"])

    def close(self) -> None:
        """Waits and stops the thread."""
        self.wait()
        self._worker.shutdown()

    def _average_in(self, snapshot: PyTree) -> None:
        self._updates += 1
        # Weight of the newest snapshot in the normalised sum: 1 at the first update, 1 - decay in the long run.
        weight = np.float32((1.0 - self._decay) / (1.0 - self._decay**self._updates))

        def leaf(average: np.ndarray, new: jax.Array) -> None:
            difference = np.asarray(new).astype(np.float32) - average
            difference *= weight
            average += difference

        jax.tree.map(leaf, self._average, snapshot)


def _on_host(x: Any) -> np.ndarray:
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        raise ValueError(f"EMA needs arrays that this process holds whole, got sharding {x.sharding}")
    return np.array(x, np.float32)
