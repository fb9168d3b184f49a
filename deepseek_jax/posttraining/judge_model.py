"""The model behind a `Judge`: a checkpoint of its own, such as a generative reward model, or the policy, by its own votes."""

import dataclasses
from typing import Any

from deepseek_jax.checks import choice, ranges, require
from deepseek_jax.posttraining.asking import AskRollouts
from deepseek_jax.posttraining.author import Author, author
from deepseek_jax.posttraining.rewards import RewardFunction
from deepseek_jax.posttraining.rewards.judge import Judge
from deepseek_jax.posttraining.rollouts import Sampling

POLICY = "policy"


@dataclasses.dataclass(frozen=True)
class JudgeConfig:
    """The reward "judge": what a model thinks of an answer (`rewards/judge.py`)."""

    # folder of its checkpoint, a run's or of Hugging Face; "policy": the model that is trained judges itself; empty: none
    model: str = ""
    step: int | None = None  # which checkpoint of a run; None: the newest
    ema: bool = False  # the averaged parameters of a run
    form: str = (
        "truth"  # "reference" (does the answer match the row's?), "truth" (is it right?), "score" (1 to 10)
    )
    votes: int = 1  # judgements of each answer; the majority counts, of scores the mean
    principles: tuple[str, ...] = ()  # to judge by
    reads: str = "summary"  # of an answer: what is behind its reasoning, or "all"
    column: str = "answer"  # of the reference
    max_tokens: int = 256  # of a judgement, at most
    temperature: float = 1.0  # of drawing one; 0, greedy, makes all votes alike
    rows: int = 64  # judgements that a model of its own writes at the same time
    seed: int = 0  # of drawing them

    def __post_init__(self):
        choice("judge.form", self.form, ("reference", "truth", "score"))
        choice("judge.reads", self.reads, ("summary", "all"))
        ranges("judge", self, "votes max_tokens rows", 1, 1 << 31)
        ranges("judge", self, "temperature", 0, 1e6)
        ranges("judge", self, "seed", 0, (1 << 32) - 1)
        require(
            self.temperature > 0 or self.votes == 1,
            f"judge.temperature=0 makes judge.votes={self.votes} alike: set votes to 1, or a temperature",
        )


def ask_of(cfg: JudgeConfig, policy: Author | None = None) -> AskRollouts:
    """Asks the model of a config. policy: the one that is trained, for judge.model="policy".

    Raises ValueError: no model, or as `author`.
    """
    require(bool(cfg.model), 'a judge needs judge.model: the folder of a checkpoint, or "policy"')
    own = cfg.model == POLICY
    require(not own or policy is not None, 'judge.model="policy": nothing is trained here, name a checkpoint')
    speaker = policy if own and policy is not None else author(cfg.model, cfg.step, cfg.ema, cfg.rows)
    sampling = Sampling(cfg.max_tokens, tuple(speaker.tokenizer.stop_ids), cfg.temperature)
    return AskRollouts(speaker.rollouts, speaker.tokenizer, sampling, speaker.positions, cfg.seed)


def judge_of(cfg: JudgeConfig, policy: Author | None = None) -> Judge:
    """The reward of a config; arguments and errors are those of `ask_of`."""
    return Judge(ask_of(cfg, policy), cfg.form, cfg.votes, cfg.principles, cfg.reads, cfg.column)


def named_by(cfg: JudgeConfig) -> dict[str, RewardFunction]:
    """The name of the judge, where there is one, for a check of rewards' names: no model is loaded, and none can be asked."""

    def nobody(**given: Any) -> list[float | None]:
        raise AssertionError("no judge was made")

    return {"judge": nobody} if cfg.model else {}
