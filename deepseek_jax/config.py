"""Configuration of a training run: frozen, validated dataclasses; the model's stands in `model_config.py`.

`Config` is the frozen whole; `from_config_dict` builds it once from a `ml_collections.ConfigDict` and names the
nearest valid key for every mistake. Source: technical report section 4.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, TypeVar, overload

from deepseek_jax.checks import build as build
from deepseek_jax.checks import choice, ranges, require, shown
from deepseek_jax.model_config import ModelConfig
from deepseek_jax.model_config import YarnConfig as YarnConfig
from deepseek_jax.precision.policy import PRESETS

PRECISIONS = tuple(PRESETS)
EXCHANGES = ("flat", "two_hop")  # of tokens and experts: `parallel/exchange/dispatcher.py`
DISPATCH_FORMATS = ("same", "bf16", "fp8", "fp8_ue8m0")  # `parallel/exchange/wire.py`
COMBINE_FORMATS = ("same", "bf16")
PIPELINE_SCHEDULES = ("dualpipe", "dualpipe_v", "zero_bubble", "one_f_one_b", "gpipe")
REMAT = ("none", "deepseek", "full")

# Larger numbers are refused by name: they would end in memory or time that no machine has.
SEEDS = 1 << 32
_MANY, _LONG = 1 << 31, 1e18


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where text comes from and how it becomes windows of tokens (report section 4.1)."""

    source: str = "stdlib"  # "stdlib": the interpreter's own library sources; else a glob, a folder or a file
    # instead of `source`, several: ("web/*.jsonl=0.7", "code/*.py=0.3"), by weight
    sources: tuple[str, ...] = ()
    validation: str | None = None  # a glob; None: hold out `validation_fraction` of the documents
    validation_fraction: float = 0.05  # share of the documents held out, if `validation` is None
    text_field: str = "text"  # field of JSON lines, column of Parquet files
    # None: train a byte-level BPE of `vocab_size`; else a tokenizer.json, or a folder with one
    tokenizer: str | None = None
    vocab_size: int = 4096  # ids to train a tokenizer to; the most a loaded one may have
    seq_len: int = 256  # tokens of a window
    fim_rate: float = 0.1  # share of documents turned into fill-in-the-middle (section 4.1)
    split_punctuation_rate: float = 0.0  # share of punctuation-newline tokens that are split (section 4.1)
    segments: bool = False  # True: documents packed into one window do not see each other
    seed: int = 0  # decides order, FIM and splits
    cache_dir: str = ".cache"  # tokenizer and token ids, for the next run

    def __post_init__(self):
        ranges("data", self, "seq_len", 1, 1 << 30)
        ranges("data", self, "vocab_size", 1, 1 << 26)
        ranges("data", self, "seed", 0, SEEDS - 1)
        for name in ("source", "text_field", "cache_dir"):
            require(getattr(self, name) != "", f"data.{name} is empty")
        for name in ("fim_rate", "split_punctuation_rate", "validation_fraction"):
            value = getattr(self, name)
            require(0.0 <= value <= 1.0, f"data.{name}={value} must lie in [0, 1]")
        self.weighted_sources()

    def weighted_sources(self) -> list[tuple[str, float]]:
        """(source, weight) of each source: of `sources`, or `source` alone."""
        found = []
        for entry in self.sources:
            source, _, weight = entry.rpartition("=")
            ok = bool(source) and weight.replace(".", "", 1).isdecimal() and float(weight) > 0
            require(ok, f'data.sources entry {shown(entry)} should be "SOURCE=WEIGHT" with a positive weight')
            found.append((source, float(weight)))
        return found or [(self.source, 1.0)]


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its schedules: those of report section 4.2, or simple ones (`training/schedules.py`).

    Every `*_tokens` is a boundary of the report's 14.8T run; `schedule_tokens` is the length of that run. A shorter
    run scales all boundaries by total_tokens / schedule_tokens, and with schedule "deepseek_v3" the warm-up likewise.
    """

    # the learning rate's: "deepseek_v3", "constant", "cosine" or "wsd" (warm-up, stable, decay)
    schedule: str = "deepseek_v3"
    peak_lr: float = 2.2e-4  # learning rate after the warm-up
    mid_lr: float = 2.2e-5  # deepseek_v3: after the cosine
    final_lr: float = 7.3e-6  # deepseek_v3: at the end
    final_fraction: float = 0.1  # cosine, wsd: of peak_lr, at the end
    decay_fraction: float = 0.2  # wsd: the last part of the run, in which the rate falls linearly
    warmup_steps: int = 2000  # linear from 0; deepseek_v3: a shorter run takes its share of them
    b1: float = 0.9  # decay of the gradient's average
    b2: float = 0.95  # decay of its square's
    eps: float = 1e-8  # added to the root of the latter
    weight_decay: float = 0.1  # decay of matrices, times the learning rate
    clip_norm: float = 1.0  # largest norm of the whole gradient
    moment_dtype: str = "bfloat16"  # or "float32"
    schedule_tokens: float = 14.8e12  # length of the run that the boundaries below are of
    constant_until_tokens: float = 10e12  # peak_lr until here, ...
    cosine_until_tokens: float = 14.3e12  # ... a cosine to mid_lr until here, ...
    mid_until_tokens: float = 14.633e12  # ... mid_lr until here, then final_lr
    batch_start: int = 3072  # sequences of the first step; the batch grows by micro-batches; 0: no ramp
    batch_ramp: bool = False  # the ramp of the batch with other schedules than deepseek_v3, too
    batch_ramp_tokens: float = 469e9  # tokens over which the batch grows to train.batch_size
    gamma: float = 0.001  # step of the routers' correction bias
    gamma_until_tokens: float = 14.3e12  # 0 from here on
    mtp_lambda: float = 0.3  # weight of the MTP loss
    mtp_lambda_final: float = 0.1  # the same from mtp_lambda_until_tokens on
    mtp_lambda_until_tokens: float = 10e12  # see mtp_lambda_final

    def __post_init__(self):
        choice("optimizer.moment_dtype", self.moment_dtype, ("float32", "bfloat16"))
        choice("optimizer.schedule", self.schedule, ("deepseek_v3", "constant", "cosine", "wsd"))
        ranges("optimizer", self, "final_fraction decay_fraction", 0, 1)
        ranges("optimizer", self, "warmup_steps batch_start", 0, _MANY)
        ranges("optimizer", self, "mid_lr final_lr weight_decay gamma mtp_lambda mtp_lambda_final", 0, _LONG)
        boundaries = [field.name for field in dataclasses.fields(self) if field.name.endswith("_tokens")]
        ranges("optimizer", self, " ".join(boundaries), 0, _LONG)
        for name in ("peak_lr", "eps", "clip_norm", "schedule_tokens"):
            value = getattr(self, name)
            require(0 < value < math.inf, f"optimizer.{name}={value} must be positive and finite")
        for name in ("b1", "b2"):
            value = getattr(self, name)
            require(0 < value < 1, f"optimizer.{name}={value} must lie inside (0, 1)")


@dataclasses.dataclass(frozen=True)
class BalanceConfig:
    """Load balancing (section 2.1.2): `loss_free` (bias update + sequence-wise loss) or `classic`.

    The classic loss takes the loads of each device's micro-batch, so it depends on the number of devices.
    """

    mode: str = "loss_free"  # "loss_free", "classic" (an auxiliary loss) or "none"
    seq_alpha: float = 1e-4  # weight of the sequence-wise loss, mode "loss_free"
    classic_alpha: float = 1e-2  # weight of the batch-wise auxiliary loss, mode "classic"

    def __post_init__(self):
        choice("balance.mode", self.mode, ("loss_free", "classic", "none"))
        ranges("balance", self, "seq_alpha classic_alpha", 0, 1e6)


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Size of each mesh axis; expert parallelism spans node x local x tensor. 0 for `data`: whatever is left.

    `tensor` divides the heads inside the attention and the tokens of a sequence outside of it (`parallel/tensor.py`).
    """

    pipe: int = 1  # ranks of the pipeline
    data: int = 0  # replicas; 0: as many as the other axes leave of the devices
    node: int = 1  # nodes over which experts are spread
    local: int = 1  # devices of a node over which they are spread
    tensor: int = 1  # devices that share a sequence and its heads
    # how many layers each stage of the pipeline has, from the first; empty: so that stages cost about alike
    stage_layers: tuple[int, ...] = ()
    # of the pipeline: "dualpipe", "dualpipe_v", "zero_bubble" (ZB1P), "one_f_one_b" or "gpipe"; auto: DualPipe where there are
    # an even number of ranks and micro-batches, at least 2 per rank, else 1F1B
    schedule: str = "auto"
    # micro-batches whose weight gradients may wait at a rank; -1: as many as ZB1P wants, none in the other schedules, which
    # gain less than one tick in fifty by them and need the memory of all products' operands for each
    weight_queue: int = -1
    # over node x local x tensor: "two_hop", "flat" or "replicated"; auto: by mesh
    experts: str = "auto"
    dispatch: str = "auto"  # format of tokens on the way to experts: same (as computed), bf16, fp8, fp8_ue8m0
    combine: str = "auto"  # format of results on the way back: same, bf16; auto: as `precision` says
    # (token, expert) pairs that a device sends, receives and computes in one round, per token of its own; the rest comes
    # in further rounds. Balanced routing needs k, num_experts_per_tok, if perfectly so: give 1.25 k, for one round with
    # a peer that gets a quarter more than its share. 0: one round, with buffers for the worst routing
    receive: float = 0.0
    zero: bool = False  # ZeRO-1: master weights and moments divided over all axes that divide tokens
    # two halves of each device's batch in flight: one computes while the other's tokens travel; with a pipeline, the forward
    # and the backward of a pair of micro-batches
    overlap: bool = False
    comm_channels: int = 0  # NCCL channels, so many SMs, that a collective may take on GPUs; 0: NCCL decides

    def __post_init__(self):
        ranges("mesh", self, "data receive", 0, _MANY)
        ranges("mesh", self, "pipe node local tensor", 1, _MANY)
        ranges("mesh", self, "comm_channels", 0, 64)
        ranges("mesh", self, "weight_queue", -1, _MANY)
        layers_ok = all(0 <= n <= _MANY for n in self.stage_layers)
        require(layers_ok, f"mesh.stage_layers={shown(self.stage_layers)} must be numbers of layers >= 0")
        choice("mesh.schedule", self.schedule, ("auto", *PIPELINE_SCHEDULES))
        choice("mesh.experts", self.experts, ("auto", *EXCHANGES, "replicated"))
        choice("mesh.dispatch", self.dispatch, ("auto", *DISPATCH_FORMATS))
        choice("mesh.combine", self.combine, ("auto", *COMBINE_FORMATS))


@dataclasses.dataclass(frozen=True)
class DistributedConfig:
    """Several processes that train together (`parallel/processes/joining.py`).

    With nothing set: what SLURM, Kubernetes, Open MPI or `experiments.launch` say in the environment, else one
    process. What is set here comes before the environment.
    """

    coordinator: str = ""  # HOST:PORT at which process 0 listens
    processes: int = 0  # how many; 0: from the environment
    process: int = -1  # which one this is, from 0; -1: from the environment
    cluster: str = "auto"  # "none": do not look at the environment
    start_timeout: int = 300  # seconds until all processes must have met
    heartbeat_timeout: int = 20  # seconds of silence after which a process counts as dead and the others exit

    def __post_init__(self):
        choice("distributed.cluster", self.cluster, ("auto", "none"))
        host, _, port = self.coordinator.rpartition(":")
        ok = not self.coordinator or (bool(host) and port.isdecimal() and 0 < int(port) < 1 << 16)
        require(ok, f"distributed.coordinator={self.coordinator!r} should be HOST:PORT, as 10.0.0.1:1234")
        ranges("distributed", self, "processes", 0, _MANY)
        ranges("distributed", self, "process", -1, _MANY)
        # JAX counts them in milliseconds, 32 bits.
        ranges("distributed", self, "start_timeout heartbeat_timeout", 1, 1_000_000)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Length, batch and bookkeeping of a run."""

    steps: int = 300  # length of the whole run
    batch_size: int = 16  # sequences per step, after the ramp
    grad_accumulation: int = 1  # micro-batches of a step, one after the other
    # what the backward pass recomputes: "deepseek": norms, MLA up-projections; "full": all
    remat: str = "none"
    detached_mtp: bool = False  # MTP modules learn without moving the rest of the model
    # on GPUs: sums in a fixed order, so that resuming is bitwise there too; slower
    deterministic: bool = False
    loss_chunk: int = 1024  # tokens whose logits are in memory at once
    ema_decay: float = 0.999  # decay of the average of the parameters, per update
    ema_every: int = 10  # steps between updates of the host-side average
    seed: int = 0  # decides the first weights
    eval_every: int = 100  # steps between validations
    eval_windows: int = 64  # windows of the validation documents to evaluate, at most
    checkpoint_every: int = 100  # steps between checkpoints
    keep: int = 3  # newest checkpoints that stay
    keep_every: int = 0  # checkpoints of multiples of so many steps stay as well; 0: none
    keep_best: int = 0  # so many of the smallest validation loss stay as well, each evaluated when written
    max_bad_steps: int = 5  # steps in a row without a finite loss, after which the run ends
    out_dir: str = "runs/tiny"  # checkpoints, metrics, report; a run there is resumed
    init_from: str = ""  # weights to start from: a run, a checkpoint, or a Hugging Face folder
    frozen: str = ""  # regular expression over parameters' paths; those stay as they are: "embed|moe.*gate"
    sample_tokens: int = 96  # length of the completions shown at the end; 0: none are made
    wandb: str = ""  # project at Weights & Biases that watches the run, too; empty: none

    def __post_init__(self):
        choice("train.remat", self.remat, REMAT)
        ranges("train", self, "steps batch_size grad_accumulation loss_chunk keep max_bad_steps", 1, _MANY)
        ranges("train", self, "ema_every eval_every eval_windows checkpoint_every", 1, _MANY)
        ranges("train", self, "keep_every keep_best sample_tokens", 0, _MANY)
        ranges("train", self, "seed", 0, SEEDS - 1)
        require(self.out_dir != "", "train.out_dir is empty")
        require(
            self.batch_size % self.grad_accumulation == 0,
            f"train.batch_size={self.batch_size} must be divisible by grad_accumulation={self.grad_accumulation}",
        )
        require(0.0 <= self.ema_decay < 1.0, f"train.ema_decay={self.ema_decay} must lie in [0, 1)")


@dataclasses.dataclass(frozen=True)
class Config:
    """The frozen whole of a training run."""

    # --- sections
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    balance: BalanceConfig = dataclasses.field(default_factory=BalanceConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    distributed: DistributedConfig = dataclasses.field(default_factory=DistributedConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    precision: str = "bf16"  # preset of the linear layers: one of PRECISIONS

    def __post_init__(self):
        choice("precision", self.precision, PRECISIONS)
        require(
            self.data.tokenizer is not None or self.model.vocab_size >= self.data.vocab_size,
            f"model.vocab_size={self.model.vocab_size} is smaller than data.vocab_size={self.data.vocab_size}",
        )
        require(
            self.data.seq_len <= self.model.max_position_embeddings,
            f"data.seq_len={self.data.seq_len} exceeds model.max_position_embeddings="
            f"{self.model.max_position_embeddings}; raise it and set model.rope_scaling",
        )

    @property
    def remarks(self) -> tuple[str, ...]:
        """What a dry run should say of settings that mean something only when the data are read."""
        return ()

    @property
    def batch_arrays(self) -> dict[str, str]:
        """Name -> dtype of the arrays [b, seq_len + 1] that a batch of this run holds."""
        packed = {"segments": "int32", "positions": "int32"} if self.data.segments else {}
        return {"tokens": "int32"} | packed


C = TypeVar("C", bound=Config)


# --- from and to mappings ---------------------------------------------------------------------------------


@overload
def from_config_dict(cfg: Any) -> Config: ...
@overload
def from_config_dict(cfg: Any, whole: type[C]) -> C: ...
def from_config_dict(cfg: Any, whole: Any = Config) -> Any:
    """The frozen `Config` of an `ml_collections.ConfigDict` or of any nested mapping.

    whole: a dataclass that derives from `Config`, for runs with more sections.

    Raises ValueError naming the key, and the nearest valid one, for unknown keys, wrong types and bad values.
    """
    values = cfg.to_dict() if hasattr(cfg, "to_dict") else cfg
    if not isinstance(values, Mapping):
        raise ValueError(
            f"a config should be a mapping with the keys of {whole.__name__}, not {shown(values)}"
        )
    return build(whole, values)


def to_dict(config: Any) -> dict[str, Any]:
    """Nested plain dict of a config dataclass: JSON-serialisable, and `build` of it gives it back."""
    return dataclasses.asdict(config)
