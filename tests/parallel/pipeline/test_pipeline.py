"""The pipeline of a config: schedule and micro-batches that are chosen, what a run says of them, what is refused."""

import importlib

import jax
import numpy as np
import pytest

from deepseek_jax.config import from_config_dict
from deepseek_jax.parallel.mesh import abstract_mesh
from deepseek_jax.parallel.pipeline.pipeline import described, pipeline_over
from deepseek_jax.training.step import abstract_state, make_train_step
from experiments import dry_run
from tests.tiny_run import HYPER, tiny

FOUR = {"num_hidden_layers": 4}


def over(pipe, rows, shards=1, accumulation=1, **mesh):
    """(config, mesh axes), each device with `rows` sequences of a step."""
    train = {"batch_size": rows * shards, "grad_accumulation": accumulation}
    return tiny(model=FOUR, train=train, mesh={"pipe": pipe, "data": 1, **mesh}), {
        "pipe": pipe,
        "node": shards,
    }


@pytest.mark.parametrize(
    ("pipe", "rows", "name", "micro"),
    [
        (4, 4, "one_f_one_b", 4),
        (4, 8, "dualpipe", 8),
        (4, 64, "dualpipe", 16),  # at most 4 per rank
        (4, 30, "dualpipe", 10),  # 15 of two sequences are odd
        (4, 15, "one_f_one_b", 15),
        (3, 12, "one_f_one_b", 12),
        (2, 1, "one_f_one_b", 1),
    ],
)
def test_as_many_micro_batches_as_there_can_be(pipe, rows, name, micro):
    found = pipeline_over(*over(pipe, rows))
    assert (found.name, found.micro) == (name, micro) and rows % found.micro == 0


def test_a_run_says_what_it_does():
    cfg, axes = over(4, 4, shards=2)
    assert described(cfg, axes) == [
        "pipeline: one_f_one_b over 4 ranks; on each device 4 micro-batches of 1 sequence(s)",
        "  stages: embedding, no layer | layers 0 to 1 | layers 2 to 3 | no layer, MTP, head",
        "  not DualPipe, which needs an even number of micro-batches, at least two per rank: train.batch_size=16, for "
        "instance",
    ]
    cfg, axes = over(4, 4, shards=2, accumulation=2)
    assert "train.grad_accumulation=8 and train.batch_size=32" in described(cfg, axes)[-1]
    assert "mesh.pipe=4, for instance" in described(*over(3, 12))[-1]
    assert described(tiny(), {"pipe": 1}) == []


def test_what_it_says_dualpipe_takes_is_enough():
    for accumulation, batch in ((1, 16), (8, 32)):
        cfg, axes = over(4, batch // 2, shards=2, accumulation=accumulation)
        [line, _] = described(cfg, axes)
        assert line.startswith(
            "pipeline: dualpipe over 4 ranks, each with two stages; on each device 8 micro-"
        )


def test_deepseek_v3():
    cfg = from_config_dict(importlib.import_module("configs.v3_671b").get_config())
    line, of_stages = described(cfg, {"pipe": 16, "data": 2, "node": 8, "local": 8})
    assert "dualpipe_v over 16 ranks" in line and "120 micro-batches of 1 sequence(s)" in line
    assert of_stages.startswith("  stages: embedding, no layer | layers 0 to 2 | layers 3 to 4 |")
    assert of_stages.endswith("| layers 59 to 60 | no layer, MTP, head")


ONE_LINE = [
    (
        dict(pipe=4, rows=8, accumulation=4, schedule="dualpipe"),
        "dualpipe: 4 micro-batches, must be at least 8",
    ),
    (
        dict(pipe=4, rows=4, schedule="dualpipe"),
        "mesh.pipe=4 with 4 micro-batches on each device: change train",
    ),
    (dict(pipe=3, rows=6, schedule="dualpipe"), "dualpipe: 3 stages, must be even"),
    (
        dict(pipe=4, rows=4, stage_layers=(1, 1, 2)),
        r"mesh.stage_layers=\(1, 1, 2\): 3 stages of 4 layers in all",
    ),
    (
        dict(pipe=2, rows=4, schedule="dualpipe_v", stage_layers=(2, 2)),
        "4 layers on 4 stages; give 4 numbers",
    ),
    (
        dict(pipe=1, rows=4, stage_layers=(4,)),
        r"mesh.stage_layers=\(4,\) is of a pipeline, and there is none",
    ),
    (dict(pipe=1, rows=4, schedule="gpipe"), "mesh.schedule=gpipe is of a pipeline, and there is none"),
    (dict(pipe=4, rows=4, schedule="dualpip"), "is not one of .*; did you mean 'dualpipe'"),
]


@pytest.mark.parametrize(("settings", "message"), ONE_LINE)
def test_what_is_refused(settings, message):
    """By the check of a run, before anything is read, compiled or written."""
    with pytest.raises(ValueError, match=message) as error:
        dry_run.report(over(**settings)[0])
    assert "\n" not in str(error.value)


def test_a_batch_of_another_size():
    """Of 4 sequences a device would leave one out of 3 micro-batches."""
    cfg = over(2, 3)[0]
    mesh = abstract_mesh(cfg.mesh, 2)
    batch = {"tokens": jax.ShapeDtypeStruct((4, cfg.data.seq_len + 1), np.int32)}
    with pytest.raises(
        ValueError, match=r"batch of 4 .* 1 device shards x 3 micro-batches of the pipeline; change"
    ):
        make_train_step(cfg, mesh).trace(abstract_state(cfg, mesh), batch, HYPER)
