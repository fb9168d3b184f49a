"""Stages: splits of published and of tiny models against all splits there are, and which rank holds what."""

import dataclasses
import itertools

import numpy as np
import pytest
from absl import flags

from deepseek_jax.config import MeshConfig, ModelConfig, from_config_dict
from deepseek_jax.parallel.pipeline.stages import Content, Held, Stage, costs, stages
from experiments import config_flag
from tests.tiny_run import tiny

V3 = ModelConfig()


def sizes(cfg, n):
    return [len(stage.dense) + len(stage.moe) for stage in stages(cfg, n)]


def model(layers, dense, mtp, **changes):
    named = {"num_hidden_layers": layers, "first_k_dense_replace": dense, "num_nextn_predict_layers": mtp}
    return dataclasses.replace(tiny().model, **(named | changes))


# --- splits -------------------------------------------------------------------------------------------------------


def test_v3():
    """By hand, matrix elements per token, half of the scores masked: attention 187,105,280 + 2048 keys of 128 heads
    192 + 128 wide; a dense FFN 396,361,728; nine experts and the gate; head and projection of the MTP module. What comes
    after the last layer costs 3.92 layers, so over 16 stages the last has one."""
    attention = 187_105_280 + 2048 * 128 * 320
    dense, moe, head = attention + 396_361_728, attention + 9 * 44_040_192 + 1_835_008, 926_679_040
    layers, last = costs(V3)
    assert layers == [6 * dense] * 3 + [6 * moe] * 58 and last == 6 * (2 * head + moe + 102_760_448)
    assert 3.92 < last / layers[-1] < 3.93
    assert sizes(V3, 16) == [4] * 15 + [1]
    assert sizes(V3, 8) == [8] * 7 + [5]
    assert sizes(V3, 4) == [16] * 3 + [13]
    assert sizes(V3, 2) == [32, 29]
    assert sizes(V3, 1) == [61]
    assert stages(V3, 16)[0] == Stage(range(3), range(1), True, False)
    assert stages(V3, 16)[-1] == Stage(range(3, 3), range(57, 58), False, True)


SPLITS = [
    (model(4, 1, 1), 2),
    (model(4, 1, 1), 4),
    (model(4, 1, 0), 6),
    (model(3, 1, 1), 8),
    (model(1, 0, 0), 4),
    (model(7, 3, 0, vocab_size=16), 3),
    (model(8, 0, 0, vocab_size=16), 3),
    (model(6, 6, 0, n_routed_experts=0), 4),
    (model(5, 2, 2, vocab_size=4096), 3),
]


@pytest.mark.parametrize(("cfg", "n"), SPLITS)
def test_no_split_is_better(cfg, n):
    """Of all splits: the smallest largest stage, then the fewest layers at the ends, then the most even one."""
    layers, last = costs(cfg)

    def badness(cuts):
        runs = [layers[i:j] for i, j in itertools.pairwise([0, *cuts, len(layers)])]
        cost = [sum(run) for run in runs]
        cost[-1] += last
        return max(cost), len(runs[0]) + len(runs[-1]), sum(c * c for c in cost)

    best = min(map(badness, itertools.combinations_with_replacement(range(len(layers) + 1), n - 1)))
    found = stages(cfg, n)
    assert badness(np.cumsum(sizes(cfg, n))[:-1]) == best
    assert [i for stage in found for i in stage.dense] == list(range(cfg.first_k_dense_replace))
    assert [i for stage in found for i in stage.moe] == list(range(cfg.num_moe_layers))
    assert [stage.first for stage in found] == [True] + [False] * (n - 1)
    assert [stage.last for stage in found] == [False] * (n - 1) + [True]


def test_a_split_by_hand():
    dense_and_moe, none, rest = stages(model(4, 2, 1), 3, (3, 0, 1))
    assert dense_and_moe == Stage(range(2), range(1), True, False)
    assert not none.dense and not none.moe and not none.first and not none.last
    assert rest == Stage(range(2, 2), range(1, 2), False, True)


@pytest.mark.parametrize("layers", [(2, 2), (2, 1, 2), (1, 1, 1), (5, -1, 0)])
def test_numbers_that_are_no_split(layers):
    said = f"{len(layers)} stages of {sum(layers)} layers in all, and the model has 4 layers on 3 stages"
    with pytest.raises(ValueError, match=rf"mesh.stage_layers=.*: {said}; give 3 numbers"):
        stages(model(4, 2, 1), 3, layers)


def test_stage_layers_in_a_config():
    """From the command line, a file and JSON."""
    for text in ("4,0,3", "(4, 0, 3)", "[4, 0, 3]"):
        argv = [f"--config.mesh.stage_layers={text}"]
        assert config_flag.parse(argv, "configs/tiny.py", flags.FlagValues()).mesh.stage_layers == (4, 0, 3)
    assert from_config_dict({"mesh": {"stage_layers": [4, 0, 3]}}).mesh == MeshConfig(stage_layers=(4, 0, 3))
    for text in ("4,x", "('4', '0')", "4.5"):
        with pytest.raises(ValueError, match=r"mesh.stage_layers.* should be (a )?tuple"):
            config_flag.parse([f"--config.mesh.stage_layers={text}"], "configs/tiny.py", flags.FlagValues())
    with pytest.raises(ValueError, match=r"mesh.stage_layers=\(4, -1\) must be numbers of layers >= 0"):
        MeshConfig(stage_layers=(4, -1))


# --- what a rank holds --------------------------------------------------------------------------------------------


def test_which_stage_is_where():
    def numbers(n, ranks, chunks):
        held = Held(stages(V3, n), ranks, chunks)
        return [[held.stage_number(r, c) for c in range(chunks)] for r in range(ranks)]

    assert numbers(4, 4, 1) == [[0], [1], [2], [3]]
    assert numbers(4, 4, 2) == [[0, 3], [1, 2], [1, 2], [0, 3]]  # DualPipe
    assert numbers(8, 4, 2) == [[0, 7], [1, 6], [2, 5], [3, 4]]  # DualPipeV
    assert numbers(2, 1, 2) == [[0, 1]]


@pytest.mark.parametrize(("n", "ranks", "chunks"), [(3, 3, 2), (4, 2, 1), (6, 4, 2), (4, 4, 3)])
def test_numbers_that_do_not_fit(n, ranks, chunks):
    with pytest.raises(
        ValueError, match=f"{n} stages in {chunks} chunks per rank do not fit mesh.pipe={ranks}"
    ):
        Held(stages(V3, n), ranks, chunks)


def test_slots_of_v3_under_dualpipe():
    """Ranks 0 and 15 alone have dense layers, one MoE layer with them, and the single one of the last stage; the others
    four and four."""
    held = Held(stages(V3, 16), 16, 2)
    assert held.slots == {"dense_layers": (3, 0), "moe_layers": (4, 4)}
    assert held.layers["dense_layers"].tolist() == [[0, 1, 2], *[[-1] * 3] * 14, [0, 1, 2]]
    moe = held.layers["moe_layers"]
    assert moe.dtype == np.int32 and moe.shape == (16, 8)
    assert moe[0].tolist() == [0, -1, -1, -1, 57, -1, -1, -1]
    assert moe[7].tolist() == [25, 26, 27, 28, 29, 30, 31, 32]
    np.testing.assert_array_equal(moe, moe[::-1])
    assert held.chunk_slots("moe_layers", 1) == slice(4, 8) and held.chunk_slots("dense_layers", 1) == slice(
        3, 3
    )
    outer, inner = [0, 15], range(1, 15)
    for chunk, content in enumerate((Content(3, 1, True, False), Content(0, 1, False, True))):
        assert [held.content(rank, chunk) for rank in outer] == [content] * 2
        assert [held.content(rank, chunk) for rank in inner] == [Content(0, 4, False, False)] * 14


@pytest.mark.parametrize(("cfg", "ranks"), SPLITS)
@pytest.mark.parametrize("chunks", [1, 2])
def test_slots_hold_the_stages(cfg, ranks, chunks):
    """Every layer as often as its stage, in the slots of its chunk, in order; content and stage agree."""
    both_ways = chunks == 2 and ranks % 2 == 0
    held = Held(stages(cfg, ranks if chunks == 1 or both_ways else 2 * ranks), ranks, chunks)
    for kind, total in (("dense_layers", cfg.first_k_dense_replace), ("moe_layers", cfg.num_moe_layers)):
        table = held.layers[kind]
        assert np.bincount(table[table >= 0], minlength=total).tolist() == [2 if both_ways else 1] * total
        for rank, chunk in itertools.product(range(held.num_ranks), range(chunks)):
            slots = table[rank, held.chunk_slots(kind, chunk)]
            assert slots[slots >= 0].tolist() == list(held.numbers(kind, rank, chunk))
            assert (slots >= 0).tolist() == sorted(slots >= 0, reverse=True)
            stage = held.stages[held.stage_number(rank, chunk)]
            assert held.content(rank, chunk) == Content(
                len(stage.dense), len(stage.moe), stage.first, stage.last
            )
