"""Bytes per device by hand, from the published models' dimensions, and as the state's shardings have them."""

import dataclasses
import importlib
import math

import jax
import pytest

from deepseek_jax.config import from_config_dict
from deepseek_jax.parallel.mesh import abstract_mesh, make_mesh
from deepseek_jax.training.state import state_shardings
from experiments import plan
from experiments.command_line import status
from experiments.study.memory import Memory, state_memory
from tests.tiny_run import fresh_state, tiny


def shipped(name, accumulation=1, precision="bf16", **mesh):
    cfg = from_config_dict(importlib.import_module(f"configs.{name}").get_config())
    return dataclasses.replace(
        cfg,
        mesh=dataclasses.replace(cfg.mesh, **{"schedule": "auto"} | mesh),
        train=dataclasses.replace(cfg.train, grad_accumulation=accumulation),
        precision=precision,
    )


def planned(cfg, devices):
    found = state_memory(cfg, abstract_mesh(cfg.mesh, devices))
    return found["dense"], found["experts"]


# V2-Lite: 26 MoE layers of 64 experts; a norm pair and a latent norm per layer; the gate is read in float32.
LITE, LITE_EXPERTS = 15_706_484_224, 26 * 64 * 3 * 2048 * 1408
# Joined in BF16 for a step: gate and up, of the experts and of dense layer and shared experts.
LITE_JOINED, LITE_DENSE_JOINED = 2 * LITE_EXPERTS * 2 // 3, 2 * 2 * 2048 * (10944 + 26 * 2 * 1408)
LITE_NORMS, LITE_GATES = 27 * (2 * 2048 + 512) + 2048, 26 * 2048 * 64


def test_twelve_bytes_per_parameter_on_one_device():
    """Master weight 4, moments 2 + 2, gradient 4; weights are cast where they are used, but for those that are joined."""
    dense, experts = planned(shipped("v2_lite_16b", zero=False, local=1), 1)
    assert (dense.between_steps + experts.between_steps) == 8 * LITE
    assert (dense.in_step + experts.in_step) == 12 * LITE + LITE_JOINED + LITE_DENSE_JOINED
    assert experts == Memory(4 * LITE_EXPERTS, 4 * LITE_EXPERTS, LITE_JOINED, 4 * LITE_EXPERTS, 0, 0)
    dense, experts = planned(shipped("v2_lite_16b", 4, zero=False, local=1), 1)
    assert (dense.accumulated, experts.accumulated) == (4 * (LITE - LITE_EXPERTS), 4 * LITE_EXPERTS)


def test_v2_lite_over_eight_devices():
    dense, experts = planned(shipped("v2_lite_16b"), 8)
    rest = LITE - LITE_EXPERTS
    held = (rest - LITE_NORMS) // 8 + LITE_NORMS
    read = 2 * (rest - LITE_NORMS - LITE_GATES) + 4 * LITE_GATES
    assert dense == Memory(4 * held, 4 * held, read, read + 4 * LITE_NORMS, 0, 4 * (held - LITE_NORMS))
    eighth = 4 * LITE_EXPERTS // 8  # spread over local; with one replica there is nothing else to divide
    assert experts == Memory(eighth, eighth, LITE_JOINED // 8, eighth, 0, 0)


def test_v3_over_512_devices():
    """64-way expert parallelism, 8 replicas; with the MTP module."""
    dense, experts = planned(shipped("v3_671b", pipe=1, data=8), 512)
    n = 59 * 256 * 3 * 7168 * 2048
    assert experts == Memory(4 * n // 512, 4 * n // 512, 2 * n // 64, 2 * n // 64, 0, 4 * n // 512)
    norms = 62 * (2 * 7168 + 1536 + 512) + 7168 + 3 * 7168
    whole = 671_026_419_200 + 11_610_068_224 - 59 * 256 - n
    assert dense.master == 4 * ((whole - norms) // 512 + norms)
    gates = 59 * 7168 * 256
    assert dense.compute == 2 * (whole - norms - gates) + 4 * gates


def test_quantised_experts_have_two_operands():
    """One byte each, and a float32 scale per 128x128 block; gradients are float32 then."""
    _, experts = planned(shipped("v3_671b", precision="deepseek_fp8", pipe=1, data=8), 512)
    n = 59 * 4 * 3 * 7168 * 2048
    assert experts.compute == 2 * (n + 4 * n // 128**2)
    assert experts.gradients == 4 * n


def test_v3_over_2048_devices_as_dualpipe_has_it():
    """16 ranks of 128: each device reads eight slots of MoE layers, four of either stage, three of dense ones, though
    only two ranks fill these, and embedding, head and MTP module whole. The state is divided over all 2048. Gradients that are
    not sums yet: of embedding, head and MTP module, and of one layer, of which a dense one is the largest."""
    dense, experts = planned(shipped("v3_671b", 120, "deepseek_fp8"), 2048)
    one = 4 * 3 * 7168 * 2048  # of a layer, four experts of 256 per device
    n = 9 * one
    master = 59 * 64 * one // 2048
    assert experts == Memory(4 * master, 4 * master, 2 * (n + 4 * n // 128**2), 4 * one, 4 * n, 4 * master)
    of_layer = 2 * 7168 + 1536 + 512
    norms = 62 * of_layer + 7168 + 3 * 7168
    whole = 671_026_419_200 + 11_610_068_224 - 59 * 256 - 59 * 64 * one
    held = (whole - norms) // 2048 + norms
    in_slots = 12 * (2 * 7168 + 1536 + 512) + 7168 + 3 * 7168
    attention, tables = 187_107_328 - 1536 - 512, 2 * 129280 * 7168
    linear = 12 * attention + 3 * 3 * 7168 * 18432 + 9 * 3 * 7168 * 2048 + 2 * 7168 * 7168
    gates = 9 * 7168 * 256
    scales = 4 * 2 * blocks()
    norms_read = (
        4 * 11 * (2 * 7168 + 1536 + 512)
    )  # of the layers in slots, selected; the others are read as they lie
    assert dense.master == dense.moments == 4 * held
    assert dense.compute == 2 * linear + scales + 2 * tables + 4 * gates + norms_read
    end = attention + 3 * 7168 * 2048 + 2 * 7168 * 7168 + 7168 * 256 + of_layer + 7168 + 3 * 7168
    assert dense.gradients == 4 * (end + attention + 3 * 7168 * 18432 + of_layer) + 2 * tables
    assert dense.accumulated == 4 * (linear + gates + in_slots + tables)
    layer_norms = norms - (7168 + 3 * 7168) - (2 * 7168 + 1536 + 512)
    assert dense.scattered == 4 * ((whole - norms) // 2048 + layer_norms)


def blocks():
    """Scales of one operand of all linear weights but experts: 128x128 blocks, the last ones part of one."""
    attention = [(7168, 1536), (1536, 128 * 192), (7168, 576), (512, 128 * 256), (128 * 128, 7168)]
    mlp = {width: 2 * [(7168, width)] + [(width, 7168)] for width in (18432, 2048)}
    count = [
        sum(math.ceil(a / 128) * math.ceil(b / 128) for a, b in m) for m in (attention, mlp[18432], mlp[2048])
    ]
    return 12 * count[0] + 3 * count[1] + 9 * count[2] + 112 * 56


@pytest.mark.parametrize("zero", [False, True])
def test_as_the_state_lies(zero):
    cfg = tiny(mesh={"data": 2, "node": 2, "local": 2, "zero": zero})
    state = jax.eval_shape(lambda: fresh_state(cfg))
    shardings = state_shardings(cfg, make_mesh(cfg.mesh, jax.devices()))

    def on_one(name):
        pairs = zip(*(jax.tree.leaves(getattr(x, name)) for x in (state, shardings)), strict=True)
        return sum(math.prod(s.shard_shape(x.shape)) * x.dtype.itemsize for x, s in pairs)

    dense, experts = planned(cfg, 8)
    assert dense.master + experts.master == on_one("params")
    assert dense.moments + experts.moments == on_one("opt_state") - 4  # its count of updates


# --- the command --------------------------------------------------------------------------------------------------


def test_the_command(capsys):
    arguments = ["--config=configs/v2_lite_16b.py", "--config.train.grad_accumulation=1", "--devices=16"]
    assert plan.main(["memory", *arguments]) == 0
    out = capsys.readouterr().out
    assert "16 device(s): data=2 x local=8; zero=True, precision=bf16" in out
    dense, experts = planned(shipped("v2_lite_16b"), 16)
    [line] = [x for x in out.splitlines() if "between steps" in x]
    want = [dense.between_steps, experts.between_steps, dense.between_steps + experts.between_steps]
    assert [float(x) for x in line.split()[2:]] == [round(x / 2**30, 2) for x in want]
    assert "accumulated" not in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--devices=12"], "needs 8 devices and 12 are at hand, no multiple of 8; change"),
        (["--config.mesh.data=3"], "no dim divides over the 24 devices of data=3 x local=8"),
        (["--config.mesh.local=128"], "64 of 'expert' do not divide over 128 devices of local=128"),
        (["--config=configs/nope.py"], "No such file or directory: 'configs/nope.py'"),
        (["more"], "unexpected arguments ['more']"),
    ],
)
def test_mistakes(arguments, message, capsys):
    assert status(plan.main, ["memory", "--config=configs/v2_lite_16b.py", *arguments]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and message in err and err.count("\n") == 1
