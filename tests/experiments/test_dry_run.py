"""What a run would be, said and checked before anything is read; and the devices that follow its batch and mesh."""

import dataclasses

import pytest

from deepseek_jax.config import Config, MeshConfig, TrainConfig, from_config_dict
from experiments import devices, dry_run
from tests.golden.config import get_config


def golden(**sections) -> Config:
    cfg = from_config_dict(get_config())
    changed = {name: dataclasses.replace(getattr(cfg, name), **values) for name, values in sections.items()}
    return dataclasses.replace(cfg, **changed)


def test_the_report():
    text = dry_run.report(golden(mesh={"local": 4, "data": 1}))
    assert "run: 20 steps of 4 x 32 tokens, 2,560 in all" in text and "output: runs/golden" in text
    assert "memory on each of 4 device(s):" in text
    [line] = [x for x in text.splitlines() if x.startswith("  between steps")]
    # A dense parameter and an expert's each have a float32 master and two moments, here in float32.
    assert "MiB per device" in text and 0 < float(line.split()[-1]) < 12 * 66_724 / 2**20


def test_devices_that_are_not_here():
    text = dry_run.report(golden(mesh={"data": 64}, train={"batch_size": 128}, optimizer={"batch_start": 0}))
    assert "memory on each of 64 device(s), of which 8 are at hand" in text


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"train": {"batch_size": 6}}, r"train\.batch_size=6 must be a multiple of 8"),
        ({"mesh": {"node": 3, "data": 1}}, r"train\.batch_size=4 must be a multiple of 3"),
        ({"data": {"tokenizer": "nope"}, "train": {"batch_size": 8}}, "no tokenizer at nope"),
        ({"mesh": {"tensor": 3, "data": 1}}, "3"),
        ({"train": {"batch_size": 8, "init_from": "/nonexistent"}}, "/nonexistent does not exist"),
    ],
)
def test_what_is_refused(sections, message):
    with pytest.raises(ValueError, match=message):
        dry_run.report(golden(**sections))


@pytest.mark.parametrize(
    ("batch", "accumulation", "mesh", "processes", "count"),
    [
        (16, 1, {}, 1, 4),
        (8, 4, {}, 1, 2),
        (6, 1, {}, 1, 3),
        (1, 1, {}, 1, 1),
        (7, 1, {}, 1, 1),
        (8, 1, {"local": 2}, 1, 4),  # data=2
        (6, 1, {"local": 2}, 1, 2),
        (8, 1, {"local": 8}, 1, 8),  # more than cores
        (8, 1, {"data": 8}, 1, 8),
        (8, 1, {"tensor": 2}, 1, 4),
        (16, 1, {}, 2, 4),
        (8, 1, {"node": 2}, 2, 4),
        (8, 1, {"node": 2, "data": 1}, 2, 1),
    ],
)
def test_devices_follow_batch_and_mesh(monkeypatch, batch, accumulation, mesh, processes, count):
    monkeypatch.setattr(devices, "cores", lambda: 4)
    monkeypatch.setattr(devices, "force_devices", lambda n: None)
    cfg = Config(
        data=dataclasses.replace(Config().data, vocab_size=300),
        mesh=MeshConfig(**mesh),
        train=TrainConfig(batch_size=batch, grad_accumulation=accumulation),
    )
    assert devices.devices_of_run(cfg, processes) == count
