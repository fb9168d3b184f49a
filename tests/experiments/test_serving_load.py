"""The trace of the serving benchmark, and its arithmetic of latency, by hand."""

import itertools
import statistics

import pytest

from experiments.served import read_metrics
from experiments.serving_load import Answer, Bounds, Wanted, closed_loop, figures, median, quantile, trace
from experiments.serving_report import OURS, check_gap, table


def test_a_trace_is_its_seed_and_keeps_its_ranges():
    wanted = trace(4000, vocab_size=50, seed=1)
    assert wanted == trace(4000, vocab_size=50, seed=1) != trace(4000, vocab_size=50, seed=2)
    assert {min(len(w.prompt) for w in wanted), max(len(w.prompt) for w in wanted)} == {16, 256}
    assert {min(w.max_tokens for w in wanted), max(w.max_tokens for w in wanted)} == {32, 128}
    assert {min(min(w.prompt) for w in wanted), max(max(w.prompt) for w in wanted)} == {3, 49}
    # Poisson: gaps are exponential with mean 1 and standard deviation 1; of 4,000, means lie within 4 / sqrt(4000).
    gaps = [b.arrival - a.arrival for a, b in itertools.pairwise(wanted)]
    assert wanted[0].arrival == 0 and statistics.mean(gaps) == pytest.approx(1, abs=0.064)
    # The square of an exponential has variance 24 - 4 = 20.
    assert statistics.mean(g * g for g in gaps) == pytest.approx(2, abs=4 * (20 / 4000) ** 0.5)


def test_a_longer_trace_begins_with_the_shorter():
    assert trace(9, 50)[:4] == trace(4, 50)


def test_quantiles_are_values_that_were_seen():
    values = list(range(1, 101))
    assert [quantile(values, q) for q in (0.5, 0.99, 1.0, 0.001)] == [50, 99, 100, 1]
    assert quantile([7.0], 0.99) == 7 and quantile([3, 1], 0.5) == 1
    assert quantile([], 0.5) != quantile([], 0.5)  # NaN


def test_figures_by_hand():
    answers = [
        Answer([1, 2, 3], [0.5, 0.75, 1.5]),  # ITL (1.5 - 0.5) / 2 = 0.5
        Answer([4, 5, 6, 7, 8], [1.0, 1.5, 2.0]),  # five tokens in three pieces: ITL 1 / 4
        Answer([9], [2.0]),  # one token: no gap
    ]
    f = figures(answers, wall=4.0, cpu=0.9, bounds=Bounds(ttft=1.0, itl=0.25))
    assert (f.requests, f.tokens, f.tokens_per_s, f.requests_per_s) == (3, 9, 2.25, 0.75)
    assert f.ttft == (1.0, 2.0)
    assert f.itl == (0.5, 0.75)  # of 0.25, 0.5, 0.5, 0.75
    assert f.goodput == 1 / 4  # the first fails by its ITL, the last by its TTFT
    assert f.cpu_per_1000 == pytest.approx(100)
    assert figures(answers, 4.0, 0.9, Bounds(2.0, 0.5)).goodput == 3 / 4  # bounds are met at equality


def test_the_median_is_taken_figure_by_figure():
    rounds = [
        figures([Answer([1, 2], [first, first + gap])], wall, 0.1, Bounds(1, 1))
        for first, gap, wall in ((0.1, 0.9, 1.0), (0.2, 0.5, 2.0), (0.3, 0.7, 4.0))
    ]
    m = median(rounds)
    assert m.ttft == (0.2, 0.2) and m.itl == (pytest.approx(0.7),) * 2 and m.tokens_per_s == 1.0


class Engine:
    """Gives every request inside one token a step, and takes one second for it; from a request's second step, two at once."""

    def __init__(self):
        self.time, self.inside, self.most = 0.0, {}, 0

    def submit(self, i, wanted):
        self.inside[i] = [0, wanted.max_tokens]
        self.most = max(self.most, len(self.inside))

    def step(self):
        self.time += 1.0
        for i, state in list(self.inside.items()):
            new = min(1 if state[0] == 0 else 2, state[1] - state[0])
            state[0] += new
            if state[0] == state[1]:
                del self.inside[i]
            yield i, [i] * new


def test_a_closed_loop_keeps_its_limit_and_times_from_entering():
    engine = Engine()
    wanted = [Wanted([5], n, 0.0) for n in (1, 3, 4)]
    answers, wall = closed_loop(wanted, 2, engine.submit, engine.step, lambda: engine.time)
    # 0 and 1 enter at 0; 0 is done after 1 s, and 2 enters then; 1 is done at 2 s; 2 gets 1, 2 and 1 tokens.
    assert answers == [Answer([0], [1.0]), Answer([1] * 3, [1.0, 2.0]), Answer([2] * 4, [1.0, 2.0, 3.0])]
    assert wall == 4.0 and engine.most == 2


def _run(tokens_per_s, cpu=1.0, good=1):
    """100 tokens of two answers, the first `good` of which have their first token in time."""
    answers = [Answer([1] * 50, [0.1 if i < good else 9.0, 10.0]) for i in range(2)]
    return figures(answers, 100 / tokens_per_s, cpu, Bounds(1.0, 1.0))


def test_the_report_compares_medians_and_gives_the_spread_of_the_rounds():
    ours = [_run(400, 0.2, 2), _run(300, 0.2, 2), _run(600, 0.2, 2)]
    peer = [_run(100, 0.5), _run(200, 0.5), _run(100, 0.5)]
    title, head, first, second, ratio = table("title", {OURS: ours, "peer": peer})
    assert title == "title" and "goodput" in head
    assert first.split() == [
        "deepseek_jax",
        "400",
        "(300",
        "to",
        "600)",
        "100/100",
        "9,900/9,900",
        "8.00",
        "2.00",
    ]
    assert second.split()[:5] == ["peer", "100", "(100", "to", "200)"]
    # rounds 400/100, 300/200, 600/100; CPU 5/2; goodput 2 * 400 / 100 against 1 * 100 / 100
    assert ratio.strip() == "ratio to peer: 4.00x (rounds 1.50 to 6.00; in CPU time 2.50x, goodput 8.00x)"


def test_a_token_worse_than_rounding_is_refused():
    assert check_gap("peer", 1.9e-4) == "the worst of all tokens lies 0.0002 below the best logit"
    with pytest.raises(ValueError, match=r"peer chose a token 0\.00021 below .* more than 0\.0002"):
        check_gap("peer", 2.1e-4)


def test_metrics_are_read_by_name_and_by_label():
    text = '# HELP a what\n# TYPE a counter\na{m="x",r="stop"} 2\na{m="x",r="length"} 3.5\nb 1e3\nc{m="x"} +Inf\n'
    found = read_metrics(text)
    assert found["a"] == 5.5 and found['a{m="x",r="stop"}'] == 2 and found["b"] == 1000 and found["c"] > 1e300
