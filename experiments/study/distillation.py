"""With and without traces at equal tokens, and the shortest right answer against any: accuracy and length over seeds.

    python -m experiments.study.distillation --base=runs/tiny --out=runs/distillation --seeds=5

Of each seed: an expert learns to write its steps down and to check them, no matter how often; it answers training questions, several
times each; and students learn from the same base, for the same number of steps of the same size, each from one file:

    answers    the questions with their short answers          first      a right answer of the expert, the first one drawn
    both       two samples per problem, as `experiments.distill` writes     shortest   the shortest right answer

All answer the same held-out questions, greedily. Every stage is a command in a folder of its own, which goes on where it was cut off:
so does the study. Result: `result.json`, `accuracy_length.png`, and a table with standard errors over seeds.
"""

import json
import random
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from experiments import command_line
from experiments.study.stages import fine_tune, run_command, settings

_STUDY = settings("runs/distillation", seeds=5)
FLAGS = _STUDY.values
_EXPERT_STEPS = flags.DEFINE_integer(
    "expert_steps", 200, "Steps of the expert's fine-tuning.", flag_values=FLAGS
)
_GRPO_STEPS = flags.DEFINE_integer("grpo_steps", 0, "Steps of GRPO after it.", flag_values=FLAGS)
_STEPS = flags.DEFINE_integer("steps", 100, "Steps of each student.", flag_values=FLAGS)
_SAMPLES = flags.DEFINE_integer("samples", 4, "Answers of the expert to each question.", flag_values=FLAGS)
_TOKENS = flags.DEFINE_integer("max_tokens", 160, "Of an answer.", flag_values=FLAGS)

ARMS = ("answers", "first", "shortest", "both")
MOST_CHECKS = 3


# --- what the expert learns -------------------------------------------------------------------------------------------


def traces(rows: Sequence[Mapping[str, Any]], seed: int) -> Iterator[dict[str, Any]]:
    """The worked answers with their steps in <think>, which are gone through again up to three times, at random."""
    draw = random.Random(seed)
    for row in rows:
        work, boxed = _parts(row)
        again = "".join(f" Check: {work}" for _ in range(draw.randint(0, MOST_CHECKS)))
        said = f"<think>{work}{again}</think>{boxed}"
        yield {**row, "completion": [{"role": "assistant", "content": said}]}


def short(rows: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """The answers alone."""
    for row in rows:
        yield {**row, "completion": [{"role": "assistant", "content": _parts(row)[1]}]}


def _parts(row: Mapping[str, Any]) -> tuple[str, str]:
    """The steps of a worked answer, and the answer in its box."""
    work, box, answer = row["completion"][0]["content"].rpartition(" \\boxed")
    return work, box.strip() + answer


def _write(path: Path, rows: Iterator[dict[str, Any]]) -> Path:
    from deepseek_jax.posttraining.drawn import json_lines, write_whole

    if not path.exists():
        write_whole(path, json_lines(rows))
    return path


# --- the stages -------------------------------------------------------------------------------------------------------


def _fine_tune(rows: Path, folder: Path, steps: int, seed: int) -> Path:
    return fine_tune(f"{rows}=1", folder, steps, _STUDY.base.value, seed, _STUDY.learning_rate.value)


def _expert(rows: Path, folder: Path, seed: int) -> Path:
    expert = _fine_tune(rows, folder / "expert_sft", _EXPERT_STEPS.value, seed)
    if not _GRPO_STEPS.value:
        return expert
    settings = {
        "prompts__sources": f"{_STUDY.task.value}/{_STUDY.questions.value}=1",
        "prompts__seed": seed,
        "train__seed": seed,
        "train__init_from": expert,
        "train__steps": _GRPO_STEPS.value,
        "train__eval_every": _GRPO_STEPS.value,
        "train__out_dir": folder / "expert",
        "rollouts__max_tokens": _TOKENS.value,
    }
    run_command("grpo", "tiny_grpo", **settings)
    return folder / "expert"


def _distilled(expert: Path, problems: Path, folder: Path, seed: int) -> dict[str, Path]:
    """The files of the students. The expert's answers are drawn once, and selected twice."""
    files = {name: folder / f"{name}.jsonl" for name in ARMS}
    settings = {
        "expert": expert,
        "prompts__sources": f"{problems}=1",
        "select__repeated": 1.0,
        "samples": _SAMPLES.value,
        "max_tokens": _TOKENS.value,
        "seed": seed,
        "out_dir": folder / "distill",
    }
    for arm, choose, original in (
        ("first", "first", False),
        ("shortest", "shortest", False),
        ("both", "shortest", True),
    ):
        if not files[arm].exists():
            run_command("distill", "tiny_distill", select__choose=choose, original=original, **settings)
            shutil.copy(folder / "distill" / "sft.jsonl", files[arm])
            shutil.copy(folder / "distill" / "card.json", folder / f"{arm}_card.json")
            shutil.copy(folder / "distill" / "length.png", folder / f"{arm}_length.png")
    return files


def _answers(folder: Path, held_out: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Which held-out questions a student answers rightly, greedily, and with how many tokens; kept beside its run."""
    from deepseek_jax.posttraining.answering import right_or_wrong
    from deepseek_jax.posttraining.author import author

    path = folder / "held_out.json"
    if not path.exists():
        answers = right_or_wrong(author(str(folder)), held_out, 1, _TOKENS.value, temperature=0.0)
        result = {
            "right": [float(answer.right) for answer in answers],
            "tokens": [answer.tokens for answer in answers],
            "cut off": sum(answer.finish_reason == "length" for answer in answers),
            "examples": [answer.text for answer in answers[:4]],
        }
        path.write_text(json.dumps(result))
    return json.loads(path.read_text())


def _one_seed(seed: int, folder: Path) -> dict[str, Any]:
    """Accuracy and mean length of each student on the held-out questions."""
    from deepseek_jax.posttraining.tasks import rows

    source = f"{_STUDY.task.value}/boxed/{_STUDY.questions.value}"
    train, held_out = rows(source, seed=seed), rows(source, held_out=True, seed=seed)
    expert = _expert(_write(folder / "traces.jsonl", traces(train, seed)), folder, seed)
    problems = _write(folder / "answers.jsonl", short(train))
    files = _distilled(expert, problems, folder, seed)
    found = {"expert": _answers(expert, held_out)}
    for arm in ARMS:
        student = _fine_tune(files[arm], folder / f"student_{arm}", _STEPS.value, seed)
        found[arm] = _answers(student, held_out)
    return {
        arm: {key: sum(result[key]) / len(result[key]) for key in ("right", "tokens")}
        for arm, result in found.items()
    }


# --- the result -------------------------------------------------------------------------------------------------------


def summary(seeds: Sequence[Mapping[str, Mapping[str, float]]]) -> dict[str, Any]:
    """Means with standard errors over seeds, and of the shortest against the first right answer, seed by seed."""
    from deepseek_jax.posttraining.votes import rate

    arms = {
        arm: {
            "accuracy": rate([s[arm]["right"] for s in seeds]),
            "tokens": rate([s[arm]["tokens"] for s in seeds]),
        }
        for arm in seeds[0]
    }
    change = rate([s["shortest"]["right"] - s["first"]["right"] for s in seeds])
    cut = rate([1 - s["shortest"]["tokens"] / s["first"]["tokens"] for s in seeds])
    traces_help = rate([s["first"]["right"] - s["answers"]["right"] for s in seeds])
    return {"arms": arms, "shortest - first": change, "length cut": cut, "traces - answers": traces_help}


def _print(found: Mapping[str, Any]) -> None:
    print("| learned from | accuracy | tokens of an answer |\n|---|---|---|")
    for arm, values in found["arms"].items():
        print(
            f"| {arm} | {values['accuracy'].mean:.1%} ± {values['accuracy'].error:.1%} | {values['tokens'].mean:.1f} ± {values['tokens'].error:.1f} |"
        )
    change, cut, help_ = found["shortest - first"], found["length cut"], found["traces - answers"]
    within = "within" if abs(change.mean) <= change.error else "NOT within"
    print(f"\nwith traces against without, at equal tokens: {help_.mean:+.1%} ± {help_.error:.1%}")
    print(
        f"shortest against first: length cut by {cut.mean:.1%} ± {cut.error:.1%}, accuracy {change.mean:+.1%} ± {change.error:.1%} ({within} one standard error)"
    )


def main(argv: Sequence[str]) -> int:
    command_line.parse_flags(argv, FLAGS)
    from deepseek_jax.posttraining.length_plot import Point, draw_points

    out = Path(_STUDY.out.value)
    seeds = []
    for seed in range(_STUDY.seeds.value):
        folder = out / f"seed_{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        seeds.append(_one_seed(seed, folder))
        (out / "seeds.json").write_text(json.dumps(seeds, indent=2))
        print(f"seed {seed}: {seeds[-1]}", flush=True)
    found = summary(seeds)
    (out / "result.json").write_text(json.dumps(found, indent=2))
    _print(found)
    points = [Point(arm, values["accuracy"], values["tokens"]) for arm, values in found["arms"].items()]
    draw_points(points, out / "accuracy_length.png", "Held-out accuracy against length")
    return 0


if __name__ == "__main__":
    command_line.run(main)
