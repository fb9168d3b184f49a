"""What a deployment unit holds and takes on paper: DeepSeek's units by hand, and as figures have to change with the config."""

import dataclasses
import importlib

import pytest

from deepseek_jax.config import MeshConfig
from deepseek_jax.serving.deployment import Deployment, from_config_dict
from experiments import plan
from experiments.command_line import status
from experiments.planning.hardware import GIB, H100, H200, H800
from experiments.planning.serving_prediction import predict
from experiments.planning.serving_weights import page_bytes, weight_bytes


def shipped(name, **changes):
    unit = from_config_dict(importlib.import_module(f"configs.serve_{name}").get_config())
    return dataclasses.replace(unit, **changes)


EP144, EP320, PREFILL = shipped("decode_ep144"), shipped("decode_ep320"), shipped("prefill_ep32")
ATTENTION = (7168, 1536), (7168, 576), (1536, 24576), (16384, 7168)  # without the absorbed up-projections
EXPERT = ((7168, 2048),) * 2 + ((2048, 7168),)


def in_fp8(*shapes):
    """A byte per weight, and four per block of 128 x 128, begun ones too."""
    return sum(a * b + 4 * -(-a // 128) * -(-b // 128) for a, b in shapes)


def test_weights_of_a_device_by_hand():
    assert weight_bytes(EP144) == {
        "attention and norms": 61
        * (in_fp8(*ATTENTION) + 2 * 512 * 128 * 256 + 2 * (1536 + 512) + 2 * 2 * 7168),
        "dense MLPs": 3 * in_fp8((7168, 18432), (7168, 18432), (18432, 7168)),
        "routers": 58 * 4 * 7168 * 256,
        "shared experts": 58 * in_fp8(*EXPERT),
        "routed experts": 58 * 2 * in_fp8(*EXPERT),
        "embedding and head": 2 * (2 * 129_280 * 7168 + 7168),
    }


def test_a_shared_expert_that_is_routed_lies_nowhere_whole():
    """One expert of 320 on a device, and no shared one."""
    found = weight_bytes(EP320)
    assert "shared experts" not in found and found["routed experts"] == 58 * in_fp8(*EXPERT)


def test_the_module_that_drafts_has_its_experts_and_latents():
    plain, drafts = weight_bytes(EP144), weight_bytes(dataclasses.replace(EP144, drafts=True))
    assert drafts["MTP module"] > in_fp8((2 * 7168, 7168), *EXPERT * 3, *ATTENTION)
    assert {name: n for name, n in drafts.items() if name != "MTP module"} == plain
    assert page_bytes(dataclasses.replace(EP144, drafts=True)) == 64 * 576 * 2 * 62


def test_pages_and_requests_by_hand():
    """A page of BF16 latents is 64 x 576 x 2 bytes in 61 layers, of FP8 ones 656 for a token; 4,989 tokens take 78."""
    p = predict(EP144, H800, 4989, 0, 0.85)
    assert p.memory.page == 64 * 70_272 and p.memory.pages == p.memory.free // p.memory.page
    assert p.memory.requests(4989) == p.memory.pages // 78 and p.requests == EP144.rows
    small = predict(dataclasses.replace(EP144, cache="fp8"), H800, 4989, 0, 0.85)
    assert small.memory.page == 64 * 656 * 61
    few = predict(dataclasses.replace(EP144, pages=1000), H800, 4989, 0, 0.85)
    assert (few.memory.pages, few.requests) == (1000, 12)


def test_what_does_not_fit_says_so(capsys):
    """In BF16, experts and attention alone are 80 GB of a prefill device; an H200 has room."""
    big = dataclasses.replace(PREFILL, weights="bf16")
    assert not predict(big, H100, 4989, 0, 0.85).memory.fits and predict(big, H200, 4989, 0, 0.85).memory.fits
    plan.main(["serve", "--config=configs/serve_prefill_ep32.py", "--config.weights=bf16"])
    assert "DOES NOT FIT" in capsys.readouterr().out


def test_tokens_per_second_follow_from_the_step():
    [step] = predict(dataclasses.replace(EP144, drafts=True), H800, 4989, 0, 0.5).steps
    assert step.tokens == 96 * 1.5 and step.per_second(0.05) == 96 * 1.5 / 0.05
    [prefill] = predict(PREFILL, H800, 4096, 0, 0.5).steps
    assert (prefill.tokens, prefill.rows) == (8192, 2)
    [behind] = predict(PREFILL, H800, 4096, 2048, 0.5).steps
    assert behind.rows == 4 and behind.deepep["attention core"].flops > prefill.deepep["attention core"].flops


def test_a_unit_of_both_roles_has_both_steps():
    phases = [s.phase for s in predict(dataclasses.replace(PREFILL, role="both"), H200, 4096, 0, 0.85).steps]
    assert phases == ["decode", "prefill"]


@pytest.mark.parametrize("name", ["decode_ep144", "decode_ep320", "prefill_ep32", "prefill_ep32_tp4"])
def test_the_command(name, capsys):
    """Every part is there, and the measured figure beside the units that are DeepSeek's own."""
    plan.main(["serve", f"--config=configs/serve_{name}.py"])
    text = capsys.readouterr().out
    for word in (
        "memory per device",
        "fits",
        "pages of 64 tokens",
        "dispatch",
        "combine",
        "per node of 8",
        "Measured:",
    ):
        assert word in text
    assert ("DeepSeek measured" in text) == (name in ("decode_ep144", "prefill_ep32"))
    assert "nan" not in text and all(len(line) <= 132 for line in text.splitlines())


def test_mistakes_are_named(capsys):
    assert status(plan.main, ["serve", "--config.redundant=30"]) == 2
    assert "redundant=32 does" in capsys.readouterr().err
    assert status(plan.main, ["serve", "--config.row=3"]) == 2
    assert "rows" in capsys.readouterr().err
    assert status(plan.main, ["serve", "--cached=4989"]) == 2
    assert "--cached=4989" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"mesh\.data=2"):
        Deployment(mesh=MeshConfig(data=2))
    with pytest.raises(ValueError, match="do not divide over 3 devices: redundant=2 does"):
        Deployment(mesh=MeshConfig(data=1, local=3))


def test_help_and_values_are_those_of_a_unit(capsys):
    for flag, words in (("--help", "config.redundant"), ("--print_config", "redundant = 32")):
        with pytest.raises(SystemExit):
            plan.main(["serve", flag])
        assert words.removeprefix("config.") in capsys.readouterr().out


def test_usable_memory_is_what_pages_get():
    p = predict(EP144, H800, 4989, 0, 0.85)
    used = sum(p.memory.weights.values()) + p.memory.state + sum(p.memory.step.values())
    assert 0 <= p.memory.usable - used - p.memory.pages * p.memory.page < p.memory.page
    assert p.memory.usable == 76 * GIB
