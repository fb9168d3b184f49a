"""Average of the parameters in host memory, updated beside the training step (report section 3.2.3).

The report keeps an exponential moving average of the parameters in CPU memory and updates it asynchronously
after each step; it gives no decay. Two choices here:
- the initial parameters have no weight: e_n = sum_i d^(n-i) p_i / sum_i d^(n-i) over the n snapshots so far,
  which makes the average useful from the first update on, in short runs too;
- it is float32, computed by one thread in a fixed order, so that it is bitwise the same in a resumed run.
A snapshot of a bad step, or with NaN or infinity, is left out: being an average of finite numbers, it stays finite.

Parameters that are sharded over several processes are averaged where they are: each process keeps the shards that
it holds, each once.
"""

import concurrent.futures
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.training.finite import all_finite

PyTree = Any


@jax.jit
def _snapshot(params: PyTree, good: jax.Array | bool) -> tuple[PyTree, jax.Array]:
    # Arrays of their own, whatever becomes of the inputs: nothing is donated here.
    return jax.tree.map(jnp.copy, params), all_finite(params) & good


class EMA:
    """Exponential moving average of a tree of arrays.

    Args:
        params: the tree to average: its shapes and shardings, and the value before the first update. Arrays of
            any float dtype. To go on with an average: `state()["params"]`, in shardings as `abstract_average` says.
        decay: per update, in [0, 1).
        updates: how many are in `params`; `state()["updates"]`.

    Raises:
        ValueError: `decay` out of range.
    """

    def __init__(self, params: PyTree, decay: float, updates: int = 0):
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"EMA decay={decay} must lie in [0, 1)")
        self._decay = decay
        self._updates = int(updates)
        self._abstract = jax.tree.map(_abstract, params)
        self._average = [
            {place: np.array(block, np.float32) for place, block in _blocks(x).items()}
            for x in jax.tree.leaves(params)
        ]
        self._worker = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="ema")
        self._pending: concurrent.futures.Future | None = None

    def update(self, params: PyTree, good: jax.Array | bool = True) -> None:
        """Averages `params` in, in the background, if they are finite and `good` (bool []: the step was applied).

        Queues a copy on the device and returns: the caller may donate `params` to the next step at once, which
        then runs after the copy. Waits only for the update before, so at most one snapshot is alive.

        Raises:
            ValueError: another tree than the constructor's. What the update before raised is raised here.
        """
        shapes, expected = (jax.tree.map(lambda x: x.shape, tree) for tree in (params, self._abstract))
        if shapes != expected:
            raise ValueError(f"EMA.update got arrays of shapes {shapes}, the average has {expected}")
        snapshot, counts = _snapshot(params, good)
        self.wait()
        self._pending = self._worker.submit(self._average_in, snapshot, counts)

    def wait(self) -> None:
        """Returns when no update is pending."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def value(self) -> PyTree:
        """The average, float32, after waiting: NumPy arrays of their own where this process holds a parameter
        whole, else global arrays with the parameter's sharding.
        """
        self.wait()
        leaves, structure = jax.tree.flatten(self._abstract)
        return jax.tree.unflatten(structure, map(_join, leaves, self._average))

    def on_devices(self, params: PyTree) -> PyTree:
        """The average as global arrays with the shardings of `params`. All processes must call it."""
        return jax.tree.map(
            lambda x, like: (
                x
                if isinstance(x, jax.Array)
                else jax.make_array_from_callback(x.shape, like.sharding, lambda index: x[index])
            ),
            self.value(),
            params,
        )

    def state(self) -> PyTree:
        """What a checkpoint keeps: {"params": the average, "updates": int32 []}. Copies, after waiting."""
        return {"params": self.value(), "updates": np.asarray(self._updates, np.int32)}

    def close(self) -> None:
        """Waits and stops the thread."""
        self.wait()
        self._worker.shutdown()

    def _average_in(self, snapshot: PyTree, counts: jax.Array) -> None:
        if not np.asarray(counts):
            return
        self._updates += 1
        # Weight of the newest snapshot in the normalised sum: 1 at the first update, 1 - decay in the long run.
        weight = np.float32((1.0 - self._decay) / (1.0 - self._decay**self._updates))
        for blocks, x in zip(self._average, jax.tree.leaves(snapshot), strict=True):
            new = _blocks(x)
            for place, average in blocks.items():
                difference = np.asarray(new[place]).astype(np.float32) - average
                difference *= weight
                average += difference


def abstract_average(params: PyTree) -> PyTree:
    """What `EMA(params, ...).state()` returns, of arrays or `jax.ShapeDtypeStruct`, as the latter: with a sharding
    where it gives global arrays.
    """
    return {"params": jax.tree.map(_abstract, params), "updates": jax.ShapeDtypeStruct((), np.int32)}


# --- what this process holds of an array --------------------------------------------------------------------

Place = tuple[tuple[int | None, int | None], ...]  # (start, stop) per dim; () is the whole array


def _is_whole(x: Any) -> bool:
    sharding = getattr(x, "sharding", None)
    return sharding is None or sharding.is_fully_addressable or sharding.is_fully_replicated


def _place(index: Any) -> Place:
    return tuple((s.start, s.stop) for s in index)


def _blocks(x: Any) -> dict[Place, Any]:
    """The parts of `x` that this process holds, each once; {(): x} where it holds it whole."""
    return {(): x} if _is_whole(x) else {_place(shard.index): shard.data for shard in x.addressable_shards}


def _abstract(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, np.float32, sharding=None if _is_whole(x) else x.sharding)


def _join(like: jax.ShapeDtypeStruct, blocks: dict[Place, np.ndarray]) -> Any:
    if like.sharding is None:
        return np.copy(blocks[()])
    return jax.make_array_from_callback(like.shape, like.sharding, lambda index: blocks[_place(index)])
