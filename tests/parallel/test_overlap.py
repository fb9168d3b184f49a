"""Two halves of a batch in flight: the run of the whole batch."""

import dataclasses
import types

import jax
import numpy as np
import pytest

from deepseek_jax.parallel.compiler import compiler_options
from deepseek_jax.parallel.overlap import halves, joined
from deepseek_jax.training.step import make_train_step
from experiments.study.hlo_schedule import transfers
from tests.parallel import harness
from tests.parallel.comparison import assert_same_step

MODEL = harness.SHALLOW | {"num_hidden_layers": 2}


def config(overlap, tensor=1, remat="none", balance="loss_free", **mesh):
    return harness.config(
        (1, 4 // tensor, 2, tensor),
        MODEL,
        train={"batch_size": 16, "remat": remat},
        mesh={"overlap": overlap} | mesh,
        balance={"mode": balance},
    )


@pytest.mark.parametrize(
    ("balance", "receive", "tensor", "remat", "padded"),
    [("loss_free", 0.0, 2, "deepseek", False), ("classic", 1.0, 1, "none", True)],
    ids=["at once, tensor parallel, recomputed", "classic loss, in rounds, with padding"],
)
def test_loss_every_gradient_and_counts_equal_the_whole_batch(balance, receive, tensor, remat, padded):
    """Each gradient is a sum over the same tokens; what differs is the order."""
    halved, whole = (
        config(True, tensor, remat, balance, receive=receive),
        config(False, tensor, balance=balance),
    )
    runs = [harness.run(cfg, padded=padded) for cfg in (halved, whole)]
    assert_same_step(*runs)
    there = ~np.asarray(harness.batch_on(whole, padded=True)["padding"][:, :8]) | (not padded)
    assert (runs[0].history[0].counts_le.sum(-1) == there.sum() * whole.model.num_experts_per_tok).all()


def test_a_batch_that_does_not_divide():
    with pytest.raises(
        ValueError, match=r"a local batch of 3 sequences does not divide into 2 micro-batches"
    ):
        halves(np.zeros((3, 4)))
    x = np.arange(8).reshape(4, 2)
    np.testing.assert_array_equal(joined(*halves(x)), x)


def test_nothing_to_overlap():
    cfg = config(True, experts="replicated")
    with pytest.raises(
        ValueError, match=r"mesh.overlap=True, but no tokens travel: mesh.experts='replicated'"
    ):
        make_train_step(cfg, harness.mesh_of(cfg))


def test_compiler_options_are_for_gpus():
    whole = config(False, comm_channels=20)
    cfg = whole.mesh
    assert compiler_options(cfg, harness.mesh_of(whole)) is None
    assert compiler_options(
        dataclasses.replace(cfg, pipe=2), harness.mesh_of(whole)
    )  # on CPUs, of a pipeline

    def gpus_of(*processes):
        gpus = [types.SimpleNamespace(platform="gpu", process_index=i) for i in processes]
        return types.SimpleNamespace(devices=np.array(gpus))

    gpus = gpus_of(0, 0)
    options = compiler_options(cfg, gpus)
    assert options is not None and options["xla_gpu_enable_latency_hiding_scheduler"]
    assert options["xla_gpu_nccl_collective_max_nchannels"] == options["xla_gpu_nccl_p2p_max_nchannels"] == 20
    assert "xla_gpu_deterministic_ops" not in options
    assert compiler_options(cfg, gpus, deterministic=True) == options | {"xla_gpu_deterministic_ops": True}
    more = compiler_options(cfg, gpus_of(0, 1)).keys() - options.keys()
    assert all("ragged_all_to_all" in name for name in more) and len(more) == (
        2 if jax.__version_info__ >= (0, 11) else 0
    )


PROGRAM = """\
HloModule step, is_scheduled=true

%body (p: f32[4]) -> f32[4] {
  %p = f32[4]{0} parameter(0)
  %ragged-all-to-all-start.1 = ((u32[4]{0}), u32[4]{0}) ragged-all-to-all-start(%p), backend_config={"is_sync":false}
  %gemm_fusion_dot.3 = f32[4,4]{1,0} fusion(%p), kind=kCustom, metadata={op_name="jit(f)/attention/dot_general"}
  %mpmd_map.1 = f32[4]{0} custom-call(%p), custom_call_target="mosaic_gpu_v2", metadata={op_name="jit(f)/jit(grouped_gemm)/body/mpmd_map"}
  %mpmd_map.2 = f32[4]{0} custom-call(%p), custom_call_target="mosaic_gpu_v2", metadata={op_name="jit(f)/jit(quantize)/body/mpmd_map"}
  %dynamic_slice_fusion.4 = f32[4]{0} fusion(%p), kind=kCustom, metadata={op_name="jit(f)/jit(grouped_wgrad)/body/mpmd_map"}
  %dynamic_slice_fusion.5 = f32[4]{0} fusion(%p), kind=kLoop, metadata={op_name="jit(f)/dynamic_slice"}
  %slice.1 = f32[4]{0} fusion(%gemm_fusion_dot.3), kind=kLoop
  %ragged-all-to-all-done.1 = u32[4]{0} ragged-all-to-all-done(%ragged-all-to-all-start.1)
  ROOT %bitcast.1 = f32[4]{0} bitcast(%ragged-all-to-all-done.1), metadata={op_name="transpose(jvp())/dispatch/bitcast"}
}

ENTRY %main (p: f32[4]) -> f32[4] {
  %p = f32[4]{0} parameter(0)
  %all-gather-start = ((s32[1]{0}), s32[2]{0}) all-gather-start(%p), metadata={op_name="plan/all_gather"}, backend_config={"is_sync":true}
  ROOT %all-gather-done = s32[2]{0} all-gather-done(%all-gather-start)
}
"""


def test_what_a_schedule_says():
    first, second = transfers(PROGRAM)
    assert (first.opcode, first.computation, first.is_sync) == ("ragged-all-to-all", "body", False)
    assert first.gemms == (
        "jit(f)/attention/dot_general",
        "jit(f)/jit(grouped_gemm)/body/mpmd_map",
        "jit(f)/jit(grouped_wgrad)/body/mpmd_map",
    )
    assert first.hidden and first.backward and first.within("dispatch", "combine") == "dispatch"
    assert (second.opcode, second.within("plan"), second.hidden, second.backward) == (
        "all-gather",
        "plan",
        False,
        False,
    )
