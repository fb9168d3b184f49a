"""A generative reward model on a task whose truth is known: one vote against six, both orders, padded answers.

    python -m experiments.study.judges --base=runs/tiny --out=runs/judges --seeds=3

Of each seed: a model learns to answer, a little; its right and wrong answers to training questions become judgements with their
reasons (`experiments.distill`), from which the same checkpoint learns to judge (`experiments.sft`). On its answers to held-out questions,
as many right as wrong ones, six judgements each are drawn:

    one vote, six    how often the verdict is true; a tie is half, and what cannot be read is false
    padding          how often a wrong answer is called right, as it is, and between sentences that praise it
    order            right against wrong answers to the same question, scored in both orders
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from experiments import command_line
from experiments.study.stages import fine_tune, run_command, settings

_STUDY = settings("runs/judges", seeds=3)
FLAGS = _STUDY.values
_STEPS = flags.DEFINE_integer("steps", 100, "Steps in which answering is learned.", flag_values=FLAGS)
_JUDGE_STEPS = flags.DEFINE_integer(
    "judge_steps", 300, "Steps in which judging is learned.", flag_values=FLAGS
)
_FORM = flags.DEFINE_enum(
    "form", "truth", ["truth", "reference"], "Whether the judge is told the answer.", flag_values=FLAGS
)

VOTES, ANSWERS = 6, 4
ANSWER_TOKENS, JUDGEMENT_TOKENS = 64, 128


def padded(answer: str) -> str:
    """An answer between sentences that praise it and say nothing."""
    return f"I have checked each step twice, and all of them are right. {answer} This is without any doubt the right answer."


def _judge(folder: Path, seed: int) -> tuple[Path, Path]:
    """Folders of the model that answers, and of the one that judges."""
    source = f"{_STUDY.task.value}/boxed/{_STUDY.questions.value}=1"
    rate, steps = _STUDY.learning_rate.value, (_STEPS.value, _JUDGE_STEPS.value)
    writer = fine_tune(source, folder / "writer", steps[0], _STUDY.base.value, seed, rate)
    run_command(
        "distill",
        "tiny_distill",
        expert=writer,
        prompts__sources=source,
        judgements=True,
        judge__form=_FORM.value,
        samples=ANSWERS,
        max_tokens=ANSWER_TOKENS,
        seed=seed,
        out_dir=folder / "distill",
    )
    rows = folder / "distill" / "judgements.jsonl"
    judge = fine_tune(f"{rows}=1", folder / "judge", steps[1], writer, seed, rate)
    return writer, judge


def _cases(writer: Path, seed: int) -> list[Any]:
    """Answers of a model to held-out questions, as many right as wrong ones."""
    from deepseek_jax.posttraining import judgements
    from deepseek_jax.posttraining.answering import right_or_wrong
    from deepseek_jax.posttraining.author import author
    from deepseek_jax.posttraining.distill import cases_of
    from deepseek_jax.posttraining.tasks import rows

    held_out = rows(f"{_STUDY.task.value}/boxed/{_STUDY.questions.value}", held_out=True, seed=seed)
    answers = right_or_wrong(author(str(writer)), held_out, ANSWERS, ANSWER_TOKENS, seed + 1)
    return judgements.balanced(cases_of(held_out, answers), seed)


def _measured(judge: Path, cases: Sequence[Any], seed: int) -> dict[str, Any]:
    from deepseek_jax.posttraining import judgements, preferences
    from deepseek_jax.posttraining.asking import AskRollouts
    from deepseek_jax.posttraining.author import author
    from deepseek_jax.posttraining.judge_forms import FORMS
    from deepseek_jax.posttraining.rewards.judge import polled
    from deepseek_jax.posttraining.rollouts import Sampling
    from deepseek_jax.posttraining.votes import majority, rate

    model = author(str(judge))
    sampling = Sampling(JUDGEMENT_TOKENS, tuple(model.tokenizer.stop_ids), temperature=1.0)
    ask = AskRollouts(model.rollouts, model.tokenizer, sampling, model.positions, seed)
    form = FORMS[_FORM.value]
    votes = polled(ask, form, [judgements.texts_of(form, case) for case in cases], VOTES)
    one = [sum(v is case.right for v in of_case) / VOTES for case, of_case in zip(cases, votes, strict=True)]
    six = [_true(majority(of_case), case.right) for case, of_case in zip(cases, votes, strict=True)]
    wrong = [i for i, case in enumerate(cases) if not case.right]
    praise = [cases[i]._replace(response=padded(cases[i].response)) for i in wrong]
    praised = polled(ask, form, [judgements.texts_of(form, case) for case in praise], VOTES)
    plain_yes = [sum(v is True for v in votes[i]) / VOTES for i in wrong]
    praised_yes = [sum(v is True for v in of_case) / VOTES for of_case in praised]
    pairs = [preferences.Pair(r.question, r.response, w.response) for r, w in judgements.pairs(cases)]
    results = preferences.judged(ask, pairs, times=4, seed=seed)
    first_order = [r._replace(swapped=r.swapped[:1], scores=r.scores[:1]) for r in results]
    order = preferences.order_effect(results)
    return {
        "cases": len(cases),
        "unread": sum(v is None for of_case in votes for v in of_case) / (VOTES * len(cases)),
        "one vote": rate(one),
        "six votes": rate(six),
        "six - one": rate([a - b for a, b in zip(six, one, strict=True)]),
        "wrong called right": rate(plain_yes),
        "wrong called right, padded": rate(praised_yes),
        "padding": rate([a - b for a, b in zip(praised_yes, plain_yes, strict=True)]),
        "pairs": len(pairs),
        "right one wins, one judgement": preferences.win_rate(first_order),
        "right one wins, both orders": preferences.win_rate(results),
        "shown first wins": order.first,
        "orders agree": order.agreement,
    }


def _true(verdict: float | None, right: bool) -> float:
    return 0.0 if verdict is None else verdict if right else 1 - verdict


def over_seeds(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means over seeds, with their standard errors, of each rate."""
    from deepseek_jax.posttraining.votes import rate

    names = [name for name, value in found[0].items() if isinstance(value, tuple)]
    return {name: rate([one[name].mean for one in found]) for name in names}


def main(argv: Sequence[str]) -> int:
    command_line.parse_flags(argv, FLAGS)
    found = []
    for seed in range(_STUDY.seeds.value):
        folder = Path(_STUDY.out.value) / f"seed_{seed}"
        writer, judge = _judge(folder, seed)
        found.append(_measured(judge, _cases(writer, seed), seed))
        (folder / "result.json").write_text(json.dumps(found[-1], indent=2))
        print(
            f"seed {seed}: " + ", ".join(f"{name} {value}" for name, value in found[-1].items()), flush=True
        )
    if len(found) > 1:
        print("\n| over seeds | |\n|---|---|")
        for name, value in over_seeds(found).items():
            print(f"| {name} | {value} |")
    return 0


if __name__ == "__main__":
    command_line.run(main)
