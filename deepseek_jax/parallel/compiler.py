"""What the compiler is told about a program that runs over a mesh."""

from typing import Any

from jax.sharding import Mesh

from deepseek_jax.config import MeshConfig

GPUS = ("gpu", "cuda", "rocm")


def compiler_options(cfg: MeshConfig, mesh: Mesh) -> dict[str, Any] | None:
    """`compiler_options` of `jax.jit`: None but on GPUs.

    The latency-hiding scheduler starts collectives early and places other work before their end: without it, each
    one stops the device. `mesh.comm_channels` bounds what collectives take from that work: a channel of NCCL is a
    thread block, which occupies an SM (report section 3.2.2 spends 20).
    """
    if mesh.devices.flat[0].platform not in GPUS:
        return None
    options: dict[str, Any] = {"xla_gpu_enable_latency_hiding_scheduler": True}
    if cfg.comm_channels:
        options["xla_gpu_nccl_collective_max_nchannels"] = cfg.comm_channels
        options["xla_gpu_nccl_p2p_max_nchannels"] = cfg.comm_channels
    return options
