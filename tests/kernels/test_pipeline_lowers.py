"""DeepSeek-V3's step over 2,048 GPUs, a pipeline of 16 ranks with two replicas of 8 nodes of 8, lowers without any of them."""

import jax
import jax.numpy as jnp
import pytest

from configs.v3_671b import get_config
from deepseek_jax.config import from_config_dict
from deepseek_jax.parallel.mesh import abstract_mesh
from deepseek_jax.training.step import abstract_state, make_train_step
from tests.tiny_run import HYPER

pytestmark = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="jax 0.10 searches half a minute for the layouts of kernels"
)


def test_the_step_of_deepseek_v3():
    """All of it: 61 layers, MTP module, embedding and head, FP8, 120 micro-batches."""
    cfg = from_config_dict(get_config())
    mesh = abstract_mesh(cfg.mesh, 2048)
    batch = {"tokens": jax.ShapeDtypeStruct((cfg.train.batch_size, cfg.data.seq_len + 1), jnp.int32)}
    step = make_train_step(cfg, mesh).trace(abstract_state(cfg, mesh), batch, HYPER)
    text = step.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("mosaic_gpu") > 100
    for name in ("ragged_all_to_all", "collective_permute", "all_to_all", "reduce_scatter", "stablehlo.case"):
        assert name in text, name
