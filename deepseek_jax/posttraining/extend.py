"""Context extension (report section 4.3): phases of longer and longer sequences under one YaRN factor.

Each phase is a run of `training/loop.py: Trainer` in a folder of its own, which starts from the weights of the one before.
The model's positions are the final ones from the first step of the first phase on. The learning rate is constant, the
routers' bias stays as it is, and the MTP loss keeps the weight that it ended with.

Beside the phases, for those who want to know what they gave: `recall`, a share of texts in which something said once is
asked for later, without which a small model trained on code cannot answer at all; and `control`, the same steps on as many
tokens at the length before.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from deepseek_jax.checkpoints.files import run_folder, steps_in
from deepseek_jax.checks import ranges, require, shown
from deepseek_jax.config import Config, ModelConfig
from deepseek_jax.evaluation.needle import NeedleConfig
from deepseek_jax.parallel.processes.together import from_first
from deepseek_jax.training.start import Start

# What a context extension changes of the model, because that is what is asked for.
POSITIONS = ("model.rope_scaling", "model.max_position_embeddings")
# What says nothing of the function that the weights are: how it is computed, and how they began.
_HARMLESS = ("model.dtype", "model.initializer_range")
# Keys of a run that the phases say, and what says them.
SAID_ELSEWHERE = {
    "train.steps": "phases.steps",
    "optimizer.peak_lr": "phases.lr",
    "optimizer.schedule": "phases.lr, which is constant",
    "optimizer.warmup_steps": "phases.lr, which is constant",
    "optimizer.gamma": "the extension: the routers' bias stays as it is",
}
_WARMUP = 20  # steps, of those that teach recall
TEACH, PHASE, CONTROL = "recall", "phase", "control"  # names of folders


class Phase(NamedTuple):
    """Tokens of a sequence, sequences of a step, steps, learning rate, and micro-batches of a step."""

    seq_len: int
    batch_size: int
    steps: int
    lr: float
    grad_accumulation: int = 1


@dataclasses.dataclass(frozen=True)
class PhasesConfig:
    """The phases: of each key an entry per phase."""

    seq_len: tuple[int, ...] = ()  # tokens of a sequence
    batch_size: tuple[int, ...] = ()  # sequences of a step
    steps: tuple[int, ...] = ()  # length
    lr: tuple[float, ...] = ()  # learning rate, from the first step to the last
    grad_accumulation: tuple[int, ...] = ()  # micro-batches of a step; empty: one in each phase

    def __post_init__(self):
        counts = {field.name: len(getattr(self, field.name)) for field in dataclasses.fields(self)}
        if not self.grad_accumulation:
            del counts["grad_accumulation"]
        entries = ", ".join(f"phases.{name} has {count}" for name, count in counts.items())
        require(len(set(counts.values())) == 1, f"each phase needs an entry of each key: {entries}")
        require(bool(self.seq_len), "there is no phase: set phases.seq_len, batch_size, steps and lr")
        longer = all(a < b for a, b in zip(self.seq_len, self.seq_len[1:], strict=False))
        require(longer, f"phases.seq_len={shown(self.seq_len)} must grow from phase to phase")
        require(all(0 < lr < 1 for lr in self.lr), f"phases.lr={shown(self.lr)} must lie inside (0, 1)")

    def __iter__(self) -> Iterator[Phase]:
        accumulation = self.grad_accumulation or (1,) * len(self.seq_len)
        columns = (self.seq_len, self.batch_size, self.steps, self.lr, accumulation)
        return map(Phase._make, zip(*columns, strict=True))


@dataclasses.dataclass(frozen=True)
class RecallConfig:
    """Texts to learn recall from (`evaluation/needle.py: documents`), for models that cannot do it."""

    share: float = 0.0  # of the windows of every phase, the control's too
    steps: int = 0  # before the phases, at data.seq_len and without YaRN, from where all models that are compared start
    steps_share: float = 0.5  # of the windows of these steps
    lr: float = 1e-3  # learning rate of these steps

    def __post_init__(self):
        ranges("recall", self, "share steps_share", 0, 0.99)
        ranges("recall", self, "steps", 0, 1 << 31)
        ranges("recall", self, "lr", 0, 1)
        taught = self.steps == 0 or self.steps_share > 0
        require(taught, f"recall.steps={self.steps} needs a recall.steps_share")


@dataclasses.dataclass(frozen=True)
class ExtendConfig(Config):
    """A run's config, of which data.seq_len is the length trained with before, and what is extended to."""

    phases: PhasesConfig = dataclasses.field(default_factory=PhasesConfig)
    recall: RecallConfig = dataclasses.field(default_factory=RecallConfig)
    needle: NeedleConfig = dataclasses.field(default_factory=NeedleConfig)
    control: bool = False  # as many steps and tokens of data.seq_len, with YaRN as well, for comparison

    def __post_init__(self):
        super().__post_init__()
        yarn, longest = self.model.rope_scaling, max(self.phases.seq_len)
        if yarn is None:
            raise ValueError("model.rope_scaling=None: a context is extended by YaRN; set its factor")
        original = yarn.original_max_position_embeddings
        require(
            original == self.data.seq_len,
            f"model.rope_scaling.original_max_position_embeddings={original} is the length trained with before, and that is "
            f"data.seq_len={self.data.seq_len}",
        )
        reached = int(yarn.factor * original)
        require(
            longest <= min(reached, self.model.max_position_embeddings),
            f"phases.seq_len={longest} exceeds what model.rope_scaling.factor={yarn.factor:g} reaches ({reached}) or "
            f"model.max_position_embeddings={self.model.max_position_embeddings}: raise them",
        )
        require(
            max((self.data.seq_len, *self.needle.lengths)) <= self.model.max_position_embeddings,
            f"needle.lengths={shown(self.needle.lengths)} exceed model.max_position_embeddings="
            f"{self.model.max_position_embeddings}",
        )
        shortest = min(self.phases.seq_len)
        fits = all(n % self.data.seq_len == 0 for n in self.phases.seq_len) or not self.control
        require(
            fits, f"control: phases.seq_len={shown(self.phases.seq_len)} are no multiples of data.seq_len"
        )
        require(shortest > self.data.seq_len, f"phases.seq_len={shortest} is no longer than data.seq_len")


# --- the runs of an extension -----------------------------------------------------------------------------------------


class Stage(NamedTuple):
    """One run: its folder's name, and its config."""

    name: str
    cfg: Config

    @property
    def folder(self) -> Path:
        return Path(self.cfg.train.out_dir)

    def done(self) -> bool:
        """Whether its last step lies in its folder; the same on all processes, which must all call it."""
        steps = steps_in(self.folder / "checkpoints")
        return from_first(max(steps, default=-1)) >= self.cfg.train.steps


def before(model: ModelConfig) -> ModelConfig:
    """The model as it was trained before: without YaRN."""
    return dataclasses.replace(model, rope_scaling=None)


def stages(cfg: ExtendConfig) -> list[Stage]:
    """The runs, in their order: `recall`, `phase_1`, ..., and `control_1`, ... Each starts from the one before it, the first
    control from where the first phase does.
    """
    start, found = cfg.train.init_from, []
    if cfg.recall.steps:
        taught = Phase(cfg.data.seq_len, cfg.train.batch_size, cfg.recall.steps, cfg.recall.lr)
        accumulation = cfg.train.grad_accumulation
        found.append(_stage(cfg, TEACH, taught._replace(grad_accumulation=accumulation), start))
        start = str(found[-1].folder)
    arms = {PHASE: list(cfg.phases)}
    if cfg.control:
        arms[CONTROL] = [_at(cfg.data.seq_len, phase) for phase in cfg.phases]
    for arm, phases in arms.items():
        source = start
        for number, phase in enumerate(phases, 1):
            found.append(_stage(cfg, f"{arm}_{number}", phase, source))
            source = str(found[-1].folder)
    return found


def _at(seq_len: int, phase: Phase) -> Phase:
    """As many tokens, in sequences of `seq_len`."""
    return phase._replace(seq_len=seq_len, batch_size=phase.batch_size * phase.seq_len // seq_len)


def _stage(cfg: ExtendConfig, name: str, phase: Phase, source: str) -> Stage:
    values = {field.name: getattr(cfg, field.name) for field in dataclasses.fields(Config)}
    run = Config(**values)
    folder = Path(cfg.train.out_dir) / name
    sources, share = run.data.sources, cfg.recall.steps_share if name == TEACH else cfg.recall.share
    if share:
        own = [(s, w * (1 - share)) for s, w in _shares(run)]
        recall = (str(recall_file(cfg, phase.seq_len)), share)
        sources = tuple(f"{s}={w:.6f}" for s, w in (*own, recall))
    tokenizer = run.data.tokenizer or run_folder(cfg.train.init_from) or None
    stage = dataclasses.replace(
        run,
        model=before(run.model) if name == TEACH else run.model,
        data=dataclasses.replace(run.data, seq_len=phase.seq_len, sources=sources, tokenizer=tokenizer),
        optimizer=dataclasses.replace(
            run.optimizer,
            schedule="constant",
            peak_lr=phase.lr,
            warmup_steps=min(_WARMUP, phase.steps // 10) if name == TEACH else 0,
            batch_ramp=False,
            gamma=0.0,
            mtp_lambda_until_tokens=0,
        ),
        train=dataclasses.replace(
            run.train,
            steps=phase.steps,
            batch_size=phase.batch_size,
            grad_accumulation=phase.grad_accumulation,
            init_from=source,
            out_dir=str(folder),
        ),
    )
    return Stage(name, stage)


def _shares(cfg: Config) -> list[tuple[str, float]]:
    sources = cfg.data.weighted_sources()
    total = sum(weight for _, weight in sources)
    return [(source, weight / total) for source, weight in sources]


def recall_file(cfg: ExtendConfig, seq_len: int) -> Path:
    """Where the texts lie from which recall is learned in windows of `seq_len`."""
    return Path(cfg.train.out_dir) / f"recall_{seq_len}.jsonl"


# --- what is accepted of the weights ------------------------------------------------------------------------------------


def check_source(start: Start, cfg: ExtendConfig) -> list[str]:
    """In what the model differs from the weights' own: in its positions alone, because that is asked for.

    Raises ValueError for any other difference, all named, and for YaRN that takes another length for the one trained with
    than the run that the weights are of.
    """
    other = [x for x in start.differences if not x.startswith((*POSITIONS, *_HARMLESS))]
    require(
        not other,
        f"train.init_from={cfg.train.init_from} differs in more than its positions: {'; '.join(other)}; set these keys to "
        "what they are there",
    )
    length = start.trained_length
    require(
        length in (None, cfg.data.seq_len),
        f"train.init_from={cfg.train.init_from} was trained on windows of {length} tokens, and data.seq_len="
        f"{cfg.data.seq_len}: YaRN stretches the positions really trained with",
    )
    return start.differences
