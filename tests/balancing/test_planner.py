"""When plans are made, that each is taken once, and that nobody waits in vain for one that does not come."""

import threading
import time

import numpy as np
import pytest

from deepseek_jax.balancing.eplb import even
from deepseek_jax.balancing.loads import Window
from deepseek_jax.balancing.plan import Plan, Unit, balance, loads_of_gpus
from deepseek_jax.balancing.planner import Look, Planner, PlanningError, When, look

UNIT = Unit(slots=24, groups=4, nodes=2, gpus=8)
FIRST = even(3, 16, UNIT)
ZIPF = np.random.default_rng(0).permuted(np.tile(48_000 // np.arange(1, 17), (3, 1)), axis=1)


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def planner(every=1, below=1.0, deadline_s=5.0, current=FIRST, clock=time.monotonic, **kwargs):
    return Planner(current, UNIT, When(every, below, deadline_s), Window(3, 16), clock=clock, **kwargs)


def until(done):
    for _ in range(2000):
        if done():
            return
        time.sleep(0.005)
    raise AssertionError("it did not happen")


def taken(of):
    plans = []
    until(lambda: (plan := of.take()) is not None and plans.append(plan) is None)
    return plans[0]


def test_plans_come_by_the_clock_of_steps():
    p = planner(every=3)
    for _ in range(2):
        p.offer(ZIPF)
    assert p.take() is None and p._job is None
    p.offer(ZIPF)
    plan = taken(p)
    assert p.take() is None and p.current is plan
    report = p.report()
    before, after = (balance(loads_of_gpus(x, ZIPF, 8)) for x in (FIRST, plan))
    assert (report.before, report.after) == pytest.approx((before, after)) and after > before + 0.2
    assert report.taken == 1 and report.age_steps == 0 and report.moves.moved > 0
    assert (p.window.count_le > ZIPF).all()
    p.offer(ZIPF, steps=3)  # of several steps at once
    assert p._job is not None and p.report().age_steps == 3


def test_no_plan_above_the_threshold():
    p = planner(below=0.3)
    p.offer(ZIPF)
    until(lambda: p.take() is None and p._job is None)
    assert (
        p.report().balance == pytest.approx(balance(loads_of_gpus(FIRST, ZIPF, 8))) and p.report().taken == 0
    )
    under = planner(below=0.99)
    under.offer(ZIPF)
    assert taken(under) is not FIRST


def test_layers_that_gain_nothing_stay():
    load = ZIPF.copy()
    load[1] = 1000 * FIRST.logcnt[1]  # even as it is
    load[2] = 0  # nothing known
    found = look(load.astype(float), FIRST, UNIT)
    assert found.plan is not None
    np.testing.assert_array_equal(found.plan.physical_lp[1:], FIRST.physical_lp[1:])
    assert (found.plan.physical_lp[0] != FIRST.physical_lp[0]).any()
    assert look(load.astype(float), found.plan, UNIT).plan is None  # a second look finds nothing better


def test_without_a_load_nothing_is_planned():
    p = planner()
    for _ in range(3):
        p.offer(np.zeros((3, 16)))
    assert p._job is None and p.report().age_steps == 3


def test_age_in_steps_and_seconds():
    clock = Clock()
    p = planner(every=2, clock=clock)
    clock.now += 7
    p.offer(ZIPF)
    p.offer(ZIPF)
    assert (p.report().age_steps, p.report().age_s) == (2, 7.0)
    until(lambda: p._job.done())
    p.offer(ZIPF)
    clock.now += 2
    assert p.report().waiting_s == 2.0  # nobody took it yet
    for _ in range(5):
        p.offer(ZIPF)
    assert p._job is None and p.report().age_steps == 8
    assert taken(p) is p.current
    clock.now += 3
    p.offer(ZIPF)
    assert p.report()[:2] == (1, 3.0) and p.report().waiting_s == 0.0


def test_an_error_of_the_worker_reaches_its_owner_once():
    p = planner()
    p.offer(ZIPF * 5e33)  # their sum is more than EPLB's float32 holds
    until(lambda: p._job.done())
    with pytest.raises(PlanningError, match="not be planned anew: ValueError: loads of layer 0 sum to more"):
        p.take()
    assert p.take() is None and p.report().failures == 1 and "ValueError" in p.report().error
    p.window.count_le[:] = 0
    p.offer(ZIPF)
    assert taken(p) is p.current


def test_the_silence_of_the_worker_reaches_its_owner():
    """The next look is made by another worker; what the first says at last is not heard."""
    clock, go, threads = Clock(), threading.Event(), []

    def first_waits(*args):
        threads.append(threading.current_thread())
        if len(threads) == 1:
            go.wait()
            return Look(0.0, 0.0, Plan(FIRST.physical_lp[:, ::-1]))
        return look(*args)

    p = planner(clock=clock, look=first_waits)
    p.offer(ZIPF)
    clock.now += 4
    p.offer(ZIPF)
    clock.now += 2
    with pytest.raises(PlanningError, match=r"TimeoutError: no plan in 5.0 s"):
        p.offer(ZIPF)
    p.offer(ZIPF)
    plan = taken(p)
    go.set()
    threads[0].join()
    p.offer(ZIPF)
    assert p.current is plan and p.report().failures == 1 and p.report().taken == 1


def test_what_it_begins_with_is_checked():
    with pytest.raises(ValueError, match="layer 0 has no slot for expert 15"):
        planner(current=Plan(np.tile(np.arange(24, dtype=np.int32) % 15, (3, 1))))
    with pytest.raises(ValueError, match=r"plan of shape \(2, 24\) for loads of 3 layers"):
        planner(current=even(2, 16, UNIT))
    with pytest.raises(ValueError, match="8 GPUs do not divide over 3 nodes"):
        Planner(FIRST, UNIT._replace(nodes=3), When(), Window(3, 16))
    for wrong, words in [
        ({"every": 0}, "every=0"),
        ({"below": 1.5}, "below=1.5"),
        ({"deadline_s": -1}, "deadline_s=-1"),
    ]:
        with pytest.raises(ValueError, match=words):
            When(**wrong)
