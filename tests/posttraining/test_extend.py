"""Context extension: its phases as runs, the report's values, and what is accepted of the weights it starts from."""

import contextlib
import dataclasses
import importlib
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from deepseek_jax import data
from deepseek_jax.config import Config, from_config_dict, to_dict
from deepseek_jax.model import rope
from deepseek_jax.parallel.mesh import abstract_mesh, make_mesh
from deepseek_jax.posttraining.extend import ExtendConfig, before, check_source, stages
from deepseek_jax.posttraining.extended import Comparison, arms
from deepseek_jax.posttraining.recall import write_recall
from deepseek_jax.training.checkpoint import Checkpointer
from deepseek_jax.training.preflight import granularity
from deepseek_jax.training.run import Run
from deepseek_jax.training.schedules import Schedules
from deepseek_jax.training.start import Start
from experiments import config_flag
from experiments import extend as command
from experiments.command_line import status
from tests.golden.config import HERE
from tests.tiny_run import SECTIONS, fresh_state, tiny

MODEL = SECTIONS["model"] | {
    "max_position_embeddings": 160,
    "rope_scaling": {"factor": 5.0, "original_max_position_embeddings": 32},
}
PHASES = {"seq_len": (64, 128), "batch_size": (4, 2), "steps": (3, 2), "lr": (1e-3, 5e-4)}
TEXT = str(HERE / "text" / "*.txt")


def config(folder="/nowhere", **sections):
    values = {
        **SECTIONS,
        "model": MODEL,
        "phases": PHASES,
        "data": {"seq_len": 32, "source": TEXT, "vocab_size": 384, "validation_fraction": 0.1},
        "train": {
            "batch_size": 4,
            "init_from": f"{folder}/before",
            "out_dir": f"{folder}/run",
            "sample_tokens": 0,
        },
    }
    for name, value in sections.items():
        values[name] = {**values.get(name, {}), **value} if isinstance(value, dict) else value
    return from_config_dict(values, ExtendConfig)


# --- phases are runs ------------------------------------------------------------------------------------------------


def test_deepseek_v3s_phases():
    """Report section 4.3, to the token; and what pre-training ended with (4.2): MTP weight, speed of the bias."""
    module = importlib.import_module("configs.v3_extend")
    assert "python -m experiments.extend --config=configs/v3_extend.py" in module.__doc__
    cfg = from_config_dict(module.get_config(), ExtendConfig)
    runs = stages(cfg)
    assert [run.name for run in runs] == ["phase_1", "phase_2"]
    assert [(r.cfg.data.seq_len, r.cfg.train.batch_size, r.cfg.train.steps) for r in runs] == [
        (32_768, 1920, 1000),
        (131_072, 480, 1000),
    ]
    pre = from_config_dict(importlib.import_module("configs.v3_671b").get_config())
    for run in runs:
        assert run.cfg.train.batch_size * run.cfg.data.seq_len == 62_914_560 == 15_360 * pre.data.seq_len
        mesh = abstract_mesh(run.cfg.mesh, 2048)
        size = granularity(run.cfg, mesh)
        schedules = Schedules.of_steps(run.cfg.optimizer, run.cfg.train, run.cfg.data.seq_len, size)
        assert schedules.num_steps(size) == 1000 and not schedules.ramps(size)
        for plan in (next(schedules.plan(size)), list(schedules.plan(size))[-1]):
            hyper = schedules.of_step(plan, size)
            assert plan.batch_size == run.cfg.train.batch_size
            assert [float(x) for x in hyper[:3]] == [np.float32(7.3e-6), 0.0, np.float32(0.1)]
        yarn = run.cfg.model.rope_scaling
        assert (yarn.factor, yarn.original_max_position_embeddings) == (40.0, 4096)
        assert (yarn.beta_slow, yarn.beta_fast) == (1.0, 32.0)
        # sqrt(t) = 0.1 ln s + 1 is on queries and on keys
        assert rope.softmax_scale(run.cfg.model) == pytest.approx(192**-0.5 * (0.1 * np.log(40) + 1) ** 2)
        assert dataclasses.replace(before(run.cfg.model), max_position_embeddings=4096) == pre.model
    assert runs[0].cfg.model == runs[1].cfg.model
    tuned = importlib.import_module("configs.v3_sft").get_config()
    assert tuned.train.init_from == runs[-1].cfg.train.out_dir  # a run, not the folder of both


def test_each_phase_starts_from_the_one_before():
    runs = stages(
        config(
            control=True,
            recall={"share": 0.25, "steps": 70, "steps_share": 0.5, "lr": 2e-3},
            phases={"grad_accumulation": (2, 1)},
        )
    )
    assert [(r.name, Path(r.cfg.train.init_from).name) for r in runs] == [
        ("recall", "before"),
        ("phase_1", "recall"),
        ("phase_2", "phase_1"),
        ("control_1", "recall"),
        ("control_2", "control_1"),
    ]
    assert {type(run.cfg) for run in runs} == {Config}
    assert [run.cfg.train.out_dir for run in runs] == [f"/nowhere/run/{run.name}" for run in runs]
    assert [r.cfg.data.seq_len for r in runs] == [32, 64, 128, 32, 32]
    assert [r.cfg.train.batch_size for r in runs] == [4, 4, 2, 8, 8]
    assert [r.cfg.train.grad_accumulation for r in runs] == [1, 2, 1, 2, 1]
    assert [r.cfg.train.steps for r in runs] == [70, 3, 2, 3, 2]
    assert [r.cfg.optimizer.warmup_steps for r in runs] == [7, 0, 0, 0, 0]
    assert [r.cfg.optimizer.peak_lr for r in runs] == [2e-3, 1e-3, 5e-4, 1e-3, 5e-4]
    assert [r.cfg.model.rope_scaling is None for r in runs] == [True, False, False, False, False]
    assert all(r.cfg.data.tokenizer == "/nowhere/before" for r in runs)
    shares = [dict(r.cfg.data.weighted_sources()) for r in runs]
    assert shares[2] == {TEXT: 0.75, "/nowhere/run/recall_128.jsonl": 0.25}
    assert shares[0] == {TEXT: 0.5, "/nowhere/run/recall_32.jsonl": 0.5}
    assert shares[3] == {TEXT: 0.75, "/nowhere/run/recall_32.jsonl": 0.25}
    [plain, *_] = stages(config())
    assert plain.name == "phase_1" and plain.cfg.data.weighted_sources() == [(TEXT, 1.0)]


def test_the_models_that_are_compared():
    found = arms(config(control=True, recall={"share": 0.1, "steps": 1}))
    assert [(name, Path(a.weights).name, a.model.rope_scaling is None) for name, a in found.items()] == [
        ("untouched", "recall", True),
        ("YaRN, untrained", "recall", False),
        ("after 2 phase(s)", "phase_2", False),
        ("after as much at 32", "control_2", False),
    ]
    assert [Path(a.weights).name for a in arms(config()).values()] == ["before", "before", "phase_2"]


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"phases": {"steps": (3,)}},
            "phases.seq_len has 2, phases.batch_size has 2, phases.steps has 1, phases.lr",
        ),
        ({"phases": {"grad_accumulation": (1,)}}, "phases.grad_accumulation has 1"),
        ({"phases": dict.fromkeys(PHASES, ())}, "there is no phase: set phases.seq_len"),
        ({"phases": {"seq_len": (128, 64)}}, r"phases.seq_len=\(128, 64\) must grow"),
        ({"phases": {"seq_len": (32, 64)}}, "phases.seq_len=32 is no longer than data.seq_len"),
        ({"phases": {"lr": (1e-3, 0.0)}}, r"phases.lr=\(0.001, 0.0\) must lie inside"),
        (
            {"phases": {"lr": (1e-3, "x")}},
            r"config key phases.lr=\(0.001, 'x'\) should be a tuple of numbers",
        ),
        ({"phases": {"seq_len": (64, 160)}, "model": {"max_position_embeddings": 128}}, "exceeds what"),
        (
            {"model": {"rope_scaling": {"factor": 2.0, "original_max_position_embeddings": 32}}},
            r"reaches \(64\)",
        ),
        ({"model": {"rope_scaling": None}}, "model.rope_scaling=None: a context is extended by YaRN"),
        (
            {"model": {"rope_scaling": {"factor": 5.0, "original_max_position_embeddings": 128}}},
            "original_max_position_embeddings=128 is the length trained with before, and that is data.seq_len=32",
        ),
        ({"phases": {"seq_len": (72, 128)}, "control": True}, "control: phases.seq_len=.* are no multiples"),
        (
            {"needle": {"lengths": (64, 161)}},
            r"needle.lengths=\(64, 161\) exceed model.max_position_embeddings=160",
        ),
        ({"recall": {"steps": 5, "steps_share": 0.0}}, "recall.steps=5 needs a recall.steps_share"),
    ],
)
def test_what_is_refused(sections, message):
    with pytest.raises(ValueError, match=message) as error:
        config(**sections)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config.train.steps=5"], "--config.train.steps: that is said by phases.steps"),
        (["--config.optimizer.gamma=0.1"], "the routers' bias stays as it is"),
        (["--config.phases.stesp=5"], "unknown config key phases.stesp; did you mean phases.steps?"),
        (["--config.train.init_from="], "a context extension starts from weights: set train.init_from=DIR"),
        (["--from_step=3"], "there is no flag --from_step"),
    ],
)
def test_mistakes_on_the_command_line(arguments, message, capsys):
    assert status(command.main, arguments) == 2
    [line] = capsys.readouterr().err.strip().splitlines()
    assert message in line


def test_phases_on_the_command_line():
    argv = ["--config.phases.steps=5,6", "--config.phases.lr=1e-3,2e-4", "--config.needle.lengths=64,128"]
    cfg = config_flag.build(
        ExtendConfig,
        config_flag._changed(to_dict(config()), config_flag.take(argv, ExtendConfig)[0].values, ExtendConfig),
    )
    assert (cfg.phases.steps, cfg.phases.lr, cfg.needle.lengths) == ((5, 6), (1e-3, 2e-4), (64, 128))


# --- the weights it starts from ---------------------------------------------------------------------------------------


def checkpoint(cfg: Config, folder: Path, **meta) -> None:
    """A run in `folder` with one checkpoint, of step 0; nothing is compiled."""
    keeper = Checkpointer(folder / "checkpoints")
    keeper.save(
        0, fresh_state(cfg), {"none": np.zeros(1)}, {"config": to_dict(cfg), "data": {}, "tokens": 7} | meta
    )
    keeper.close()


def start(cfg):
    first = stages(cfg)[0].cfg
    return Start(first, make_mesh(first.mesh, jax.devices()[:1]))


def test_other_positions_are_accepted_and_nothing_else(tmp_path):
    checkpoint(tiny(), tmp_path / "before")
    named = check_source(start(cfg := config(tmp_path)), cfg)
    assert named[0] == "model.max_position_embeddings is 128 there, 160 here"
    assert any(x.startswith("model.rope_scaling") and "5.0 here" in x for x in named)
    assert all(x.startswith(("model.max_position", "model.rope_scaling")) for x in named)
    half = config(tmp_path, model=MODEL | {"dtype": "bfloat16"})
    assert "model.dtype is 'float32' there, 'bfloat16' here" in check_source(start(half), half)
    other = config(tmp_path, model=MODEL | {"rope_theta": 500.0, "routed_scaling_factor": 1.0})
    with pytest.raises(ValueError) as error:
        check_source(start(other), other)
    assert "differs in more than its positions: model.rope_theta is 10000.0 there, 500.0 here; " in str(
        error.value
    )
    assert "model.routed_scaling_factor is 2.5 there, 1.0 here" in str(error.value)
    assert "rope_scaling" not in str(error.value)


def test_yarn_stretches_the_length_really_trained_with(tmp_path):
    """A model may have more positions than its windows had tokens."""
    checkpoint(tiny(data={"seq_len": 64}), tmp_path / "before")
    with pytest.raises(ValueError, match=r"was trained on windows of 64 tokens, and data.seq_len=32"):
        check_source(start(cfg := config(tmp_path)), cfg)
    checkpoint(tiny(data={"seq_len": 64}), tmp_path / "converted" / "before", huggingface={"config": {}})
    cfg = config(tmp_path / "converted")
    assert check_source(start(cfg), cfg)


def test_where_weights_come_from_goes_with_them(tmp_path):
    """Into the first checkpoint, those after a resumption, and those of a run that starts from it."""
    first = {"weights": "/elsewhere/checkpoints/5", "step": 5}
    checkpoint(tiny(), tmp_path / "before", provenance=first)
    text = {"tokenizer": str(HERE / "tokenizer.json"), "cache_dir": str(tmp_path / "cache")}
    one, two = (run.cfg for run in stages(config(tmp_path, data=text)))
    expected = {
        "weights": str(tmp_path / "before" / "checkpoints" / "0"),
        "step": 0,
        "tokens": 7,
        "before": first,
    }
    for resumed in (False, True):
        with contextlib.closing(Run(one, make_mesh(one.mesh, jax.devices()[:1]))) as run:
            assert run.resume() == resumed
            assert resumed or run.state.balance_bias.shape == (2, 8)
            assert {k: v for k, v in run.provenance.items() if k != "differences"} == expected
            assert len(run.provenance["differences"]) >= 2
            run.step += 1
            run.save()
    assert json.loads(json.dumps(run.provenance)) == run.provenance
    after = Start(two, make_mesh(two.mesh, jax.devices()[:1]))
    assert after.differences == [] and after.trained_length == 64
    assert after.provenance["before"] == run.provenance and after.provenance["step"] == 2


def test_what_was_found_is_of_the_files_that_are_there(tmp_path):
    """Weights made anew in the same place are looked at again."""
    text = {"tokenizer": str(HERE / "tokenizer.json"), "cache_dir": str(tmp_path / "cache")}
    cfg = config(tmp_path, data=text)
    arm, found = arms(cfg)["untouched"], []
    for tokens in (7, 8):
        checkpoint(tiny(), tmp_path / "before", tokens=tokens)
        found.append(Comparison(cfg, make_mesh(cfg.mesh, jax.devices()[:1]))._described(arm))
        shutil.rmtree(tmp_path / "before")
    assert found[0]["weights"] == found[1]["weights"] and found[0]["files"] != found[1]["files"]


def test_texts_to_learn_recall_from(tmp_path):
    """A file for each length that a run has, the same whenever it is written, which runs read as a source."""
    text = {"tokenizer": str(HERE / "tokenizer.json"), "cache_dir": str(tmp_path / "cache")}
    cfg = config(tmp_path, data=text, control=True, recall={"share": 0.25})
    write_recall(cfg, stages(cfg))
    files = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    assert sorted(files) == ["recall_128.jsonl", "recall_32.jsonl", "recall_64.jsonl"]
    times = [path.stat().st_mtime_ns for path in (tmp_path / "run").iterdir()]
    write_recall(cfg, stages(cfg))
    assert times == [path.stat().st_mtime_ns for path in (tmp_path / "run").iterdir()]
    for run in stages(cfg)[:2]:
        with contextlib.closing(data.load(run.cfg.data).train) as stream:
            windows = stream.take(8)["tokens"]
        asked = [data.Tokenizer.load(HERE / "tokenizer.json").decode(window) for window in windows]
        assert sum("# key:" in text for text in asked) >= 2
