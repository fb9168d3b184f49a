"""GPUs as the planner sees them: sizes and peaks of data sheets, and what kernels and links were measured to reach.

What is reached are inputs of a prediction: none is set so that a predicted step comes out right. Where no measurement is
public, the number says what it was carried over from. Short names of sources: "trace": the profile that DeepSeek published
of two chunks of four MoE layers on H800s (profile-data, train.json); "ISCA": DeepSeek, "Insights into DeepSeek-V3" (arXiv
2505.09343); "bench": `pallas_kernels/README.md`, this project's kernels on one H100; "DeepGEMM", "DeepEP", "FlashMLA": figures of
the projects of that name, on H800.
"""

import dataclasses
from typing import NamedTuple

TERA, GIGA, GIB = 1e12, 1e9, 1 << 30


class Gemm(NamedTuple):
    """FLOP/s that the three products of a weight reach."""

    fprop: float
    dgrad: float
    wgrad: float

    def times(self, factor: float) -> "Gemm":
        return Gemm(*(factor * x for x in self))


class Link(NamedTuple):
    """Bytes per second, one way, of one GPU."""

    nominal: float
    reached: float


@dataclasses.dataclass(frozen=True, eq=False)
class Hardware:
    """One kind of GPU, and the machine around it.

    Attributes:
        bf16, fp8: peak FLOP/s, dense. float32: of the CUDA cores, without TF32.
        memory: bytes. reserved: of these, what CUDA's context and NCCL's buffers take.
        hbm: peak bytes/s. passes: bytes/s that passes over arrays reach (casts, norms, rotary embedding, copies of rows),
            where each array that a pass reads or writes counts once.
        linear, grouped: of "fp8", "bf16" and "float32", products of one weight and of many experts.
        core_forward, core_backward: causal attention, FLOP/s, masked half not counted; backward counts 2.5 forwards.
        sms, sms_measured: all, and those that the rates above were measured on.
        few_rows: bytes/s of weights that products of 64 rows read. latent_core, latent_reads: of attention over a latent cache
            while decoding, FLOP/s and bytes/s, of which one or the other bounds it.
        nvlink, nic: within a node and between nodes. exchange_start: seconds that an exchange takes beside its bytes.
        node: GPUs of a node, each with a NIC of its own.
    """

    name: str
    bf16: float
    fp8: float
    float32: float
    memory: int
    hbm: float
    passes: float
    linear: dict[str, Gemm]
    grouped: dict[str, Gemm]
    core_forward: float
    core_backward: float
    few_rows: float
    latent_core: float
    latent_reads: float
    nvlink: Link
    nic: Link
    sms_measured: int
    sms: int = 132  # H100, H800 and H200 of the SXM form
    exchange_start: float = 1e-4  # trace: the kernel that lays out an exchange, 0.10 ms
    reserved: int = 4 * GIB  # an assumption
    node: int = 8

    @property
    def usable(self) -> int:
        """Bytes of memory that a run can have."""
        return self.memory - self.reserved

    def rates_beside(self, comm_sms: int) -> float:
        """The factor of all rates where so many SMs move data meanwhile."""
        return (self.sms - comm_sms) / self.sms_measured


# SMs that move data while others compute (report section 3.2.2; trace: grids of 20 blocks, GEMMs on 112 SMs).
COMM_SMS = 20

# Bytes of the passes of attention and MLP, forward, as `work.py` counts them, over what the trace spends there beside GEMMs
# and attention core: 2.02 and 2.71 GB in 4.36 - 1.67 - 1.24 and 4.60 - 2.90 - 0.40 ms. The backward pass is predicted with it.
_PASSES = 1.72 * TERA
_HBM = 3.35 * TERA  # H100 SXM data sheet; H800 the same (SPEC of FlashMLA)
# H100 SXM data sheet: 67 TFLOPS; 0.75 of it for a float32 GEMM is an assumption.
_FLOAT32 = Gemm(*(0.75 * 67 * TERA,) * 3)

# bench, M = 4096: FLOPs of the four linear layers of an attention over the sum of their times; wgrad without kv_b. BF16: the
# peer, cuBLAS.
_LINEAR_H100 = {
    "fp8": Gemm(1033 * TERA, 1033 * TERA, 822 * TERA),
    "bf16": Gemm(817 * TERA, 817 * TERA, 817 * TERA),
    "float32": _FLOAT32,
}
# bench: gate, up and down of 8 x 4096 rows together, weight gradients of 4 x 8192; FP8 has the same kernel for dgrad.
_GROUPED_H100 = {
    "fp8": Gemm(1064 * TERA, 1064 * TERA, 901 * TERA),
    "bf16": Gemm(601 * TERA, 619 * TERA, 535 * TERA),
    "float32": _FLOAT32,
}
_ON_112 = 112 / 132
# FlashMLA on H800: 660 TFLOPS where products bound it, 3,000 GB/s where memory does
_LATENT_CORE, _LATENT_READS = 660 * TERA, 3.0 * TERA

H800 = Hardware(
    name="h800",
    bf16=989.4 * TERA,  # data sheet of the H100, whose compute it has; ISCA's MFU is against 989
    fp8=1978.9 * TERA,
    float32=67 * TERA,
    memory=80 * GIB,
    hbm=_HBM,
    passes=_PASSES,
    linear={
        # trace: 2 x 187.1M x 4096 FLOPs in 1.67 ms; backward with the recomputed up-projections, 1.98 TFLOP in 2.27 ms.
        # wgrad: DeepGEMM issue 95, 986 TFLOPS on 132 SMs, scales and transposes not counted.
        "fp8": Gemm(918 * TERA, 872 * TERA, 986 * _ON_112 * TERA),
        "bf16": _LINEAR_H100["bf16"].times(_ON_112),  # carried over from the H100
        "float32": _FLOAT32,
    },
    grouped={
        # trace: grouped forward 996, dgrad 1018 at the nominal 32,768 rows. wgrad: DeepGEMM issue 95, 1,040 on 132 SMs.
        "fp8": Gemm(996 * TERA, 1018 * TERA, 1040 * _ON_112 * TERA),
        "bf16": _GROUPED_H100["bf16"].times(_ON_112),  # carried over from the H100
        "float32": _FLOAT32,
    },
    core_forward=556 * TERA,  # trace
    core_backward=455 * TERA,  # trace
    # DeepGEMM's first figures at 64 rows: the 187.1 MB of an attention's four products in 9.4 + 16.7 + 9.8 + 44.7 us
    few_rows=2.32 * TERA,
    latent_core=_LATENT_CORE,
    latent_reads=_LATENT_READS,
    nvlink=Link(
        200 * GIGA, 160 * GIGA
    ),  # ISCA section 4: 400 GB/s both ways, about 160 effective; DeepEP: 153-158
    nic=Link(
        50 * GIGA, 40 * GIGA
    ),  # ISCA section 4: 400 Gb/s, 40 GB/s effective; DeepEP: 43-58, own node's bytes included
    sms_measured=112,
)

H100 = Hardware(
    name="h100",
    bf16=989.4 * TERA,  # data sheet, SXM
    fp8=1978.9 * TERA,
    float32=67 * TERA,
    memory=80 * GIB,
    hbm=_HBM,
    passes=_PASSES / _ON_112,  # carried over from the H800
    linear=_LINEAR_H100,
    grouped=_GROUPED_H100,
    core_forward=556
    / _ON_112
    * TERA,  # carried over from the H800: this project has no attention kernel of its own
    core_backward=455 / _ON_112 * TERA,
    few_rows=1.72 * TERA,  # bench: the same four products in 19.8 + 20.6 + 13.0 + 55.2 us
    latent_core=_LATENT_CORE,  # carried over from the H800: this project's kernel is not measured yet
    latent_reads=_LATENT_READS,
    nvlink=Link(450 * GIGA, 360 * GIGA),  # data sheet: 900 GB/s both ways; 80% of it, as on the H800
    nic=Link(50 * GIGA, 40 * GIGA),  # a ConnectX-7 per GPU (DGX H100), as on the H800
    sms_measured=132,
)

H200 = dataclasses.replace(
    H100,  # the same chip
    name="h200",
    memory=141 * 10**9,  # data sheet
    hbm=4.8 * TERA,  # data sheet
    passes=H100.passes * 4.8 / 3.35,  # carried over from the H800 by the memory's speed, as what follows
    few_rows=H100.few_rows * 4.8 / 3.35,
    latent_reads=H100.latent_reads * 4.8 / 3.35,
)

PRESETS = {h.name: h for h in (H800, H100, H200)}
