"""Configuration of a GRPO run: that of a training run, with where prompts come from, how they are answered, what answers are
worth, and what is learned from them."""

import dataclasses

from deepseek_jax.checks import choice, ranges, require
from deepseek_jax.data.prompts import PromptConfig
from deepseek_jax.posttraining.from_weights import FromWeights
from deepseek_jax.posttraining.grpo_config import GRPOLossConfig
from deepseek_jax.posttraining.judge_model import JudgeConfig, named_by
from deepseek_jax.posttraining.rewards import RewardConfig, rewards_named
from deepseek_jax.posttraining.rollouts import Sampling
from deepseek_jax.posttraining.task_files import check_tasks

_MANY = 1 << 31


@dataclasses.dataclass(frozen=True)
class RolloutConfig:
    """How answers are sampled. A rollout has `train.batch_size` x `updates` / `samples` prompts."""

    samples: int = 16  # answers to each prompt: a group
    updates: int = 1  # steps of train.batch_size answers each that one rollout is for
    max_tokens: int = 128  # of an answer, its end token included
    temperature: float = 1.0  # of what is sampled, and of what is learned
    top_p: float = 1.0  # see serving.sampling.Sampling
    top_k: int = 0  # see serving.sampling.Sampling
    # train over the ids that each token was drawn from, where top_p or top_k leaves ids out
    keep_mask: bool = True
    keep_routes: bool = True  # train with the experts that sampling chose
    # whose log-probabilities are those before the updates, where there are several: "trainer", a pass of its own; "sampler"
    old: str = "trainer"
    # values of the sampler's own programs in training, bit for bit (posttraining/exact.py); old is "sampler" then
    exact: bool = False
    reference_every: int = 0  # steps after which the reference becomes the model as it is then; 0: never
    # dynamic sampling: so many times at most, prompts whose answers are all worth the same are replaced by others
    resample: int = 0
    replicas: int = 0  # processes under Ray that sample, an engine in each; 0: this process does
    # of replicas: rollouts begun before their turn, while the trainer trains, with weights older by as many rollouts. A resumed run
    # begins them anew, with the weights of its checkpoint, and so is not bitwise the same
    ahead: int = 0
    rows: int = 64  # sequences that the engine runs at the same time
    # of the engine's cache, 64 tokens each; None: as many as all rows need, or as memory allows. On a GPU that may differ from start
    # to start, and with it which answers are computed side by side: say how many, so that a resumed run is bitwise the same
    pages: int | None = None
    buckets: int = 2  # programs, for windows of data.seq_len tokens, of half as many, of a quarter, ...
    eval_prompts: int = 64  # held-out prompts that are answered every train.eval_every steps
    eval_samples: int = 4  # answers to each, of which pass@1 is the mean and pass@eval_samples the best
    eval_temperature: float = 1.0  # of these
    samples_shown: int = 3  # of the best and of the worst of them, at the end

    def __post_init__(self):
        ranges(
            "rollouts", self, "samples updates max_tokens rows buckets eval_prompts eval_samples", 1, _MANY
        )
        ranges("rollouts", self, "reference_every resample replicas ahead samples_shown", 0, _MANY)
        choice("rollouts.old", self.old, ("trainer", "sampler"))
        require(
            self.temperature > 0,
            f"rollouts.temperature={self.temperature} must be > 0: greedy answers are all alike",
        )
        require(
            self.samples > 1,
            "rollouts.samples=1: an answer is compared with the others of its group; give 2 or more",
        )
        require(
            self.reference_every % self.updates == 0,
            f"rollouts.reference_every={self.reference_every} must be a multiple of rollouts.updates={self.updates}: the "
            "reference is replaced between rollouts",
        )
        require(
            not self.exact or self.updates == 1 or not self.keep_routes,
            f"rollouts.exact with updates={self.updates}: the later ones' values are routed by the weights as they are then; set "
            "rollouts.keep_routes=False",
        )
        require(
            self.ahead == 0 or self.replicas > 0,
            f"rollouts.ahead={self.ahead} needs processes that sample while this one trains: set rollouts.replicas",
        )
        require(
            not self.ahead or not self.resample,
            "rollouts.resample looks at a rollout's rewards before the next prompts are asked: set it, or rollouts.ahead, to 0",
        )
        require(
            not self.exact or not self.replicas,
            "rollouts.exact needs the engine in this process: set replicas to 0",
        )
        self.sampling(())
        self.evaluation(())

    def sampling(self, stop_ids: tuple[int, ...]) -> Sampling:
        """Of answers that are learned from."""
        cut = self.top_p < 1 or self.top_k > 0
        return Sampling(
            self.max_tokens,
            stop_ids,
            self.temperature,
            self.top_p,
            self.top_k,
            kept=self.keep_mask and cut,
            routes=self.keep_routes,
        )

    def evaluation(self, stop_ids: tuple[int, ...]) -> Sampling:
        """Of answers to held-out prompts."""
        return Sampling(self.max_tokens, stop_ids, self.eval_temperature, self.top_p, self.top_k)


@dataclasses.dataclass(frozen=True)
class GRPOConfig(FromWeights):
    """The frozen whole of a GRPO run."""

    rollouts: RolloutConfig = dataclasses.field(default_factory=RolloutConfig)
    loss: GRPOLossConfig = dataclasses.field(default_factory=GRPOLossConfig)
    # the questions; a source may be a task as well, "tasks:addition/2" (posttraining/tasks.py)
    prompts: PromptConfig = dataclasses.field(default_factory=PromptConfig)
    rewards: tuple[str, ...] = (
        "answer",
    )  # "NAME" or "NAME=WEIGHT"; the first says whether an answer is right
    reward: RewardConfig = dataclasses.field(default_factory=RewardConfig)
    judge: JudgeConfig = dataclasses.field(default_factory=JudgeConfig)

    def __post_init__(self):
        super().__post_init__()
        check_tasks(self.prompts.sources, self.prompts.validation, "prompts.sources")
        rewards_named(self.rewards, self.reward, named_by(self.judge))
        train, rollouts = self.train, self.rollouts
        require(
            train.batch_size % rollouts.samples == 0,
            f"train.batch_size={train.batch_size} answers must be whole groups of rollouts.samples={rollouts.samples}",
        )
        for name in ("steps", "checkpoint_every", "eval_every"):
            value = getattr(train, name)
            require(
                value % rollouts.updates == 0,
                f"train.{name}={value} must be a multiple of rollouts.updates={rollouts.updates}: checkpoints and "
                "evaluations lie between rollouts",
            )
        require(
            rollouts.max_tokens <= self.data.seq_len,
            f"rollouts.max_tokens={rollouts.max_tokens} leaves no room for a prompt in data.seq_len={self.data.seq_len}",
        )
        loss, compared = self.loss, self.old_of_sampler and rollouts.updates > 1
        require(
            not rollouts.ahead or compared or loss.off_policy_delta > 0 or loss.importance != "none",
            f"rollouts.ahead={rollouts.ahead}: answers are of older weights, and nothing in the loss heeds it; set "
            "loss.off_policy_delta, or loss.importance",
        )

    @property
    def logprobs(self) -> tuple[str, ...]:
        """Of the batches' tokens, beside "sampler_logp": "old_logp", before the updates, where there are several; "ref_logp", of
        the reference; "exact_logp", of the sampler's programs with the weights as they are."""
        asked = {
            "old_logp": self.rollouts.updates > 1,
            "ref_logp": self.loss.beta,
            "exact_logp": self.rollouts.exact,
        }
        return tuple(name for name, wanted in asked.items() if wanted)

    @property
    def old_of_sampler(self) -> bool:
        return self.rollouts.old == "sampler" or self.rollouts.exact

    @property
    def prompts_each(self) -> int:
        """Prompts of one rollout."""
        return self.train.batch_size * self.rollouts.updates // self.rollouts.samples
