"""Rows and bytes between nodes: by loops and in closed form. `test_exchange.py` has the exchange's own counts."""

import math

import numpy as np
import pytest

from deepseek_jax.config import ModelConfig
from experiments import plan
from experiments.command_line import status
from experiments.study.traffic import count_rows, routing_bytes, row_bytes, sample_rows

TOKENS = 20_000


def v3(groups, kept):
    return ModelConfig(n_routed_experts=256, num_experts_per_tok=8, n_group=groups, topk_group=kept)


def test_rows_are_those_of_the_loops():
    nodes, local, below = 4, 2, 2  # experts of a device
    rng = np.random.default_rng(1)
    ids = rng.permuted(np.tile(np.arange(nodes * local * below), (40, 1)), axis=1)[:, :3]
    ids[rng.random(ids.shape) < 0.2] = -1
    source = rng.integers(nodes * local, size=len(ids))
    rows = count_rows(ids, source, nodes * local * below, nodes, local)
    for n, (row, at) in enumerate(zip(ids, source, strict=True)):
        devices = [e // below for e in row if e >= 0]
        away = [d for d in devices if d // local != at // local]
        assert rows.per_expert[n] == len(away)
        assert rows.flat[n] == len(set(away))
        assert rows.two_hop[n] == len({d // local for d in away})
        assert rows.forwarded[n] == len({d for d in devices if d % local != at % local})


@pytest.mark.parametrize(
    ("nodes", "kept", "per_expert", "flat", "two_hop"),
    [(8, 8, 6.99, 6.71, 4.63), (8, 4, 7.01, 6.57, 3.48), (16, 4, 7.51, 7.19, 3.75)],
)
def test_two_hops_halve_what_crosses(nodes, kept, per_expert, flat, two_hop):
    """Independent figures of 20,000 sampled tokens, two decimals; both samples are within 4 standard errors."""
    rows = sample_rows(v3(nodes, kept), nodes, 8, TOKENS)
    for got, want in ((rows.per_expert, per_expert), (rows.flat, flat), (rows.two_hop, two_hop)):
        error = got.std() * math.sqrt(2 / TOKENS)
        assert abs(got.mean() - want) < 4 * error + 0.005


def test_without_a_limit_by_the_hypergeometric_distribution():
    rows = sample_rows(v3(8, 8), 8, 8, TOKENS)
    missed = [math.comb(256 - held, 8) / math.comb(256, 8) for held in (32, 4)]  # a node, a device
    for got, want in (
        (rows.per_expert, 8 * 7 / 8),
        (rows.two_hop, 7 * (1 - missed[0])),
        (rows.flat, 56 * (1 - missed[1])),
        (rows.forwarded, 56 * (1 - missed[1])),
    ):
        assert abs(got.mean() - want) < 4 * got.std() / math.sqrt(TOKENS)


def test_bytes_of_a_row():
    assert (row_bytes(7168, "fp8"), row_bytes(7168, "bf16")) == (7168 + 56 * 4, 14336)
    assert row_bytes(130, "fp8_ue8m0") == 130 + 8 and routing_bytes(8) == 32


def test_the_command(capsys):
    arguments = ["exchange", "--mesh", "4x2", "--experts", "32", "--topk", "4", "--topk_groups", "2"]
    assert plan.main([*arguments, "--hidden", "1024", "--tokens", "4000"]) == 0
    out = capsys.readouterr().out
    rows = sample_rows(
        ModelConfig(n_routed_experts=32, num_experts_per_tok=4, n_group=4, topk_group=2), 4, 2, 4000
    )
    mean = rows.two_hop.mean()
    fp8, bf16 = mean * (1024 + 8 * 4) / 1024, mean * 2
    [line] = [x for x in out.splitlines() if "two hops)" in x]
    assert f"{mean:.2f} ±" in line and f"{fp8:.1f}" in line and line.endswith(f"{bf16:.1f}")
    assert "32 experts, 4 per token, from 2 of 4 groups" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mesh", "3x8"], "n_routed_experts=256 must be divisible by n_group=3"),
        (["--mesh", "8x7"], "n_routed_experts=256 do not divide over 8 nodes x 7 devices; change the mesh"),
        (["--mesh", "4x8", "--topk_groups", "5"], "topk_group=5 must lie in"),
    ],
)
def test_mistakes(arguments, message, capsys):
    assert status(plan.main, ["exchange", *arguments, "--tokens", "10"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and message in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mesh", "4y8"], "'4y8' is not NODESxLOCAL, such as 8x8"),
        (["--tokens", "0"], "--tokens=0 must be at least 2"),
    ],
)
def test_malformed_arguments(arguments, message, capsys):
    assert status(plan.main, ["exchange", *arguments]) == 2
    assert message in capsys.readouterr().err
