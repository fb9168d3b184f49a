"""The attention kernels at production shapes, compiled to sm_90a machine code on a machine without a GPU."""

import pytest

from pallas_kernels.mla_attention.shapes import SHAPES, AttentionShape
from pallas_kernels.testing.aot import compile_for_h100, why_unavailable
from pallas_kernels.testing.workloads import workload

pytestmark = [
    pytest.mark.skipif(why_unavailable() is not None, reason=str(why_unavailable())),
    pytest.mark.timeout(600),
    pytest.mark.usefixtures("optimised"),
]
NARROW = AttentionShape("narrow", "forward", 2, 4, 1000, qk=96, v=64)  # padded: rows, keys and both widths
KERNELS = {"forward": 1, "backward": 2}
# The kernel of keys and values, whose gradients take 160 of a thread's 240 registers, keeps counters of its loops and
# parities of its barriers in local memory: a few loads per step of some 2,500 cycles, hardly any of them between
# products.
COUNTERS = 384  # seen: 240, with segments 328; stores and loads together


def test_attention_compiles_clean():
    shapes = [*(shape for shape in SHAPES if not shape.name.startswith("lite")), NARROW]
    for shape, report in zip(
        shapes, compile_for_h100([workload("mla_attention", s) for s in shapes]), strict=True
    ):
        assert report.error is None, report.error
        assert len(report.kernels) == KERNELS[shape.pass_]
        for kernel in report.kernels:
            with_values = shape.pass_ == "backward" and any("n128" in kind for kind in kernel.wgmma)
            assert kernel.spill_bytes <= (COUNTERS if with_values else 0), (shape.name, kernel)
            assert not kernel.serialised, (shape.name, kernel)
            assert kernel.tma and kernel.threads == 384 and kernel.blocks_per_sm >= 1
            assert kernel.wgmma and all(kind.endswith("f32.bf16.bf16") for kind in kernel.wgmma)
