"""Starting from weights: a run, a checkpoint of it, a Hugging Face folder; parameters that stay as they are."""

import contextlib
import dataclasses
import io
import re
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest

from deepseek_jax import hf
from deepseek_jax.hf import convert
from deepseek_jax.model.transformer import model_params
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.training.frozen import frozen_leaves
from deepseek_jax.training.metrics import read_records
from deepseek_jax.training.start import Start
from deepseek_jax.training.state import state_shardings
from tests.golden.run import StopAfter, trainer
from tests.tiny_run import tiny


def config(golden_run, folder, mesh=None, model=None, **train):
    cfg = golden_run.cfg
    return dataclasses.replace(
        cfg,
        model=dataclasses.replace(cfg.model, **model or {}),
        mesh=dataclasses.replace(cfg.mesh, **mesh or {}),
        train=dataclasses.replace(cfg.train, **{"out_dir": str(folder / "new"), **train}),
    )


def raw(tree):
    return [(x.dtype, x.shape, x.tobytes()) for x in map(np.asarray, jax.tree.leaves(tree))]


@pytest.fixture(scope="module")
def folders(golden_run, tmp_path_factory):
    """The golden run as every kind of source."""
    base, run, state = (
        tmp_path_factory.mktemp("sources"),
        Path(golden_run.cfg.train.out_dir),
        golden_run.result.state,
    )
    params, bias = jax.tree.map(np.asarray, (state.params, state.balance_bias))
    for format in ("f32", "bf16"):
        hf.save(base / format, golden_run.cfg.model, params, bias, format=format)
    convert.to_orbax(base / "f32", base / "orbax", "bf16")
    (base / "f32" / "tokenizer.json").write_bytes((run / "tokenizer.json").read_bytes())
    return {
        "run": run,
        "step": run / "checkpoints" / "20",
        "f32": base / "f32",
        "bf16": base / "bf16",
        "orbax": base / "orbax",
    }


@pytest.mark.parametrize("kind", ["run", "step", "f32", "bf16", "orbax"])
def test_parameters_and_bias_come_onto_the_mesh_with_fresh_moments(golden_run, folders, tmp_path, kind):
    cfg = config(golden_run, tmp_path, {"local": 2, "zero": True}, init_from=str(folders[kind]))
    mesh, want = make_mesh(cfg.mesh, jax.devices()[:4]), golden_run.result.state
    state = Start(cfg, mesh).read()
    rounded = kind in ("bf16", "orbax")
    params = jax.tree.map(
        lambda x: np.asarray(x).astype(ml_dtypes.bfloat16).astype(np.float32) if rounded else x, want.params
    )
    # hf.save writes norms and the gate in bf16 as well
    assert raw(state.params) == raw(params)
    assert raw(state.balance_bias) == raw(want.balance_bias)
    assert int(state.step) == int(state.opt_state.num_updates) == 0
    assert not any(np.asarray(x).any() for x in jax.tree.leaves((state.opt_state.mu, state.opt_state.nu)))
    shardings = jax.tree.leaves(state_shardings(cfg, mesh))
    assert [x.sharding for x in jax.tree.leaves(state)] == shardings


def test_a_run_starts_from_an_older_checkpoint_and_what_is_frozen_stays(golden_run, folders, tmp_path):
    frozen = "embed|moe_layers.*gate.w_gate|mtp"
    source = str(folders["run"] / "checkpoints" / "10")
    cfg = config(golden_run, tmp_path, init_from=source, frozen=frozen)
    with contextlib.closing(trainer(cfg)) as run:
        assert not run.resume()
        before = jax.tree.map(np.asarray, run.state.params)
        assert int(run.ema.state()["updates"]) == 0 and run.differences == []
        first = run.run(StopAfter(1), io.StringIO())
    stay = frozen_leaves(frozen, model_params(cfg.model))
    # The first moments are a tenth of the clipped gradients, in bf16: its norm is of what is trained.
    squares = [
        np.sum(np.square(np.asarray(mu, np.float64))) for mu in jax.tree.leaves(first.state.opt_state.mu)
    ]
    [record] = [r for r in read_records(tmp_path / "new" / "metrics.jsonl") if r["kind"] == "train"]
    np.testing.assert_allclose(10 * np.sqrt(np.sum(squares)), min(1.0, record["grad_norm"]), rtol=2**-8)
    with contextlib.closing(
        trainer(cfg)
    ) as run:  # resumed: from its own checkpoint, not from those weights again
        assert run.resume() and run.step == 1 and raw(run.state) == raw(first.state)
        result = run.run(StopAfter(2), io.StringIO())
    moments = result.state.opt_state
    for (path, stays), x, y, mu, nu in zip(
        jax.tree_util.tree_leaves_with_path(stay),
        *(jax.tree.leaves(tree) for tree in (before, result.state.params, moments.mu, moments.nu)),
        strict=True,
    ):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        assert stays == bool(re.search(frozen, name))
        assert (x.tobytes() == np.asarray(y).tobytes()) == stays, name
        assert (not np.asarray(mu).any() and not np.asarray(nu).any()) == stays, name


def test_what_does_not_fit_is_named_in_one_line(golden_run, folders, tmp_path):
    def start(kind, **model):
        cfg = config(golden_run, tmp_path, model=model, init_from=str(folders.get(kind, kind)))
        return Start(cfg, make_mesh(cfg.mesh, jax.devices()[:1]))

    other = (
        r"does not fit the model: model.moe_intermediate_size is 16 there, 24 here; arrays: "
        r"moe_layers.ffn.experts.w_down_efd is \[1, 8, 16, 32\] there, \[1, 8, 24, 32\] here; .*mtp"
    )
    for kind in ("run", "f32"):
        with pytest.raises(ValueError, match=other):
            start(kind, moe_intermediate_size=24)
        with pytest.raises(
            ValueError, match=r"num_nextn_predict_layers is 1 there, 2 here; arrays: mtp.* and 12 more"
        ):
            start(kind, num_nextn_predict_layers=2)
    assert start("run", rope_theta=500.0).differences == ["model.rope_theta is 10000.0 there, 500.0 here"]
    with pytest.raises(ValueError, match="nowhere does not exist"):
        start(tmp_path / "nowhere")
    convert.to_orbax(folders["f32"], tmp_path / "fine")
    hf.save(tmp_path / "fp8", *hf.load(folders["f32"]), format="fp8")
    convert.to_orbax(tmp_path / "fp8", tmp_path / "stored")
    with pytest.raises(
        ValueError, match="holds FP8 matrices, which are no weights to train: convert them with"
    ):
        start(tmp_path / "stored")


def test_the_tokenizer_of_the_weights_is_the_runs(golden_run, folders, tmp_path):
    cfg = config(golden_run, tmp_path, init_from=str(folders["run"]))
    for data in (dataclasses.replace(cfg.data, tokenizer=None), cfg.data):
        with contextlib.closing(trainer(dataclasses.replace(cfg, data=data))) as run:
            start = Start(run.cfg, run.mesh)
            if data.tokenizer is None:
                with pytest.raises(
                    ValueError, match=r"its tokenizer is not this run's; set config.data.tokenizer=/"
                ):
                    start.check_tokenizer(run.data.tokenizer)
            else:
                start.check_tokenizer(run.data.tokenizer)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("embed|moe_layers.*gaet", r"'moe_layers.\*gaet' is in no parameter's path; near: .*moe_layers"),
        ("moe_layer.ffn", r"near: moe_layers.ffn"),
        ("(embed", r"is no regular expression: missing \), unterminated subpattern"),
        ("", None),
        (".", "matches every parameter: nothing is left to train"),
        ("(embed|head)", None),
    ],
)
def test_patterns(pattern, message):
    params = model_params(tiny().model)
    if message is None:
        assert any(jax.tree.leaves(frozen_leaves(pattern, params))) == bool(pattern)
        return
    with pytest.raises(ValueError, match=message):
        frozen_leaves(pattern, params)
