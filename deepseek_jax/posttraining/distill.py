"""Distillation: an expert's answers become data for supervised training (report sections 5.1 and 5.4.1).

    problems -> n answers of the expert each -> rewards say which are right -> style and length -> rows, card, picture

Two samples per problem: the problem with its original answer; and a system prompt that asks for reflection and verification, the
problem, and the expert's answer. What was drawn stays in the folder (`drawn.py`): another selection of it draws nothing anew.
"""

import contextlib
import dataclasses
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from deepseek_jax import now
from deepseek_jax.checks import ranges, require
from deepseek_jax.data.prompts import PromptConfig, load
from deepseek_jax.posttraining import data_card, judgements, length_plot, preferences
from deepseek_jax.posttraining.answering import Problem, answer_of, answered, as_asked
from deepseek_jax.posttraining.asking import Ask
from deepseek_jax.posttraining.author import Author, author, name_of
from deepseek_jax.posttraining.drawn import Drawn, json_lines, write_whole
from deepseek_jax.posttraining.judge_forms import summary
from deepseek_jax.posttraining.judge_model import JudgeConfig, ask_of, judge_of
from deepseek_jax.posttraining.judgements import Case
from deepseek_jax.posttraining.rewards import RewardConfig, Rewards, rewards_named
from deepseek_jax.posttraining.rollouts import Sampling
from deepseek_jax.posttraining.selection import KEPT, Answer, SelectionConfig, require_kept, select
from deepseek_jax.posttraining.task_files import check_tasks, in_files

ROWS, JUDGEMENTS, PREFERENCES = "sft.jsonl", "judgements.jsonl", "preferences.jsonl"
CARD, PAGE, PICTURE = "card.json", "card.md", "length.png"
SYSTEM = (
    "Think before you answer. Write your reasoning down, reflect on it, and verify each step and the result before you "
    "give the answer."
)


@dataclasses.dataclass(frozen=True)
class DistillConfig:
    """What is asked of which expert, and what becomes of its answers."""

    # --- sections
    prompts: PromptConfig = dataclasses.field(default_factory=PromptConfig)
    reward: RewardConfig = dataclasses.field(default_factory=RewardConfig)
    judge: JudgeConfig = dataclasses.field(default_factory=JudgeConfig)
    select: SelectionConfig = dataclasses.field(default_factory=SelectionConfig)
    expert: str = "runs/tiny_grpo"  # folder of a run, or of Hugging Face
    step: int | None = None  # which checkpoint of a run; None: the newest
    ema: bool = False  # the averaged parameters of a run
    problems: int = 0  # of the prompts, so many; 0: all of them
    rewards: tuple[str, ...] = ("answer",)  # which answers are right, "NAME" or "NAME=WEIGHT"
    right: float = 1.0  # smallest sum of the rewards of an answer that is right
    samples: int = 4  # answers to each problem
    max_tokens: int = 256  # of an answer, at most
    temperature: float = 1.0  # of drawing; 0: greedy
    top_p: float = 1.0  # only the likeliest tokens with this probability in all
    system: str = SYSTEM  # system prompt of samples with the expert's answers; empty: none
    with_system: bool = True  # the expert is asked with the system prompt, too
    original: bool = True  # the samples with the problems' own answers, where there are some
    judgements: bool = (
        False  # rows that train a judge of judge.form, too: right and wrong answers, with reasons
    )
    preferences: bool = False  # pairs of answers to each problem, which judge.model scores in both orders
    at_once: int = 64  # problems whose answers are drawn and written together
    rows: int = 64  # answers that the expert writes at the same time
    seed: int = 0  # of drawing
    out_dir: str = "runs/tiny_distill"  # answers, rows, card, picture

    def __post_init__(self):
        check_tasks(self.prompts.sources, self.prompts.validation, "prompts.sources")
        ranges("", self, "samples max_tokens at_once rows", 1, 1 << 31)
        ranges("", self, "temperature", 0, 1e6)
        ranges("", self, "right", -1e9, 1e9)
        ranges("", self, "seed", 0, (1 << 32) - 1)
        require(0 < self.top_p <= 1, f"top_p={self.top_p} must lie in (0, 1]")
        for name in ("expert", "out_dir"):
            require(getattr(self, name) != "", f"{name} is empty")
        ranges("", self, "problems", 0, 1 << 31)
        require(bool(self.rewards), "rewards is empty: name at least one")
        require(
            bool(self.judge.model) or not self.preferences, "preferences=True needs a judge: set judge.model"
        )

    def drawn_by(self) -> dict[str, Any]:
        """The settings that decide the answers and their rewards."""
        left_out = ("select", "original", "judgements", "preferences", "out_dir", "right")
        values = {k: v for k, v in dataclasses.asdict(self).items() if k not in left_out}
        return values if self.with_system else {k: v for k, v in values.items() if k != "system"}


def run(cfg: DistillConfig) -> data_card.Card:
    """Loads the expert, reads the problems, and distills. Raises ValueError for what cannot be read, and as `distill`."""
    expert = author(cfg.expert, cfg.step, cfg.ema, cfg.rows)
    with contextlib.closing(expert.rollouts):
        judges = {"judge": judge_of(cfg.judge)} if cfg.judge.model else {}
        rewards = rewards_named(cfg.rewards, cfg.reward, judges)
        ask = ask_of(cfg.judge) if cfg.preferences else None
        return distill(cfg, problems_of(cfg, expert.tokenizer), expert, rewards, ask)


def problems_of(cfg: DistillConfig, tokenizer: Any) -> list[Problem]:
    """The training questions, none of those held out; each once, in the order of its source."""
    prompts = load(in_files(cfg.prompts, Path(cfg.out_dir), "prompts.sources"), tokenizer).train.all()
    chosen = prompts[: cfg.problems] if cfg.problems else prompts
    return [{"prompt": prompt.prompt, **prompt.columns} for prompt in chosen]


def distill(
    cfg: DistillConfig,
    problems: Sequence[Problem],
    expert: Author,
    rewards: Rewards,
    ask: Ask | None = None,
) -> data_card.Card:
    """Draws what is not drawn yet, and writes rows, card and picture into `cfg.out_dir`.

    Args:
        problems: rows with "prompt" (messages), the columns that the rewards read, and "completion" (messages), the original
            answer, if there is one.
        ask: asks the judge of preferences.

    Raises ValueError: nothing is kept; a prompt that is too long; a folder whose answers were drawn otherwise.
    """
    folder = Path(cfg.out_dir)
    by = cfg.drawn_by() | {"expert": expert.name, "asked": digest(problems)}
    if cfg.judge.model:
        by["judged_by"] = name_of(cfg.judge.model, cfg.judge.step, cfg.judge.ema)
    drawn = Drawn(folder, by, cfg.samples)
    draw(cfg, problems, expert, rewards, drawn)
    answers = [answer_of(line, cfg.right) for line in drawn.lines]
    said = select(answers, cfg.select)
    require_kept(said)
    kept = [answer for answer, reason in zip(answers, said, strict=True) if reason == KEPT]
    rows = [*_originals(cfg, problems, expert.tokenizer), *_samples(cfg, problems, kept)]
    card = _card(cfg, expert, answers, said, rows)
    write_whole(folder / ROWS, json_lines(rows))
    if cfg.judgements:
        write_whole(
            folder / JUDGEMENTS, json_lines(judged(cases_of(problems, answers), cfg.judge.form, cfg.seed))
        )
    if ask is not None:
        with now.doing("judging pairs of answers"):
            results = preferences.judged(ask, preferences.pairs_of(problems, answers), seed=cfg.seed)
        write_whole(folder / PREFERENCES, json_lines(preferences.preferences(results)))
    write_whole(folder / CARD, data_card.as_json(card))
    write_whole(folder / PAGE, data_card.as_markdown(card, folder.name))
    tokens, right = [a.tokens for a in answers], [a.right for a in answers]
    length_plot.draw_answers(tokens, right, [a.tokens for a in kept], folder / PICTURE)
    return card


def draw(
    cfg: DistillConfig, problems: Sequence[Problem], expert: Author, rewards: Rewards, drawn: Drawn
) -> None:
    """Draws and scores the answers that are not in the file yet."""
    sampling = Sampling(cfg.max_tokens, tuple(expert.tokenizer.stop_ids), cfg.temperature, cfg.top_p)
    system = cfg.system if cfg.with_system else ""
    for first in range(drawn.problems, len(problems), cfg.at_once):
        some = problems[first : first + cfg.at_once]
        with now.doing(f"drawing answers to problems {first + 1} to {first + len(some)} of {len(problems)}"):
            drawn.add(answered(expert, some, cfg.samples, sampling, rewards, cfg.seed, system, first))


def digest(problems: Sequence[Problem]) -> str:
    """Of the problems in their order: answers belong to these."""
    return hashlib.sha256(json_lines(problems).encode()).hexdigest()[:16]


# --- rows -----------------------------------------------------------------------------------------------------------


def _originals(cfg: DistillConfig, problems: Sequence[Problem], tokenizer: Any) -> Iterator[dict[str, Any]]:
    """<problem, original answer>, of the problems that have one."""
    for i, problem in enumerate(problems):
        completion = problem.get("completion")
        if cfg.original and completion:
            tokens = len(tokenizer.encode(completion[-1]["content"])) + 1
            yield _row("original", i, list(problem["prompt"]), completion, tokens) | _options(problem)


def _samples(
    cfg: DistillConfig, problems: Sequence[Problem], kept: Sequence[Answer]
) -> Iterator[dict[str, Any]]:
    """<system prompt, problem, the expert's answer>."""
    for answer in kept:
        said = [{"role": "assistant", "content": answer.text}]
        problem = problems[answer.problem]
        prompt = as_asked(cfg.system, problem)
        yield _row("expert", answer.problem, prompt, said, answer.tokens) | _options(problem)


def _row(kind: str, problem: int, prompt: Any, completion: Any, tokens: int) -> dict[str, Any]:
    return {"prompt": prompt, "completion": completion, "kind": kind, "problem": problem, "tokens": tokens}


def _options(problem: Problem) -> dict[str, Any]:
    """What the chat template was told beside the messages."""
    return {name: problem[name] for name in ("tools", "chat_template_kwargs") if problem.get(name)}


def cases_of(problems: Sequence[Problem], answers: Sequence[Answer]) -> list[Case]:
    """Answers whose truth is known, to problems with a worked answer and a reference; as a judge reads them."""
    cases = []
    for answer in answers:
        problem = problems[answer.problem]
        completion, reference = problem.get("completion"), problem.get("answer")
        response = summary(answer.text)
        if completion and reference is not None and response:
            question, worked = problem["prompt"][-1]["content"], completion[-1]["content"]
            cases.append(Case(question, str(reference), worked, response, answer.right))
    return cases


def judged(cases: Sequence[Case], form: str, seed: int) -> Iterator[dict[str, Any]]:
    """Judgements with their reasons: of right and wrong answers, as many of each, and of pairs, in both orders."""
    yield from judgements.worked(judgements.balanced(cases, seed), form)
    for right, wrong in judgements.pairs(cases):
        yield from judgements.paired(right, wrong)


def _card(
    cfg: DistillConfig,
    expert: Author,
    answers: Sequence[Answer],
    said: Sequence[str],
    rows: Sequence[Mapping[str, Any]],
) -> data_card.Card:
    kinds = dict.fromkeys(row["kind"] for row in rows)
    tokens = {kind: [row["tokens"] for row in rows if row["kind"] == kind] for kind in kinds}
    settings = data_card.flat(dataclasses.asdict(cfg))
    return {"expert": expert.name} | data_card.card_of(answers, said, tokens) | {"settings": settings}
