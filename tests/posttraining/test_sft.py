"""Supervised fine-tuning: what a sample is learned from does not depend on what lies beside it, or on how a batch is cut."""

import contextlib
import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags

import deepseek_jax
from configs import tiny as tiny_base
from configs import tiny_sft, v3_sft
from deepseek_jax import hf
from deepseek_jax.config import Config, YarnConfig, build, from_config_dict
from deepseek_jax.data import Tokenizer, Validation
from deepseek_jax.data.conversations import Conversations
from deepseek_jax.data.held_out import is_held_out
from deepseek_jax.model.sequence import WHOLE
from deepseek_jax.model.transformer import Aux
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.posttraining.sft import SFTConfig, Tuner
from deepseek_jax.posttraining.task_files import in_files
from deepseek_jax.training.labels import Totals
from deepseek_jax.training.objectives import Outputs, pretraining
from deepseek_jax.training.schedules import Schedules
from experiments import config_flag, config_help
from experiments.answers import asked, spread
from tests.golden.config import HERE
from tests.oracle.tiny import weights
from tests.posttraining.sft_cases import (
    CFG,
    REORDERED,
    ROWS,
    alone,
    apart,
    conversations,
    labels_of,
    loss_and_gradient,
    packed,
)
from tests.tiny_run import HYPER

PARAMS, BIAS = weights(CFG.model, 1)


@pytest.mark.parametrize("seed", range(3))
def test_packed_samples_are_learned_as_if_alone(seed):
    found = conversations(np.random.default_rng(seed), 9)
    together, each = packed(found), alone(found)
    assert len(together["tokens"]) < len(each["tokens"]) and (labels_of(together) == labels_of(each)).all()
    (got, gradient), (want, wanted) = (loss_and_gradient(PARAMS, BIAS, batch) for batch in (together, each))
    for found, batch in ((got, together), (want, each)):  # of the main model; padding goes to no expert
        assert found["counts"][0].sum() == 2 * (~batch["padding"][:, :-1]).sum()
    for name in ("loss", "mtp_loss"):
        assert got[name] == pytest.approx(want[name], rel=REORDERED)
    assert apart(gradient, wanted) < REORDERED
    # Mutations: the mean of four samples' means each; samples that see each other.
    parts = [{name: x[i : i + ROWS] for name, x in each.items()} for i in range(0, len(each["tokens"]), ROWS)]
    means = [loss_and_gradient(PARAMS, BIAS, part)[0]["loss"] for part in parts]
    assert abs(np.mean(means) / want["loss"] - 1) > 1e-3
    seeing = together | {"segments": np.zeros_like(together["segments"])}
    assert apart(loss_and_gradient(PARAMS, BIAS, seeing, labels_of(together))[1], wanted) > 0.01


def test_a_prompts_labels_have_no_influence():
    """Of what the objective reads, at every depth: the model's outputs stay as they are."""
    batch = packed(conversations(np.random.default_rng(3), 9))
    t, model = CFG.data.seq_len, CFG.model
    rows = len(batch["tokens"])
    rng = np.random.default_rng(4)

    def states():
        return rng.standard_normal((rows, t, model.hidden_size), np.float32)

    w_dv = rng.standard_normal((model.hidden_size, model.vocab_size), np.float32)
    aux = Aux(expert_counts_le=None, seq_loss=0.0, classic_loss=0.0, mtp=[states()])
    outputs = Outputs(states(), w_dv, aux, WHOLE)

    @jax.jit
    def losses(tokens, mask):
        changed = batch | {"tokens": tokens, "loss_mask": mask}
        metrics = pretraining(CFG)(outputs, changed, Totals(rows, (1, 1), 1, rows), HYPER)[1]
        return jnp.stack([metrics["loss"], metrics["mtp_loss"]])

    def flipped(places):
        return np.where(places, (batch["tokens"] + 1) % model.vocab_size, batch["tokens"])

    learned = batch["loss_mask"]
    want = losses(batch["tokens"], learned)
    np.testing.assert_array_equal(losses(flipped(~learned), learned), want)
    # One token of an answer, inside it, so that both depths read it; and, a mutation, a prompt's where all is learned.
    inside = learned & np.roll(learned, 1, axis=1) & np.roll(learned, 2, axis=1)
    one = np.zeros_like(learned)
    one[tuple(np.argwhere(inside)[0])] = True
    assert (losses(flipped(one), learned) != want).all()
    everything = np.ones_like(learned)
    assert (losses(flipped(~learned), everything) != losses(batch["tokens"], everything)).all()


# --- the run ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def config(tmp_path):
    """Of a run that learns generated sums from a checkpoint of random weights."""
    tokenizer = Tokenizer.load(HERE / "tokenizer.json")
    hf.save(tmp_path / "base", CFG.model, PARAMS, BIAS, format="f32", tokenizer=tokenizer)
    sections = dataclasses.asdict(CFG) | {"sft": {"sources": ("tasks:addition/1/60",)}}
    sections["data"] |= {"cache_dir": str(tmp_path / "cache"), "fim_rate": 0.0, "seq_len": 48}
    sections["train"] |= {"init_from": str(tmp_path / "base"), "out_dir": str(tmp_path / "run")}
    return build(SFTConfig, sections)


def tuner(cfg, **train):
    return Tuner(
        dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, **train)),
        make_mesh(cfg.mesh, jax.devices()[:1]),
    )


def test_tasks_are_files_with_their_held_out_questions(config, tmp_path):
    mixed = dataclasses.replace(
        config.sft, sources=("tasks:addition/1/60=0.5", "tasks:recall/2/40=2", "a.jsonl=1")
    )
    (first, second, third), held = (
        (found := in_files(mixed, tmp_path, "sft.sources")).sources,
        found.validation,
    )
    assert (
        first.endswith(".jsonl=0.5") and second.endswith("=2.0") and third == "a.jsonl=1.0" and held is None
    )
    of_tasks = in_files(dataclasses.replace(mixed, sources=mixed.sources[:2]), tmp_path, "sft.sources")

    def questions(name):
        return {row["prompt"][0]["content"] for row in map(json.loads, Path(name).read_text().splitlines())}

    files = *(source.rpartition("=")[0] for source in of_tasks.sources), of_tasks.validation
    train, recall, held_out = map(questions, files)
    # Beside a file both sides stand in a task's file, and the split by the question parts them again.
    both = questions(first.rpartition("=")[0]) | questions(second.rpartition("=")[0])
    assert both == train | recall | held_out and {q for q in both if is_held_out(q)} == held_out
    fewer = in_files(dataclasses.replace(mixed, validation_fraction=0.02), tmp_path, "sft.sources").sources[0]
    assert not {q for q in questions(fewer.rpartition("=")[0]) - train if not is_held_out(q, 0.02)}
    # Of 81 sums of one-digit numbers, those held out; and a tenth of as many of the other task.
    assert len(recall) == 40 and len(train) <= 60 and 4 < len(held_out) <= 10
    assert not held_out & (train | recall)
    little = dataclasses.replace(config.sft, sources=("a.jsonl=0.00005", "b.jsonl=1"))
    assert (
        in_files(in_files(little, tmp_path, "sft.sources"), tmp_path, "sft.sources").sources[0]
        == "a.jsonl=5e-05"
    )
    named = dataclasses.replace(config.sft, validation="tasks:recall/2/40")
    files = [in_files(named, tmp_path, "sft.sources") for _ in range(2)]
    assert files[0] == files[1] and len(Path(files[0].validation).read_text().splitlines()) == 4


def test_epochs_decide_the_steps(config):
    with contextlib.closing(tuner(config)) as run:
        assert run.data.report.windows > 8 and run.total_steps == config.train.steps
        windows = run.data.report.windows
    twice = dataclasses.replace(
        config,
        sft=dataclasses.replace(config.sft, epochs=2.0),
        optimizer=dataclasses.replace(config.optimizer, schedule="cosine", warmup_steps=5),
        train=dataclasses.replace(config.train, steps=3),
    )
    assert twice.remarks[0].startswith("sft.epochs=2: the conversations decide") and config.remarks == ()
    with contextlib.closing(tuner(twice)) as run:
        assert run.data.tokenizer.has_chat_template
        assert run.total_steps == run.cfg.train.steps == -(-2 * windows // 4)
        assert run.schedules.total_tokens == run.total_steps * 4 * 48


def test_a_run_is_saved_resumed_and_loaded(config):
    """Weights, the place in the conversations, and what text needs. (Steps: `experiments.kill_test --command=sft`.)"""
    with contextlib.closing(tuner(config)) as run:
        run.data.train.take(4)
        run.save()
        following = run.data.train.take(4)
        run.data.tokenizer.save(run.out_dir)
    with contextlib.closing(tuner(config)) as run:
        assert run.resume() and run.changes == ([], [])
        for name, x in run.data.train.take(4).items():
            assert x.dtype == config.batch_arrays[name]
            np.testing.assert_array_equal(x, following[name])
    model = deepseek_jax.load(config.train.out_dir)
    assert model.config == CFG.model and model.tokenizer.has_chat_template
    assert apart(model.params, PARAMS) == 0.0


@pytest.mark.parametrize(
    ("train", "message"),
    [
        (
            {"init_from": ""},
            r"train.init_from is empty, and fine-tuning starts from weights: .*init_from=runs/tiny",
        ),
        ({"init_from": "/nonexistent"}, "train.init_from=/nonexistent does not exist: train it first"),
    ],
)
def test_what_is_refused(config, train, message):
    with contextlib.closing(tuner(config, **train)) as run, pytest.raises(ValueError, match=message):
        run.check()


def test_the_tokenizer_is_that_of_the_weights(config):
    assert config.data.tokenizer == config.train.init_from
    for name in (
        "base",
        "base/checkpoints",
        "base/checkpoints/20",
    ):  # a tokenizer lies in the folder of the run
        assert build(SFTConfig, {"train": {"init_from": name}}).data.tokenizer == "base"
    other = dataclasses.replace(config, train=dataclasses.replace(config.train, init_from="other"))
    assert other.data.tokenizer == config.data.tokenizer  # named once, it stays


# --- the end of a run -------------------------------------------------------------------------------------------------


def test_held_out_conversations_are_answered():
    """The prompt up to the last learned turn, beside what stands there."""
    tokenizer = Tokenizer.load(HERE / "tokenizer.json")
    rows = [
        {"messages": [{"role": "user", "content": "Peel?"}, {"role": "assistant", "content": "Yes."}]},
        {"prompt": "2+2=", "completion": "4"},
        {"text": "An apple."},
    ]
    made = Conversations(tokenizer)
    samples = [one for row in made.samples([made.turns(row) for row in rows]) for one in row]
    validation = Validation(packed(samples, 1), np.array([9]))
    found = asked(validation)
    assert {(tokenizer.decode(one.prompt, True), tokenizer.decode(one.answer, True)) for one in found} == {
        ("Peel?", "Yes."),
        ("2+2=", "4"),
    }
    assert spread([1, 2, 3, 4], 2) == [1, 3] and spread([], 2) == []


def test_shipped_configs_have_the_reports_values():
    """Section 5.1, and what it leaves open from DeepSeek-R1."""
    cfg = from_config_dict(v3_sft.get_config(), SFTConfig)
    schedules = Schedules.of_steps(cfg.optimizer, cfg.train, cfg.data.seq_len)
    steps = cfg.train.steps
    assert [schedules.lr(step, 0) for step in (0, steps / 2, steps)] == pytest.approx([5e-6, 3e-6, 1e-6])
    assert (cfg.sft.epochs, cfg.data.seq_len, cfg.train.batch_size) == (2.0, 32768, 128)
    assert {schedules.gamma(0), schedules.gamma(schedules.total_tokens)} == {0.0}
    assert {schedules.mtp_lambda(n) for n in (0, schedules.total_tokens)} == {0.1}
    assert cfg.model.rope_scaling == YarnConfig() and cfg.model.max_position_embeddings == 163840
    tiny = from_config_dict(tiny_sft.get_config(), SFTConfig)
    assert tiny.model == from_config_dict(tiny_base.get_config()).model
    assert (tiny.train.init_from, tiny.data.tokenizer) == ("runs/tiny", "runs/tiny")
    assert [key for key, _, doc in config_help.fields(tiny) if not doc] == []


def test_what_plans_a_step_reads_what_it_knows_of_a_stages_config():
    argv, none = ["--config=configs/v3_sft.py", "--config.mesh.node=4"], flags.FlagValues()
    planned = config_flag.parse(argv, "", none, any_stage=True)
    assert type(planned) is Config and (planned.data.seq_len, planned.mesh.node) == (32768, 4)
    with pytest.raises(ValueError, match="unknown config key sft"):
        config_flag.parse(argv, "", none)


def test_labels_loss_and_gradients_are_trls(tmp_path):
    """The short form of `python -m tests.posttraining.sft_check`. TRL is imported here: it takes seconds."""
    from tests.posttraining.trl_sft import Peer, random_rows

    rows = random_rows(np.random.default_rng(0), 6, conversational=True)
    peer = Peer(PARAMS, BIAS, rows, tmp_path)
    for place, sample in enumerate(peer.samples):
        for got, want in zip(sample, peer.example(place), strict=True):
            np.testing.assert_array_equal(got, want)
    found = peer.compared(range(6))
    assert found.ours == pytest.approx(found.theirs, rel=REORDERED)
    # As in test_parity_training: gradients of float32 sums in another order.
    assert len(found.gradients) > 20 and max(found.gradients.values()) < 2e-5
