"""DeepSeek-V3's step on sequences of 128K, each over eight of 2,048 GPUs, lowers without any, and has no array of tokens by
tokens. That on sequences of 32K is the same program with other numbers (`python -m experiments.extend --dry_run`)."""

import jax
import jax.numpy as jnp
import pytest

from configs.v3_extend import get_config
from deepseek_jax.config import from_config_dict
from deepseek_jax.parallel.mesh import abstract_mesh
from deepseek_jax.posttraining.extend import ExtendConfig, stages
from deepseek_jax.training.step import abstract_state, make_train_step
from tests.programs import equations
from tests.tiny_run import HYPER

pytestmark = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="jax 0.10 searches half a minute for the layouts of kernels"
)


def test_the_last_phase_of_deepseek_v3():
    cfg = stages(from_config_dict(get_config(), ExtendConfig))[-1].cfg
    mesh, tokens = abstract_mesh(cfg.mesh, 2048), cfg.data.seq_len
    batch = {"tokens": jax.ShapeDtypeStruct((cfg.train.batch_size, tokens + 1), jnp.int32)}
    step = make_train_step(cfg, mesh).trace(abstract_state(cfg, mesh), batch, HYPER)
    shapes = {
        v.aval.shape for e in equations(step.jaxpr.jaxpr) for v in e.outvars if hasattr(v.aval, "shape")
    }
    assert [shape for shape in shapes if sum(n >= tokens / 2 for n in shape) > 1] == []
    text = step.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("mosaic_gpu") > 50
    for op in ("ragged_all_to_all", "collective_permute", "all_gather", "reduce_scatter"):
        assert op in text, op
