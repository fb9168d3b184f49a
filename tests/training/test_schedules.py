"""The report's schedules at every boundary, both sides, for the 14.8T run and for short ones."""

import itertools
import math

import optax
import pytest

from deepseek_jax.config import OptimizerConfig, TrainConfig
from deepseek_jax.training.schedules import REPORT_STEPS, Schedules

T = 10**12
FULL = 14_800_000_000_000


@pytest.fixture(scope="module")
def report() -> Schedules:
    return Schedules(OptimizerConfig(), TrainConfig(batch_size=15360), FULL, 4096)


def short(steps: int, granularity: int = 1, **optimizer) -> Schedules:
    config = OptimizerConfig(**{"batch_start": 4, **optimizer})
    return Schedules.of_steps(config, TrainConfig(steps=steps, batch_size=16), 256, granularity)


def test_lr_warms_up_linearly_from_zero_in_2000_steps(report):
    assert report.warmup_steps == 2000
    assert report.lr(0, 0) == 0.0
    assert report.lr(1000, 10**10) == pytest.approx(1.1e-4, rel=1e-12)
    assert report.lr(1999, 2 * 10**10) == pytest.approx(2.2e-4 * 1999 / 2000, rel=1e-12)
    assert report.lr(2000, 2 * 10**10) == 2.2e-4


@pytest.mark.parametrize(
    ("tokens", "lr"),
    [
        (10 * T - 1, 2.2e-4),
        (10 * T, 2.2e-4),
        (10 * T + 43 * T // 20, (2.2e-4 + 2.2e-5) / 2),  # half way of the cosine, 2.15T into it
        (10 * T + 43 * T // 40, 2.2e-5 + (2.2e-4 - 2.2e-5) * (1 + math.sqrt(0.5)) / 2),
        (14_300_000_000_000, 2.2e-5),
        (14_633_000_000_000 - 1, 2.2e-5),
        (14_633_000_000_000, 7.3e-6),
        (FULL, 7.3e-6),
    ],
)
def test_lr_at_the_token_boundaries(report, tokens, lr):
    assert report.lr(200_000, tokens) == pytest.approx(lr, rel=1e-12)


def test_lr_is_continuous_but_for_the_last_drop(report):
    # one token before the cosine's end: within its slope of the value after it
    assert report.lr(200_000, 14_300_000_000_000 - 1) == pytest.approx(2.2e-5, rel=1e-9)
    assert report.lr(200_000, 10 * T + 1) == pytest.approx(2.2e-4, rel=1e-9)
    assert report.lr(200_000, 10 * T + 10**9) < 2.2e-4


def test_mid_and_final_phases_have_the_reports_length(report):
    assert report._mid_until - report._cosine_until == 333_000_000_000
    assert report.total_tokens - report._mid_until == 167_000_000_000


def test_gamma_and_lambda_switch_exactly(report):
    assert report.gamma(0) == 0.001
    assert report.gamma(14_300_000_000_000 - 1) == 0.001
    assert report.gamma(14_300_000_000_000) == 0.0
    assert report.mtp_lambda(0) == 0.3
    assert report.mtp_lambda(10 * T - 1) == 0.3
    assert report.mtp_lambda(10 * T) == 0.1


def test_batch_ramp(report):
    ramp = 469_000_000_000
    assert report.batch_size(0) == 3072
    assert report.batch_size(ramp // 2) == (3072 + 15360) // 2
    assert report.batch_size(ramp - 1) == 15359
    assert report.batch_size(ramp) == report.batch_size(FULL) == 15360
    # rounded down to the granularity, never up
    assert report.batch_size(ramp - 1, 64) == 15360 - 64
    assert report.batch_size(ramp // 12288 * 63, 64) == 3072
    assert report.batch_size(-(-ramp * 64 // 12288), 64) == 3072 + 64
    sizes = [report.batch_size(t, 64) for t in range(0, ramp, ramp // 997)]
    assert all(a <= b for a, b in itertools.pairwise(sizes)) and all(b % 64 == 0 for b in sizes)


def test_report_steps_is_the_length_of_the_report_run(report):
    assert report.num_steps() == REPORT_STEPS


@pytest.mark.parametrize("total", [1, 255, 10**6, 1_172_480, 30_000_017])
@pytest.mark.parametrize("granularity", [1, 2, 4])
def test_plan_consumes_the_tokens_and_num_steps_is_its_length(total, granularity):
    schedules = Schedules(OptimizerConfig(batch_start=4), TrainConfig(batch_size=16), total, 256)
    plan = list(schedules.plan(granularity))
    assert [p.step for p in plan] == list(range(len(plan)))
    for before, after in itertools.pairwise(plan):
        assert after.tokens == before.tokens + before.batch_size * 256
    assert plan[-1].tokens < total <= plan[-1].tokens + plan[-1].batch_size * 256
    assert schedules.num_steps(granularity) == len(plan)
    # resumed in the middle, the plan goes on as it would have
    middle = plan[len(plan) // 2]
    assert list(schedules.plan(granularity, middle.step, middle.tokens)) == plan[middle.step :]


@pytest.mark.parametrize("granularity", [1, 2, 4])
def test_of_steps_makes_a_run_of_exactly_that_many_steps(granularity):
    for steps in [*range(1, 40), 300, 1001]:
        assert short(steps, granularity).num_steps(granularity) == steps


def test_a_short_run_scales_every_boundary():
    s = short(300)
    total = s.total_tokens
    assert s._constant_until == pytest.approx(total * 10 / 14.8, abs=1)
    assert s.lr(100, s._constant_until) == 2.2e-4
    assert s.lr(290, s._cosine_until) == 2.2e-5
    assert s.lr(290, s._mid_until - 1) == 2.2e-5
    assert s.lr(290, s._mid_until) == 7.3e-6
    assert (s.gamma(s._cosine_until - 1), s.gamma(s._cosine_until)) == (0.001, 0.0)
    assert (s.mtp_lambda(s._constant_until - 1), s.mtp_lambda(s._constant_until)) == (0.3, 0.1)
    assert (s.batch_size(s._batch_ramp - 1), s.batch_size(s._batch_ramp)) == (15, 16)


def test_warmup_of_shorter_runs():
    # never longer than asked for, at least 20 steps or a tenth, else the report's fraction of the run
    assert short(300).warmup_steps == 20
    assert short(300, warmup_steps=7).warmup_steps == 7
    assert short(50).warmup_steps == 5
    assert short(1).warmup_steps == 1
    assert short(20_000).warmup_steps == pytest.approx(2000 * 20_000 / REPORT_STEPS, abs=1)
    assert short(300, warmup_steps=0).lr(0, 0) == 2.2e-4


def test_longer_runs_keep_the_warmup():
    longer = Schedules(OptimizerConfig(), TrainConfig(batch_size=15360), 2 * FULL, 4096)
    assert longer.warmup_steps == 2000
    assert longer.lr(2000, 0) == 2.2e-4
    assert longer.mtp_lambda(20 * T - 1) == 0.3 and longer.mtp_lambda(20 * T) == 0.1


def test_hyper_holds_float32_scalars(report):
    hyper = report.hyper(1000, 10**10)
    assert [v.dtype.name for v in hyper[:3]] == ["float32"] * 3 and all(v.shape == () for v in hyper[:3])
    assert hyper.micro_batches is None
    assert [float(v) for v in hyper[:3]] == pytest.approx([1.1e-4, 0.001, 0.3], rel=1e-6)


@pytest.mark.parametrize(
    ("optimizer", "train", "total", "message"),
    [
        ({"batch_start": 4}, {}, 0, "total_tokens=0"),
        ({"batch_start": 4, "schedule_tokens": 0.0}, {}, 1000, "schedule_tokens=0.0 must be positive"),
        ({"batch_start": 4, "cosine_until_tokens": 1e12}, {}, 1000, "must not decrease"),
    ],
)
def test_mistakes_are_named(optimizer, train, total, message):
    with pytest.raises(ValueError, match=message):
        Schedules(OptimizerConfig(**optimizer), TrainConfig(**train), total, 256)


@pytest.mark.parametrize(("start", "granularity", "first"), [(3072, 1, 16), (0, 4, 16), (7, 4, 4), (3, 4, 4)])
def test_the_batch_starts_where_it_can(start, granularity, first):
    """No ramp from more than the full batch; a start that the devices do not divide is rounded down."""
    schedules = short(20, granularity, batch_start=start)
    sizes = [plan.batch_size for plan in schedules.plan(granularity)]
    assert sizes[0] == first and sizes[-1] == 16 and len(sizes) == 20
    assert len(sizes) == schedules.num_steps(granularity)


def test_one_micro_batch_has_no_ramp():
    schedules = short(20, 16, batch_start=8)
    assert not schedules.ramps(16) and schedules.ramps(8) and schedules.batch_size(0, 16) == 16


# --- simple schedules ---------------------------------------------------------------------------------------


def simple(schedule: str, steps: int = 1000, **optimizer) -> Schedules:
    settings = {"peak_lr": 1e-3, "warmup_steps": 100, "final_fraction": 0.05, "batch_start": 4}
    return short(steps, schedule=schedule, **settings | optimizer)


def test_constant_and_wsd_in_closed_form():
    constant, wsd = simple("constant"), simple("wsd", decay_fraction=0.3)
    for step in range(1001):
        warm = min(1.0, step / 100)
        assert constant.lr(step, 0) == pytest.approx(1e-3 * warm, rel=1e-12)
        want = 1e-3 * (warm if step <= 700 else 1 + (0.05 - 1) * (step - 700) / 300)
        assert wsd.lr(step, 0) == pytest.approx(want, rel=1e-9)


def test_cosine_is_optax_s():
    want = optax.warmup_cosine_decay_schedule(0.0, 1e-3, 100, 1000, end_value=5e-5)
    cosine = simple("cosine")
    for step in (0, 1, 50, 99, 100, 101, 333, 550, 999, 1000):
        assert cosine.lr(step, 0) == pytest.approx(float(want(step)), rel=1e-5)  # optax computes in float32


@pytest.mark.parametrize("schedule", ["constant", "cosine", "wsd"])
def test_simple_schedules_without_warmup_decay_or_floor(schedule):
    bare = simple(schedule, warmup_steps=0, final_fraction=0.0, decay_fraction=0.0)
    assert bare.lr(0, 0) == 1e-3
    assert bare.lr(500, 0) == pytest.approx(5e-4 if schedule == "cosine" else 1e-3)
    assert bare.lr(2000, 0) == bare.lr(1000, 0) == pytest.approx(0.0 if schedule == "cosine" else 1e-3)


def test_the_ramp_is_the_reports_or_asked_for():
    assert {plan.batch_size for plan in simple("cosine").plan()} == {16}
    ramped = [plan.batch_size for plan in simple("cosine", batch_ramp=True).plan()]
    assert ramped[0] == 4 and ramped[-1] == 16 and len(ramped) == 1000


@pytest.mark.parametrize(
    ("schedule", "optimizer", "message"),
    [
        (
            "cosine",
            {"warmup_steps": 1000},
            r"warmup_steps=1000 does not fit into train\.steps=1000: lower it.*50;",
        ),
        (
            "wsd",
            {"decay_fraction": 0.95},
            r"steps=1000, of which the decay takes 950 \(optimizer.decay_fraction\)",
        ),
        ("linear", {}, r"optimizer.schedule='linear' is not one of .*'cosine'"),
        ("wsd", {"decay_fraction": 1.5}, r"optimizer.decay_fraction=1.5 must be <= 1"),
        ("cosine", {"final_fraction": -0.1}, r"optimizer.final_fraction=-0.1 must be >= 0"),
    ],
)
def test_what_does_not_fit_is_named(schedule, optimizer, message):
    with pytest.raises(ValueError, match=message):
        simple(schedule, **optimizer)


def test_granularity_must_divide(report):
    with pytest.raises(ValueError, match=r"train\.batch_size=15360 must be a multiple of 5000"):
        report.batch_size(0, 5000)
