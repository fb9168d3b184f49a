"""A step of serving on paper: DeepSeek's published day by hand, and as times have to change with what a step is given."""

import dataclasses

import pytest

from deepseek_jax.config import ModelConfig
from experiments.planning import serving_links
from experiments.planning.hardware import H100, H200, H800, Gemm
from experiments.planning.serving_times import decode_step, prefill_step
from experiments.planning.units import Unit

V3 = ModelConfig()
EP144 = Unit(nodes=18, experts=2)
PREFILL = Unit(nodes=4, experts=9)
ROWS, CONTEXT = 88, 4989  # of DeepSeek's day: 84 to 92 requests of a GPU, tokens of a sequence in the mean

# What a hand count takes: products wait for weights alone, which are read at 3 TB/s.
FREE = Gemm(1e30, 1e30, 1e30)
BY_HAND = dataclasses.replace(
    H800,
    few_rows=3e12,
    passes=1e30,
    linear=dict.fromkeys(H800.linear, FREE),
    grouped=dict.fromkeys(H800.grouped, FREE),
)
ATTENTION, EXPERT, GATE, HEAD = 187_105_280, 44_040_192, 1_835_008, 129_280 * 7168
UP = 512 * 128 * 256  # the up-projections of latents, absorbed in BF16


def ms(part):
    return 1e3 * part.seconds


def test_weights_that_a_decode_step_reads():
    """22.1 GB by a byte per weight of attention, dense MLPs and experts, two per weight of the head; the router in float32 and
    the absorbed up-projections in BF16 come on top."""
    scales = 1 + 4 / 128**2
    linear = 61 * (ATTENTION - UP) + 3 * 3 * 7168 * 18432 + 58 * 3 * EXPERT
    step = decode_step(V3, EP144, H800, ROWS, CONTEXT)
    assert step.total.read == pytest.approx(
        scales * linear + 61 * 2 * UP + 58 * 4 * GATE + 2 * HEAD, rel=1e-12
    )
    assert (linear + 61 * UP + 2 * HEAD) / 1e9 == pytest.approx(22.1, abs=0.05)


def test_latents_and_attention_by_hand():
    """0.351 GB per request: 10.3 ms at 3 TB/s; 2 x 128 heads x (576 + 512) FLOPs per pair: 11.3 ms at 660 TFLOPS."""
    core = decode_step(V3, EP144, H800, ROWS, CONTEXT)["attention core"]
    assert core.latents / ROWS / 1e9 == pytest.approx(0.351, abs=5e-4)
    assert 1e3 * core.latents / 3e12 == pytest.approx(10.3, abs=0.05)
    assert core.flops == 61 * ROWS * CONTEXT * 2 * 128 * (576 + 512)
    assert ms(core) == pytest.approx(11.3, abs=0.05)


def test_exchange_of_deepseek_s_day():
    """88 tokens x 8 rows of 7,408 and 14,336 bytes in 58 layers: 7.8 and 14.8 ms at about 39 GB/s."""
    step = decode_step(V3, EP144, H800, ROWS, CONTEXT)
    assert step["dispatch"].nic == 58 * ROWS * 8 * 7408 and step["combine"].nic == 58 * ROWS * 8 * 14336
    assert ms(step["dispatch"]) == pytest.approx(7.8, rel=0.02)
    assert ms(step["combine"]) == pytest.approx(14.8, rel=0.02)


def test_serial_and_overlapped_step_of_deepseek_s_day():
    """About 41 ms one after the other; 26 ms where weights are read twice and the exchange is hidden. What our step reads
    beyond the count, router and absorbed weights, is taken out."""
    more = (58 * 4 * GATE + 61 * UP) / 3e12
    step = decode_step(V3, EP144, BY_HAND, ROWS, CONTEXT)
    assert 1e3 * (step.serial - more) == pytest.approx(41.3, rel=0.01)
    assert 1e3 * (step.halves[0] - 2 * more) == pytest.approx(26.0, rel=0.01)
    assert ROWS / (step.halves[0] - 2 * more) == pytest.approx(3380, rel=0.01)


def test_flops_of_a_prefill():
    """83.5 GFLOP per token at 4,096 tokens, of which prefill leaves out the logits: 4,030 tokens/s are 336 TFLOPS."""
    step = prefill_step(V3, PREFILL, H800, 16384, 0, sequences=4)
    per_token = (step.total.flops - step["head"].flops) / 16384 + 2 * HEAD
    assert per_token / 1e9 == pytest.approx(83.5, abs=0.05)
    assert 4030 * per_token / 1e12 == pytest.approx(336, abs=1)


@pytest.mark.parametrize(("devices", "dispatch", "combine"), [(8, 98, 127), (64, 43, 46), (256, 39, 40)])
def test_the_exchange_for_few_tokens_is_that_of_the_table(devices, dispatch, combine):
    """GB/s as DeepEP printed them beside its microseconds, of whose quotient they are within 2.5%."""
    unit = Unit(nodes=devices // 8)
    for way, rate in (("dispatch", dispatch), ("combine", combine)):
        t = serving_links.trip(V3, unit, H800, 128, way, few=True)
        assert (t.nvlink + t.nic) / t.seconds / 1e9 == pytest.approx(rate, rel=0.025)


def test_a_size_between_those_of_the_table():
    found = serving_links.between({8: (1.0, 2.0), 32: (3.0, 6.0)}, 16, 1)
    assert found == pytest.approx(4.0)  # half way by the logarithm
    assert serving_links.between(serving_links.MANY, 144, 0) == 51


def test_prefill_tokens_cross_to_at_most_three_other_nodes():
    """Four groups of experts of eight, two to a node of four: 2 to 4 nodes for a token, so 1.5 to 3 others."""
    nodes, forwarded = serving_links.rows_of(V3, PREFILL)
    assert 2 < nodes < 4
    assert nodes - 1 < forwarded < 7.5  # devices but those where the first hop came
    t = serving_links.trip(V3, PREFILL, H800, 1000, "combine", few=False)
    assert t.nic == pytest.approx(0.75 * nodes * 1000 * 14336)
    assert nodes * 1000 * 14336 / t.seconds == pytest.approx(57e9)


def test_two_micro_batches_cost_weights_and_hide_the_exchange():
    step = decode_step(V3, EP144, H800, ROWS, CONTEXT)
    arithmetic, exchange = step.halves
    assert exchange == pytest.approx(step["dispatch"].seconds + step["combine"].seconds)
    assert arithmetic > step.serial - exchange  # weights twice
    assert max(step.halves) <= step.overlapped <= arithmetic + exchange
    few = decode_step(V3, EP144, H800, 4, CONTEXT)
    assert few.seconds == few.serial < few.overlapped  # weights twice, nothing to hide


def test_drafts_double_rows_but_not_latents():
    plain, drafts = (
        decode_step(V3, dataclasses.replace(EP144, drafts=d), H800, ROWS, CONTEXT) for d in (False, True)
    )
    assert drafts["attention core"].latents == plain["attention core"].latents
    assert drafts["attention core"].flops == 2 * plain["attention core"].flops
    assert drafts["dispatch"].nic == pytest.approx(plain["dispatch"].nic * (2 * 58 + 1) / 58)
    assert drafts["MTP"].latents == pytest.approx(plain["attention core"].latents / 61)
    assert drafts["MTP"].read > 2 * HEAD and "MTP" not in plain.parts


def test_fp8_latents_and_a_faster_memory():
    small = decode_step(V3, dataclasses.replace(EP144, fp8_latents=True), H800, ROWS, CONTEXT)
    big = decode_step(V3, EP144, H800, ROWS, CONTEXT)
    assert small["attention core"].latents / big["attention core"].latents == pytest.approx(656 / 1152)
    assert (
        decode_step(V3, EP144, H200, ROWS, CONTEXT).serial
        < decode_step(V3, EP144, H100, ROWS, CONTEXT).serial
    )


def test_a_shared_expert_that_is_routed_travels():
    """EP320: a ninth row of each token, one expert per device, no shared one whole on every device."""
    step = decode_step(V3, Unit(nodes=40, experts=1, shared_routed=True), H800, ROWS, CONTEXT)
    assert "shared expert" not in step.parts
    assert step["routed experts"].read == pytest.approx(58 * EXPERT * (1 + 4 / 128**2))
    assert step["routed experts"].flops == pytest.approx(58 * 2 * ROWS * 9 * EXPERT)
    assert step["dispatch"].nic == 58 * ROWS * 9 * 7408


def test_a_prefix_costs_attention_alone():
    cold, warm = (prefill_step(V3, PREFILL, H800, 4096, prefix, 1) for prefix in (0, 4096))
    pairs, expanded = 61 * 2 * 128 * 320 * 4096 * 2048, 61 * 2 * 4096 * UP
    assert cold["attention core"].flops == pairs + expanded
    assert warm["attention core"].flops == 3 * pairs + 2 * expanded
    for name in set(cold.parts) - {"attention core"}:
        assert warm[name] == cold[name]


def test_tensor_parallel_prefill_divides_weights_and_sends_latents():
    unit = Unit(nodes=4, local=2, tensor=4, experts=9)
    step, whole = prefill_step(V3, unit, H800, 4096, 0), prefill_step(V3, PREFILL, H800, 4096, 0)
    assert step["attention over tensor"].nvlink == 61 * 3 * 4096 * (1536 + 576 + 7168) * 2
    assert step["attention projections"].flops == pytest.approx(whole["attention projections"].flops)
    assert step["attention projections"].read < whole["attention projections"].read / 2


def test_this_project_s_exchange_sends_places_for_all_nodes():
    house = decode_step(V3, dataclasses.replace(EP144, house=True), H800, ROWS, CONTEXT)
    row = 7168 + 4 * 56 + 2 * 4 * 8  # token, scales, weights and ids of 8 experts
    assert house["dispatch"].nic == pytest.approx(58 * ROWS * 17 * row)
