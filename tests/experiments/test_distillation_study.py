"""The studies of distillation and of judges: what they write, and what they make of their numbers."""

import pytest

from deepseek_jax.posttraining.votes import rate
from experiments.study import distillation, judges

ROW = {
    "prompt": [{"role": "user", "content": "12 + 34 = ?"}],
    "completion": [{"role": "assistant", "content": "2+4=6, 1+3=4. \\boxed{46}"}],
    "answer": "46",
}


def said(rows):
    return [row["completion"][0]["content"] for row in rows]


def test_traces_go_through_their_steps_again_and_short_answers_have_none():
    work = "2+4=6, 1+3=4."
    written = said(distillation.traces([ROW] * 200, seed=0))
    checks = [text.count(" Check: ") for text in written]
    assert set(checks) == {0, 1, 2, 3}
    for text, n in zip(written, checks, strict=True):
        assert text == f"<think>{work}{f' Check: {work}' * n}</think>\\boxed{{46}}"
    assert written == said(distillation.traces([ROW] * 200, seed=0))
    assert said(distillation.short([ROW])) == ["\\boxed{46}"] and ROW["completion"][0]["content"].startswith(
        work
    )


def test_arms_are_compared_seed_by_seed():
    names = ("answers", "first", "shortest")
    seeds = [
        {
            name: {"right": right, "tokens": tokens}
            for name, right, tokens in zip(names, *of_seed, strict=True)
        }
        for of_seed in ([(0.2, 0.5, 0.6), (5, 40, 20)], [(0.3, 0.9, 0.8), (5, 50, 30)])
    ]
    found = distillation.summary(seeds)
    assert found["arms"]["first"]["accuracy"] == rate([0.5, 0.9])
    assert found["shortest - first"].mean == pytest.approx(0.0, abs=1e-12)
    assert found["shortest - first"].error == pytest.approx(0.1, rel=1e-12)
    assert found["length cut"].mean == pytest.approx((0.5 + 0.4) / 2, rel=1e-12)
    assert found["traces - answers"].mean == pytest.approx(0.45, rel=1e-12)


def test_rates_of_judges_are_taken_over_seeds():
    found = judges.over_seeds(
        [{"cases": 4, "one vote": rate([0, 1])}, {"cases": 4, "one vote": rate([1, 1])}]
    )
    assert found == {"one vote": rate([0.5, 1.0])}
    assert judges.padded("\\boxed{46}").count("\\boxed{46}") == 1 and len(judges.padded("")) > 80
