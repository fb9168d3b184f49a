"""Rows of slots go where a plan has them, bit for bit, whatever their dtype.

Dims: p slot of all devices.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from deepseek_jax.config import MeshConfig
from deepseek_jax.parallel.exchange.moves import moved
from deepseek_jax.parallel.mesh import EXPERT_AXES, make_mesh

DEVICES = 8
SPREAD = PartitionSpec(EXPERT_AXES)


def arrays(slots):
    """Any bits, NaN and -0 among them, of three widths."""
    rng = np.random.default_rng(slots)
    whole = {
        "values": (np.uint8, jnp.float8_e4m3fn, (3, 2)),
        "scales": (np.uint32, jnp.float32, (2,)),
        "w": (np.uint16, jnp.bfloat16, (5,)),
    }
    return {
        name: rng.integers(0, 2 ** (8 * np.dtype(words).itemsize), (slots, *shape), words).view(dtype)
        for name, (words, dtype, shape) in whole.items()
    }


def bits(x):
    return np.asarray(x).view(np.uint8)


def test_rows_arrive_bit_for_bit():
    """From one slot to many, from two of eight to three of eight; and where nothing moves, all stays."""
    mesh = make_mesh(MeshConfig(data=1, node=2, local=2, tensor=2))
    rng, old = np.random.default_rng(0), arrays(2 * DEVICES)
    for new in (2, 3):
        run = jax.jit(
            jax.shard_map(
                lambda x, source_p, new=new: moved(x, source_p, new),
                mesh=mesh,
                in_specs=(SPREAD, PartitionSpec()),
                out_specs=SPREAD,
                check_vma=False,
            )
        )
        n = new * DEVICES
        plans = [rng.integers(0, 2 * DEVICES, n), np.full(n, 5), np.arange(n) % (2 * DEVICES)]
        for source_p in plans:
            got = run(old, source_p.astype(np.int32))
            for name, x in old.items():
                np.testing.assert_array_equal(bits(got[name]), bits(x[source_p]), err_msg=name)
