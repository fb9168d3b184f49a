"""A training step on long sequences has no array of tokens by tokens, on one device and over the `tensor` axis."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.parallel.mesh import abstract_mesh, batch_sharding
from deepseek_jax.training.step import abstract_state, make_train_step
from pallas_kernels.mla_attention.ops import mla_attention
from tests.programs import equations
from tests.tiny_run import HYPER, tiny

YARN = {"factor": 40.0, "original_max_position_embeddings": 4096}


def largest_squares(jaxpr, tokens: int) -> list[tuple[int, ...]]:
    """Shapes of a program's arrays of which two dims or more have at least a quarter of `tokens`."""
    shapes = {tuple(v.aval.shape) for e in equations(jaxpr) for v in e.outvars if hasattr(v.aval, "shape")}
    return sorted(shape for shape in shapes if sum(n >= tokens / 4 for n in shape) >= 2)


@pytest.mark.parametrize(("tokens", "tensor", "depths"), [(32_768, 1, 0), (131_072, 2, 1)])
def test_memory_of_a_step_is_linear_in_the_tokens(tokens, tensor, depths):
    """Traced, which takes no memory. Rows of experts are tokens x hidden: 32 here."""
    model = {"max_position_embeddings": 163_840, "rope_scaling": YARN, "num_nextn_predict_layers": depths}
    cfg = tiny(
        model=model, data={"seq_len": tokens}, train={"batch_size": 2}, mesh={"data": 1, "tensor": tensor}
    )
    mesh = abstract_mesh(cfg.mesh, tensor)
    shape = jax.ShapeDtypeStruct((2, tokens + 1), np.int32, sharding=batch_sharding(mesh))
    step = make_train_step(cfg, mesh).trace(abstract_state(cfg, mesh), {"tokens": shape}, HYPER)
    assert largest_squares(step.jaxpr.jaxpr, tokens) == []


def test_what_it_would_find():
    """Attention as it is written down has the scores of all pairs."""
    q = jax.ShapeDtypeStruct((1, 2, 2048, 12), jnp.float32)
    dense = jax.make_jaxpr(lambda q: mla_attention(q, q, q, implementation="reference"))(q)
    assert (1, 2, 2048, 2048) in largest_squares(dense.jaxpr, 2048)
    blocks = jax.make_jaxpr(lambda q: mla_attention(q, q, q, implementation="xla"))(q)
    assert largest_squares(blocks.jaxpr, 2048) == []
