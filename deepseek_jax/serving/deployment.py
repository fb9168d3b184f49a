"""A deployment unit: the devices that serve a model together, and how (report section 3.4).

Deployment  <- configs/serve_*.py:get_config()      `from_config_dict`
.options    -> `Options` of the engine
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from deepseek_jax.checks import build, choice, ranges, require, shown
from deepseek_jax.config import MeshConfig, ModelConfig
from deepseek_jax.parallel.mesh import named_devices
from deepseek_jax.serving.options import CACHES, Options

ROLES = ("both", "prefill", "decode")
WEIGHTS = ("fp8", "bf16")
POLICY = "deepseek_fp8"  # preset by which weights in FP8 are multiplied


@dataclasses.dataclass(frozen=True)
class Deployment:
    """One unit. Raises ValueError for experts that do not divide over its devices, and for values that cannot be."""

    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=lambda: MeshConfig(data=1))
    role: str = "both"  # what it computes: "prefill" of prompts, "decode", or "both"
    weights: str = "fp8"  # of linear layers: "fp8", as DeepSeek's checkpoints have them, or "bf16"
    redundant: int = 0  # experts of a layer beyond the model's own, in all: copies of those with much load
    # the shared expert is one more routed expert, which every token chooses; otherwise it lies whole on every device
    shared_routed: bool = False
    rows: int = 32  # sequences that run at the same time, on each device
    max_model_len: int = 4096  # tokens of a sequence, prompt and answer
    chunk: int = 2048  # tokens of prompts that go through the model at once, on each device
    pages: int | None = (
        None  # pages of 64 tokens on each device; None: as many as memory holds, at most those of all rows
    )
    cache: str = "model"  # latents in the dtype of the model, or "fp8"
    drafts: bool = False  # whether the MTP module drafts a token, which the next step verifies

    def __post_init__(self):
        choice("role", self.role, ROLES)
        choice("weights", self.weights, WEIGHTS)
        choice("cache", self.cache, CACHES)
        ranges("", self, "redundant", 0, 1 << 20)
        ranges("", self, "rows max_model_len chunk", 1, 1 << 31)
        longest = self.model.max_position_embeddings
        require(
            self.max_model_len <= longest,
            f"max_model_len={self.max_model_len} exceeds model.max_position_embeddings={longest}",
        )
        require(
            self.mesh.data == 1, f"mesh.data={self.mesh.data}: a unit has its experts once; use mesh.data=1"
        )
        require(
            not self.drafts or self.model.num_nextn_predict_layers > 0,
            "drafts=True: drafts come from the MTP module, and model.num_nextn_predict_layers is 0",
        )
        require(
            not self.shared_routed or self.model.n_shared_experts > 0,
            "shared_routed=True, and model.n_shared_experts is 0: there is none",
        )
        spare = -self.physical_experts % self.devices
        require(
            spare == 0,
            f"{self.physical_experts} experts of a layer, redundant={self.redundant} of them, do not divide over "
            f"{self.devices} devices: redundant={self.redundant + spare} does",
        )

    @property
    def devices(self) -> int:
        return named_devices(self.mesh)

    @property
    def physical_experts(self) -> int:
        """Of a layer, on all devices together."""
        shared = self.model.n_shared_experts if self.shared_routed else 0
        return self.model.n_routed_experts + shared + self.redundant

    @property
    def experts(self) -> int:
        """Of a layer, on each device."""
        return self.physical_experts // self.devices

    @property
    def options(self) -> Options:
        """Of the engine of each device."""
        return Options(
            rows=self.rows,
            max_model_len=self.max_model_len,
            chunk=self.chunk,
            pages=self.pages,
            cache=self.cache,
            drafts=self.drafts,
            redundant=self.redundant or None,
        )


def from_config_dict(cfg: Any) -> Deployment:
    """The frozen `Deployment` of an `ml_collections.ConfigDict` or of any nested mapping.

    Raises ValueError naming the key, and the nearest valid one, for unknown keys, wrong types and bad values.
    """
    values = cfg.to_dict() if hasattr(cfg, "to_dict") else cfg
    require(
        isinstance(values, Mapping),
        f"a config should be a mapping with the keys of {Deployment.__name__}, not {shown(values)}",
    )
    found: Deployment = build(Deployment, values)
    return found
