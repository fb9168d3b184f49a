"""DeepSeek-V3's fine-tuning step over 512 GPUs lowers without any of them: a pipeline of 8 ranks, windows of 32K tokens whose
samples do not see each other, each divided over the eight devices of a node."""

import jax
import pytest

from configs.v3_sft import get_config
from deepseek_jax.config import from_config_dict
from deepseek_jax.parallel.mesh import abstract_mesh
from deepseek_jax.posttraining.sft import SFTConfig
from deepseek_jax.training.preflight import abstract_batch
from deepseek_jax.training.step import abstract_state, make_train_step
from tests.tiny_run import HYPER

pytestmark = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="jax 0.10 searches half a minute for the layouts of kernels"
)


def test_the_step_of_v3_sft():
    """All of it: 61 layers with YaRN, MTP module, embedding and head, FP8, 16 micro-batches."""
    cfg = from_config_dict(get_config(), SFTConfig)
    mesh = abstract_mesh(cfg.mesh, 512)
    batch = abstract_batch(cfg, mesh)
    assert set(batch) == {"tokens", "segments", "positions", "loss_mask", "padding"}
    step = make_train_step(cfg, mesh).trace(abstract_state(cfg, mesh), batch, HYPER)
    text = step.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("mosaic_gpu") > 100
    for name in ("ragged_all_to_all", "collective_permute", "all_to_all", "reduce_scatter", "stablehlo.case"):
        assert name in text, name
