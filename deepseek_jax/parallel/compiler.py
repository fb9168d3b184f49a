"""What the compiler is told about a program that runs over a mesh."""

from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh

from deepseek_jax.config import MeshConfig

GPUS = ("gpu", "cuda", "rocm")


def compiler_options(
    cfg: MeshConfig, mesh: Mesh | AbstractMesh, deterministic: bool = False
) -> dict[str, Any] | None:
    """`compiler_options` of `jax.jit`, or None (as for a mesh without devices, which nothing compiles for).

    On CPUs a pipeline's step needs one: XLA would copy all gradients in every tick, through each branch of the switch, did
    it not look at each branch apart.

    On GPUs, the latency-hiding scheduler starts collectives early and places other work before their end: without it, each
    one stops the device. `mesh.comm_channels` bounds what collectives take from that work: a channel of NCCL is a
    thread block, which occupies an SM (report section 3.2.2 spends 20), and the GEMM kernels leave it so many.

    A pipeline's step is a switch between programs, and XLA takes its memory to be the sum of theirs, though only one runs at
    a time. Believing that it does not fit, the scheduler would leave every collective synchronous: with a pipeline it is
    told of eight times the memory. What the program really takes is what the compiler allots in the end.

    Over several hosts, XLA turns a ragged all-to-all by default into an all-gather over the hosts of all that is to be sent, and
    picks locally: of 4 rows a token on 8 nodes a device would get 28 instead of 3. Told not to, it sends the rows that there
    are; the host has to read their numbers first, and waits twice, some 50 us in all. At DeepSeek-V3's widths in FP8, that is
    the time of the rows that fixed sizes would send in vain where a device has 100 tokens: decoding takes those
    (`exchange/low_latency.py`). XLA has a kernel that needs neither, for NCCL with GPU-initiated networking
    (xla_gpu_experimental_ragged_all_to_all_use_device_kernel), which we have not seen run.

    Two things change there from run to run: the order in which a scatter-add's atomic additions arrive (the gradient
    of the embedding is the only float one), and the algorithms that autotuning times and picks. `deterministic` puts
    the former in order and leaves out the latter; on CPUs all is deterministic for a given number of devices.
    """
    if isinstance(mesh, AbstractMesh):
        return None
    platform = mesh.devices.flat[0].platform
    if platform == "cpu" and cfg.pipe > 1:
        return {"xla_cpu_copy_insertion_use_region_analysis": True}
    if platform not in GPUS:
        return None
    options: dict[str, Any] = {"xla_gpu_enable_latency_hiding_scheduler": True}
    if cfg.pipe > 1:
        options["xla_gpu_memory_limit_slop_factor"] = 800  # per cent; 95 by default
    if len({device.process_index for device in mesh.devices.flat}) > 1 and jax.__version_info__ >= (0, 11):
        options["xla_gpu_unsupported_enable_ragged_all_to_all_multi_host_decomposer"] = False
        options["xla_gpu_allow_ragged_all_to_all_nccl_send_recv_fallback"] = True
    if cfg.comm_channels:
        options["xla_gpu_nccl_collective_max_nchannels"] = cfg.comm_channels
        options["xla_gpu_nccl_p2p_max_nchannels"] = cfg.comm_channels
    if deterministic:
        options["xla_gpu_deterministic_ops"] = True
    return options
