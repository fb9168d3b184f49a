"""Deployment units as the planner sees them (SPEC of the report's section 3.4; DeepSeek's inference overview of February 2025).

A unit is the devices that serve together: each attends to its own sequences, and the experts of a layer are spread over all.
"""

import dataclasses

from deepseek_jax.config import MeshConfig, ModelConfig
from deepseek_jax.serving.deployment import Deployment


@dataclasses.dataclass(frozen=True)
class Unit:
    """So many devices, and what lies on each of them.

    Attributes:
        nodes, local, tensor: devices, as mesh axes; those of `local` x `tensor` lie in a node. Over `tensor`, heads and the
            tokens of a sequence are divided, in prefill.
        experts: physical experts of a layer on a device, redundant ones included.
        shared_routed: the shared expert is a ninth routed one, with replicas among `experts`; else whole on each device.
        fp8: weights of linear layers in FP8, else BF16.
        fp8_latents: 656 bytes of a token and layer instead of 1,152.
        drafts: the MTP module drafts a token, which the next step verifies.
        house: rows travel as this project's exchange sends them; else as DeepEP does, at the rates that it measured.
    """

    nodes: int
    local: int = 8
    tensor: int = 1
    experts: int = 1
    shared_routed: bool = False
    fp8: bool = True
    fp8_latents: bool = False
    drafts: bool = False
    house: bool = False

    @property
    def devices(self) -> int:
        return self.nodes * self.local * self.tensor

    def selected(self, model: ModelConfig) -> int:
        """Physical experts that a token goes to."""
        return model.num_experts_per_tok + (model.n_shared_experts if self.shared_routed else 0)

    def weight(self) -> float:
        """Bytes of a weight of a linear layer; FP8 with a float32 scale per 128 x 128."""
        return 1 + 4 / 128**2 if self.fp8 else 2.0

    def latent(self, model: ModelConfig) -> int:
        """Bytes of a token's latents in one layer."""
        dtype = "float8_e4m3fn" if self.fp8_latents else "bfloat16"
        return model.kv_cache_bytes_per_token(dtype) // model.num_hidden_layers


def unit_of(deployment: Deployment) -> Unit:
    """With DeepEP's exchange."""
    mesh = deployment.mesh
    return Unit(
        nodes=mesh.node,
        local=mesh.local,
        tensor=mesh.tensor,
        experts=deployment.experts,
        shared_routed=deployment.shared_routed,
        fp8=deployment.weights == "fp8",
        fp8_latents=deployment.cache == "fp8",
        drafts=deployment.drafts,
    )


def deployment_of(unit: Unit, model: ModelConfig) -> Deployment:
    """What of a unit says what lies on its devices."""
    shared = model.n_shared_experts if unit.shared_routed else 0
    return Deployment(
        model=model,
        mesh=MeshConfig(data=1, node=unit.nodes, local=unit.local, tensor=unit.tensor),
        weights="fp8" if unit.fp8 else "bf16",
        redundant=unit.experts * unit.devices - model.n_routed_experts - shared,
        shared_routed=unit.shared_routed,
        max_model_len=model.max_position_embeddings,
        cache="fp8" if unit.fp8_latents else "model",
        drafts=unit.drafts,
    )
