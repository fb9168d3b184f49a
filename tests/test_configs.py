"""The shipped configs: they build, and the published models have their published sizes to the integer."""

import importlib

import jax
import ml_collections
import numpy as np
import pytest

from deepseek_jax.config import Config, ModelConfig, from_config_dict
from deepseek_jax.parallel.mesh import abstract_mesh, batch_sharding
from deepseek_jax.serving import deployment
from deepseek_jax.training.state import Hyper
from deepseek_jax.training.step import abstract_state, make_train_step
from tests.shipped import OF_RUNS, OF_UNITS

HYPER = Hyper(np.float32(1e-4), np.float32(1e-3), np.float32(0.3), np.int32(1))


def model(name) -> ModelConfig:
    return from_config_dict(importlib.import_module(f"configs.{name}").get_config()).model


def test_what_is_shipped():
    assert {"tiny", "small_1b", "v2_lite_16b", "v2_236b", "v3_671b", "matched_cpu"} <= set(OF_RUNS)


@pytest.mark.parametrize("name", OF_RUNS)
def test_config_builds_and_says_how_to_run_it(name):
    module = importlib.import_module(f"configs.{name}")
    config = module.get_config()
    assert isinstance(config, ml_collections.ConfigDict)
    cfg = from_config_dict(config)
    assert isinstance(cfg, Config) and cfg.train.out_dir == f"runs/{name}"
    assert "python -m experiments." in module.__doc__
    assert cfg.model.vocab_size >= cfg.data.vocab_size


@pytest.mark.parametrize("name", OF_UNITS)
def test_a_unit_that_serves_builds_and_says_how_to_plan_it(name):
    """The devices and physical experts of each (report section 3.4, inference overview)."""
    module = importlib.import_module(f"configs.{name}")
    unit = deployment.from_config_dict(module.get_config())
    assert f"python -m experiments.plan serve --config=configs/{name}.py" in module.__doc__
    assert (unit.devices, unit.physical_experts, unit.experts) == {
        "serve_prefill_ep32": (32, 288, 9),
        "serve_prefill_ep32_tp4": (32, 288, 9),
        "serve_decode_ep144": (144, 288, 2),
        "serve_decode_ep320": (320, 320, 1),
    }[name]
    assert unit.model.num_params() == 671_026_419_200 and unit.options.sizes(unit.model).slots == unit.rows


LARGE = {"small_1b": 1, "v2_lite_16b": 8, "v2_236b": 256, "v3_671b": 2048}


@pytest.mark.parametrize(("name", "devices"), LARGE.items())
def test_the_step_of_a_large_config_can_be_traced(name, devices):
    """The whole training step, on as many devices as its text says; no array is made and nothing compiled."""
    cfg = from_config_dict(importlib.import_module(f"configs.{name}").get_config())
    mesh = abstract_mesh(cfg.mesh, devices)
    shape = (cfg.train.batch_size, cfg.data.seq_len + 1)
    batch = {"tokens": jax.ShapeDtypeStruct(shape, np.int32, sharding=batch_sharding(mesh))}
    state = abstract_state(cfg, mesh)
    after, metrics = jax.eval_shape(make_train_step(cfg, mesh), state, batch, HYPER)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(
        lambda x: (x.shape, x.dtype), state
    )
    assert metrics.counts_le.shape == cfg.model.balance_bias_shape


def test_v3_671b():
    """Parts by hand from the dimensions in the report, section 4.2."""
    cfg, d = model("v3_671b"), 7168
    mla = d * 1536 + 1536 + 1536 * 128 * 192 + d * 576 + 512 + 512 * 128 * 256 + 128 * 128 * d
    assert mla == 187_107_328
    expert, gate, norms = 3 * d * 2048, d * 256 + 256, 2 * d
    moe_layer = mla + norms + gate + 257 * expert
    assert moe_layer == 11_507_286_272  # its bias included
    assert cfg.num_params() == 671_026_419_200
    assert cfg.num_params() == 3 * (mla + norms + 3 * d * 18432) + 58 * moe_layer + 2 * 129280 * d + d
    assert cfg.num_active_params() == 36_625_618_432
    assert cfg.num_mtp_params() == 11_610_068_224


def test_v3_flops_and_cache():
    cfg = model("v3_671b")
    assert cfg.flops_per_token(4096) == 6 * 36_624_596_992 + 6 * 61 * 2048 * 128 * 320
    assert round(cfg.flops_per_token(4096) / 1e9, 2) == 250.45
    assert round(cfg.flops_per_token(4096, causal=False) / 1e9, 2) == 281.15
    assert cfg.kv_cache_bytes_per_token() == 70_272
    assert cfg.kv_cache_bytes_per_token("float8_e4m3fn") == 40_016


def test_v2():
    assert model("v2_236b").num_params() == 235_741_434_880
    assert round(model("v2_236b").num_active_params() / 1e9, 2) == 20.85
    assert model("v2_lite_16b").num_params() == 15_706_484_224
    assert round(model("v2_lite_16b").num_active_params() / 1e9, 3) == 2.451


def test_matched_config_is_what_is_compared():
    cfg = from_config_dict(importlib.import_module("configs.matched_cpu").get_config())
    assert (cfg.train.batch_size, cfg.data.seq_len, cfg.model.dtype) == (8, 256, "float32")
    assert cfg.model.num_nextn_predict_layers == 0
