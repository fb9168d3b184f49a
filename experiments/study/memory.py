"""Counts bytes per device of parameters, moments and gradients by the specs that training uses; needs no device.

Activations and temporary copies (a gradient while it is cast and scattered) are not counted; `exchange_memory.py` counts
the exchange's buffers.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from deepseek_jax.config import Config
from deepseek_jax.model.params import tree_map
from deepseek_jax.model.transformer import model_params
from deepseek_jax.model.weights import join, only_differentiated, quantise_weights
from deepseek_jax.parallel.pipeline.pipeline import pipeline_over
from deepseek_jax.precision import preset
from deepseek_jax.training.state import parameter_shares


class Memory(NamedTuple):
    """Bytes on one device. Master and moments stay; the others exist during a step."""

    master: int = 0  # float32
    moments: int = 0  # both
    compute: int = (
        0  # what the forward pass reads beside the master: gathered, selected and cast, joined, or quantised
    )
    gradients: int = (
        0  # of one micro-batch, as the backward pass makes them; with a pipeline, of its end and one layer
    )
    accumulated: int = 0  # float32, whole; only with grad_accumulation or a pipeline
    scattered: int = 0  # float32, as summed to their owners; only with mesh.zero or a pipeline

    @property
    def between_steps(self) -> int:
        return self.master + self.moments

    @property
    def in_step(self) -> int:
        """Adds up all parts: an upper bound."""
        return sum(self)


def state_memory(cfg: Config, mesh: Mesh | AbstractMesh) -> dict[str, Memory]:
    """Returns the `Memory` of "dense" parameters (whatever is no routed expert) and of "experts".

    On a mesh with a pipeline, a device reads the layers in the slots of its stages (`pipeline/stages.py`), empty slots
    included, and whole what is no layer of them; a layer's gradients are added to the sums as they come. Raises ValueError
    for what does not divide over the mesh.
    """
    declared, policy = model_params(cfg.model), preset(cfg.precision)

    def shape(spec: PartitionSpec, whole: tuple[int, ...]) -> tuple[int, ...]:
        return NamedSharding(mesh, spec).shard_shape(whole)

    shares = parameter_shares(cfg, mesh)
    held = _layers_held(cfg, mesh)
    read = tree_map(lambda p, s: jax.ShapeDtypeStruct(shape(s.compute, p.shape), s.dtype), declared, shares)
    read |= {kind: jax.tree.map(functools.partial(_in_slots, n), read[kind]) for kind, n in held.items()}
    operands = jax.eval_shape(lambda w: quantise_weights(w, declared, policy), read)
    dtype = jnp.dtype(cfg.model.dtype)
    made = only_differentiated(
        *jax.eval_shape(lambda w, x: join(w, x, declared, policy, dtype), read, operands)
    )
    moment = 2 * jnp.dtype(cfg.optimizer.moment_dtype).itemsize

    total = {"dense": Memory(), "experts": Memory()}

    def add(in_slots: bool, p: Any, share: Any, copy: Any, quantised: Any, made: bool) -> None:
        own, whole, item = math.prod(shape(share.held, p.shape)), math.prod(copy.shape), copy.dtype.itemsize
        comes = bool(share.divided) or in_slots  # else it is read as it lies
        gathered = whole * item if comes else whole * dtype.itemsize if made else 0
        memory = Memory(
            master=4 * own,
            moments=moment * own,
            compute=gathered if quantised is None else sum(map(_bytes, jax.tree.leaves(quantised))),
            gradients=0 if in_slots else whole * item,
            accumulated=4 * whole if held or cfg.train.grad_accumulation > 1 else 0,
            scattered=4 * own if comes else 0,
        )

        kind = _kind(p)
        total[kind] = Memory(*map(sum, zip(total[kind], memory, strict=True)))

    for name, group in declared.items():
        tree_map(
            functools.partial(add, name in held), group, shares[name], read[name], operands[name], made[name]
        )
    layers = [_of_a_layer(declared[kind], read[kind]) for kind in held]
    for kind, size in max(layers, key=lambda sizes: sum(sizes.values()), default={}).items():
        total[kind] = total[kind]._replace(gradients=total[kind].gradients + size)
    return total


def _layers_held(cfg: Config, mesh: Mesh | AbstractMesh) -> dict[str, int]:
    """Slots that each device has for layers of a kind; none on a mesh without a pipeline."""
    pipeline = pipeline_over(cfg, mesh.shape)
    slots = {} if pipeline is None else pipeline.held.slots
    return {kind: sum(n) for kind, n in slots.items() if sum(n)}


def _of_a_layer(declared: Any, read: Any) -> dict[str, int]:
    """Bytes of one layer of a stack, by kind of parameter."""
    sizes = {"dense": 0, "experts": 0}

    def add(p: Any, stacked: jax.ShapeDtypeStruct) -> None:
        sizes[_kind(p)] += _bytes(stacked) // stacked.shape[0]

    tree_map(add, declared, read)
    return sizes


def _kind(p: Any) -> str:
    return "experts" if "expert" in p.axes else "dense"


def _in_slots(slots: int, x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((slots, *x.shape[1:]), x.dtype)


def _bytes(x: jax.ShapeDtypeStruct) -> int:
    return math.prod(x.shape) * x.dtype.itemsize
