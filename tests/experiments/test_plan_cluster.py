"""The simulated cluster: nothing is lost on the way, the shortcuts change little, and the published figures close."""

import dataclasses

import numpy as np
import pytest

from deepseek_jax.serving.pages import page_keys
from experiments.planning.cluster import report
from experiments.planning.cluster.clock import Work, expected_most
from experiments.planning.cluster.cluster import Cluster, Shape
from experiments.planning.cluster.command import main, shape_of
from experiments.planning.cluster.day import Lapse, simulate
from experiments.planning.cluster.decode import Decode
from experiments.planning.cluster.demand import Asked, Day, Segment, Users
from experiments.planning.cluster.disk import Disk
from experiments.planning.cluster.full import SGLANG_DECODE
from experiments.planning.cluster.jobs import Job
from experiments.planning.cluster.picture import draw
from experiments.planning.cluster.setting import Setting, fitted
from experiments.planning.hardware import H100, H200
from experiments.planning.serving_times import decode_step, prefill_step
from experiments.planning.units import Unit

UNEVEN = 1.2492  # of DeepSeek's day, as `full.uneven` measures it; that takes seconds


@pytest.fixture(scope="module")
def setting() -> Setting:
    return fitted(Setting(uneven=UNEVEN), 73.7e3, 14.8e3)


def brief(setting: Setting) -> Setting:
    """Texts and answers a tenth as long, so that a few seconds have many."""
    day = dataclasses.replace(setting.day, context=400.0, pause=2.0)
    return dataclasses.replace(setting, day=day)


# --- demand -----------------------------------------------------------------------------------------------------------


def test_published_totals_close():
    """SPEC: 95.5 prefill and 131.4 decode nodes."""
    day = Day()
    assert day.input / 86_400 / 73.7e3 == pytest.approx(95.5, abs=0.05)
    assert day.output / 86_400 / 14.8e3 == pytest.approx(131.4, abs=0.05)
    assert day.requests * day.prompt * 86_400 == pytest.approx(day.input)
    assert np.mean([day.load(h / 10) for h in range(240)]) == pytest.approx(1, abs=0.002)


def test_nodes_of_the_fitted_day(setting):
    prefill, decode = setting.mean_nodes()
    assert prefill == pytest.approx(95.5, rel=0.02) and decode == pytest.approx(131.4, rel=0.02)
    assert prefill + decode == pytest.approx(226.75, rel=0.03)
    assert max(sum(setting.nodes(hour)) for hour in range(24)) == pytest.approx(278, rel=0.03)


def test_lengths_are_as_published():
    """Means of 5,000 draws: three standard errors. Context: mean over drawn tokens."""
    day = Day()
    users = Users(day, np.random.default_rng(0))
    asked = [users.ask(0.0) for _ in range(5_000)]
    prompts = np.array([sum(s.length for s in a.text) for a in asked])
    answers = np.array([a.answer.length for a in asked])
    for drawn, mean in ((prompts, day.prompt), (answers, day.answer)):
        assert abs(drawn.mean() - mean) < 3 * drawn.std() / len(drawn) ** 0.5 + 1
    context = answers * (prompts + answers / 2)
    error = 3 * context.std() / len(context) ** 0.5 / answers.mean()
    assert abs(context.sum() / answers.sum() - 4989) < error + 3 * 4989 * answers.std() / answers.mean() / 70
    said = np.array([sum(s.length for s in a.text[:-1]) // 64 * 64 for a in asked])
    assert said.sum() / prompts.sum() == pytest.approx(0.563, abs=0.03)


def test_no_two_texts_begin_alike_and_turns_do():
    users = Users(Day(), np.random.default_rng(1))
    first = users.ask(0.0)
    users.ended(first, 1.0)
    keys = page_keys(users.tokens((*first.text, first.answer)))
    assert keys != page_keys(users.tokens(users.ask(0.0).text))[: len(keys)]
    later = next(a for a in (users.ask(1e9) for _ in range(100)) if len(a.text) > 1)
    assert page_keys(users.tokens(later.text))[: len(keys)] == keys


# --- times ------------------------------------------------------------------------------------------------------------


def test_a_step_waits_for_the_slowest(setting):
    clock = setting.decode_clock
    alike = clock.took([Work(88, 5000)] * 4)
    assert alike.waiting == 0 and alike.seconds == clock.even(Work(88, 5000))
    one = clock.took([Work(88, 5000)] * 3 + [Work(88, 9000)])
    assert one.seconds > clock.even(one.work) > alike.seconds
    assert expected_most(2) == pytest.approx(0.564, abs=0.03)  # 1 / sqrt(pi)


def test_all_devices_of_a_unit_need_no_guess(setting):
    clock = dataclasses.replace(setting.decode_clock, devices=2)
    works = [Work(88, 5000), Work(88, 9000)]
    assert clock.took(works).seconds < setting.decode_clock.took(works).seconds


def test_steps_are_those_of_the_roofline(setting):
    """Between the points of the table, within 2%."""
    for clock, work in ((setting.decode_clock, Work(88, 4989)), (setting.prefill_clock, Work(12_000, 3000))):
        assert clock.even(work) == pytest.approx(clock.slow * clock.step(*work).seconds, rel=0.02)


# --- a small cluster --------------------------------------------------------------------------------------------------


def drained(setting: Setting, shape: Shape, lose: str = "") -> Cluster:
    """Ten seconds of requests, and as long as they take."""
    cluster = Cluster(setting, shape, seed=3)
    cluster.rate = 12.0
    cluster.start(12.0)
    cluster.at(10.0, setattr, cluster, "rate", 0.0)
    if lose:
        cluster.at(6.0, cluster.lose, lose)
        cluster.at(9.0, cluster.bring, lose)
    cluster.run(60.0)
    return cluster


@pytest.fixture(scope="module")
def small(setting) -> Cluster:
    return drained(brief(setting), Shape(2, 2, 2, 2, 4))


def test_every_request_ends_whole_and_nothing_is_held(small):
    assert small.sent == len(small.jobs) > 80 and not small.open
    for unit in small.units.values():
        assert not unit.jobs and all(s.pool.held == 0 and not s.running for s in unit.ranks)
    drawn = sum(s.tokens for s in small.samples if s.name.startswith("decode"))
    computed = sum(s.tokens for s in small.samples if s.name.startswith("prefill"))
    assert drawn == sum(len(j.answer) for j in small.jobs)
    assert computed == sum(len(j.prompt) - j.cached for j in small.jobs)
    assert all(server.busy == 0 for server in small.choice.servers.values())


def test_little(small):
    """Sequences on devices over time are the times of the sequences there: from the step of the first token to the last."""
    held = sum(sum(s.counts) * s.steps * s.took.seconds for s in small.samples if s.name.startswith("decode"))
    assert sum(j.end - j.first for j in small.jobs) < held <= sum(j.end - j.joined for j in small.jobs) + 1e-6


def test_time_goes_on(small):
    for j in small.jobs:
        assert j.arrival <= j.queued <= j.prefilled <= j.joined <= j.first <= j.end and j.tries == 1


def test_what_was_said_is_found_again(small, setting):
    hits = sum(j.cached for j in small.jobs)
    assert 0.3 < hits / sum(len(j.prompt) for j in small.jobs) < 0.7
    again = drained(dataclasses.replace(brief(setting), kept=1e-9), Shape(1, 2, 1, 2, 4))
    assert sum(j.cached for j in again.jobs) < hits  # devices' own pages have prompts, and no answers


def test_a_lost_unit_loses_no_request(setting):
    slow = dataclasses.replace(brief(setting), prefill_slow=10.0)
    for name in ("decode-00", "prefill-01"):
        cluster = drained(slow, Shape(2, 2, 2, 2, 4), name)
        assert cluster.sent == len(cluster.jobs) and not cluster.open
        assert cluster.lost > 0 and max(j.tries for j in cluster.jobs) > 1


def test_several_steps_at_once_change_nothing(setting):
    def ended(stride: int, drafts: bool = False) -> list[tuple[str, int]]:
        unit = Decode(setting, "decode-00", 2, np.random.default_rng(0))
        for i in range(20):
            tokens = [10**6 + i] * (100 + i)
            asked = Asked((), Segment(0, 0, 1))
            unit.add(Job(str(i), asked, 0.0, tokens, [], [0] * (1 + 3 * i)))
        found, steps = [], 0
        while not unit.idle:
            turn = unit.turn(stride)
            found += [(job.id, steps + at) for job, at in turn.ended]
            steps += stride
        return sorted(found)

    assert ended(1) == ended(4) == ended(64)
    assert dict(ended(1)) == {str(i): 1 + 3 * i for i in range(20)}


def test_drafts_draw_more_a_step(setting):
    unit = Unit(nodes=18, experts=2, drafts=True)
    drafting = Decode(
        dataclasses.replace(setting, decode=unit, acceptance=0.8), "d", 1, np.random.default_rng(0)
    )
    for i in range(8):
        drafting.add(Job(str(i), Asked((), Segment(0, 0, 1)), 0.0, [10**6 + i] * 100, [], [0] * 2000))
    drafting.turn(1)
    turn = drafting.turn(200)
    rows = turn.works[0].amount * turn.steps
    assert turn.tokens / rows == pytest.approx(1.8, abs=4 * (0.16 / rows) ** 0.5)


def test_the_disk_forgets_the_oldest():
    disk = Disk(2)
    a, b = page_keys(range(64)), page_keys(range(1, 129))
    disk.put(a)
    assert disk.found(a) == 1
    disk.put(b)
    assert (disk.found(a), disk.found(b)) == (0, 2)


# --- a day ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lapse(setting) -> Lapse:
    return simulate(brief(setting), Shape(1, 2, 1, 2, 4), 4.0, 0, hours=(3, 15), warm=2.0)


def test_a_day_is_told_and_drawn(lapse):
    text = report.report(lapse, [], 2.0)
    assert "226.8" in text and "What not to conclude" in text and "15:00" in text
    assert draw(lapse)[:4] == b"\x89PNG"


def test_what_comes_in_goes_out(lapse):
    """Per node, what the hour's load divided by its nodes is; four seconds have some 5% of noise."""
    day = lapse.setting.day
    asked = sum(day.output / 86_400 * day.load(w.hour + 0.5) for w in lapse.windows)
    assert lapse.output_rate() == pytest.approx(asked / sum(w.nodes[1] for w in lapse.windows), rel=0.25)


def test_shapes_have_prompts_for_all_answers(setting):
    shape = shape_of(setting, 6, 4)
    assert shape.prefill * shape.prefill_ranks >= 32 and shape.decode_ranks == 6


def test_sglang_unfitted(setting):
    """22.3k and 52.3k tokens/s per node within 20%, with the constants of DeepSeek's day; all devices alike."""
    decode = decode_step(setting.model, SGLANG_DECODE, H100, 256, 2050)
    prefill = prefill_step(setting.model, setting.prefill, H100, 16_384, 0, 16_384 / 2000)
    assert 8 * 256 / decode.seconds / setting.decode_slow == pytest.approx(22.3e3, rel=0.2)
    assert 8 * 16_384 / prefill.seconds / setting.prefill_slow == pytest.approx(52.3e3, rel=0.2)


def test_more_memory_holds_more(setting):
    assert dataclasses.replace(setting, hardware=H200).pages(setting.decode) > 2 * setting.pages(
        setting.decode
    )
    with pytest.raises(ValueError, match="no memory for latents"):
        dataclasses.replace(setting, decode=Unit(nodes=1, experts=36)).pages(Unit(nodes=1, experts=36))


@pytest.mark.parametrize(
    ("argument", "says"),
    [
        ("--out=x.svg", "must end in .png"),
        ("--acceptance=1.5", "below 1"),
        ("--decode_devices=12", "whole nodes"),
    ],
)
def test_mistakes_are_named(argument, says):
    with pytest.raises(ValueError, match=says):
        main([argument])
