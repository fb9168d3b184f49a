"""`on_devices` reads the parameters of a source, piece by piece, into JAX arrays on the devices that hold them.

On CPU a device's memory is the host's: each device's slice is filled where it stays. Elsewhere a slice is put together
on the device, so that the host holds one layer of it at a time. A slice that several devices hold is read once.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from deepseek_jax.balancing.plan import Plan
from deepseek_jax.hf.names import unflatten
from deepseek_jax.hf.slotted import in_slots
from deepseek_jax.hf.source import Source, stacks

# Fills an array with the given slices of a leaf.
Fill = Callable[[tuple[slice, ...], np.ndarray], None]


def on_devices(
    source: Source,
    shardings: Any = None,
    dtype: np.dtype | None = None,
    keep_fp8: bool = False,
    plan: Plan | None = None,
) -> dict[str, Any]:
    """The parameter tree of `source`; for `dtype` and `keep_fp8` see `stacks`, for `plan` `slotted.in_slots`.

    shardings: tree like the parameters of `jax.sharding.Sharding`, of which an FP8 leaf's values and scales have that of the
      leaf; None: the default device.
    """
    flat: dict[str, jax.Array] = {}
    found = stacks(source, dtype, keep_fp8)
    for stack in found if plan is None else in_slots(found, plan):
        sharding = None if shardings is None else _sharding(shardings, stack.name)
        flat[stack.name] = filled(stack.shape, stack.dtype, sharding, stack.fill, bool(stack.stack))
        source.forget()
    return unflatten(flat)


def _sharding(tree: Any, path: str) -> Any:
    for key in path.split("."):
        tree = tree if isinstance(tree, jax.sharding.Sharding) else tree[key]
    return tree


def filled(shape: tuple[int, ...], dtype: np.dtype, sharding: Any, fill: Fill, stacked: bool) -> jax.Array:
    """Returns the array of `shape` on `sharding` (None: the default device). `stacked`: its first dim counts layers."""
    if sharding is None:
        sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    holders: dict[Spans, list[jax.Device]] = {}
    for device, where in sharding.addressable_devices_indices_map(shape).items():
        spans = tuple(s.indices(n)[:2] for s, n in zip(where, shape, strict=True))
        holders.setdefault(spans, []).append(device)
    parts: list[jax.Array] = []
    for spans, devices in holders.items():
        whole = not stacked or all(map(in_host_memory, devices))
        parts += (_at_once if whole else _layer_by_layer)(spans, dtype, devices, fill)
    return jax.make_array_from_single_device_arrays(shape, sharding, parts)


Spans = tuple[tuple[int, int], ...]  # (first index, index after the last) of each dim


def in_host_memory(device: jax.Device) -> bool:
    return device.platform == "cpu"


def _at_once(spans: Spans, dtype: np.dtype, devices: Sequence[jax.Device], fill: Fill) -> list[jax.Array]:
    part = _aligned(_lengths(spans), dtype)
    fill(_slices(spans), part)
    return jax.block_until_ready([jax.device_put(part, device) for device in devices])


def _layer_by_layer(
    spans: Spans, dtype: np.dtype, devices: Sequence[jax.Device], fill: Fill
) -> list[jax.Array]:
    (first, end), *rest = spans
    layer = _aligned((1, *_lengths(rest)), dtype)
    parts = [jnp.zeros(_lengths(spans), dtype, device=device) for device in devices]
    for i in range(end - first):
        fill((slice(first + i, first + i + 1), *_slices(rest)), layer)
        parts = [_put(part, jax.device_put(layer, d), i) for part, d in zip(parts, devices, strict=True)]
        jax.block_until_ready(parts)  # before the host's layer is written again
    return parts


@functools.partial(jax.jit, donate_argnums=0)
def _put(part: jax.Array, layer: jax.Array, i: int) -> jax.Array:
    return lax.dynamic_update_slice_in_dim(part, layer, i, 0)


def _lengths(spans: Sequence[tuple[int, int]]) -> tuple[int, ...]:
    return tuple(end - first for first, end in spans)


def _slices(spans: Sequence[tuple[int, int]]) -> tuple[slice, ...]:
    return tuple(slice(*span) for span in spans)


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An array that begins on a 64-byte boundary: JAX on CPU takes it over without a copy."""
    nbytes = math.prod(shape) * dtype.itemsize
    raw = np.empty(nbytes + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + nbytes].view(dtype).reshape(shape)
