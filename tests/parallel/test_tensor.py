"""Tensor and sequence parallel attention on eight devices: the run of one device."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from deepseek_jax.config import MeshConfig, ModelConfig
from deepseek_jax.model.mla import attend, down, expanded, mla_params
from deepseek_jax.model.params import abstract
from deepseek_jax.model.rope import rope_table
from deepseek_jax.model.sequence import WHOLE
from deepseek_jax.model.weights import attach, quantise_weights
from deepseek_jax.parallel.mesh import TENSOR_PARALLEL, make_mesh, param_specs
from deepseek_jax.parallel.tensor import Divided
from deepseek_jax.precision import PRESETS
from deepseek_jax.training.checkpoint import Checkpointer
from deepseek_jax.training.state import state_shardings
from deepseek_jax.training.step import make_train_step
from tests.parallel.comparison import BOUND, assert_restored, assert_same_step, assert_tracks, difference
from tests.parallel.harness import SINGLE, config, mesh_of, put, run
from tests.tiny_run import HYPER, tiny

# BOUND is for one block and here are two; with smaller weights, a rounding does not grow from one to the next.
HEADS = {"num_attention_heads": 4, "initializer_range": 0.1, "num_hidden_layers": 1}
MODELS = {
    "dense and MTP": HEADS | {"first_k_dense_replace": 1},  # the MTP module's block is a MoE layer
    "MoE": HEADS | {"first_k_dense_replace": 0, "num_nextn_predict_layers": 0},
}
LAYOUTS = {  # experts in one hop over tensor; over node, then local x tensor
    "dense and MTP": config((2, 1, 1, 4), MODELS["dense and MTP"], mesh={"zero": True}),
    "MoE": config((1, 2, 2, 2), MODELS["MoE"]),
}
STEPS = 8


def packed(name, single, nudge=0.0):
    """The run on packed sequences, of the layout of that name or of one device."""
    return run(config(model=MODELS[name]) if single else LAYOUTS[name], STEPS, nudge, packed=True)


@pytest.mark.parametrize("name", LAYOUTS)
def test_loss_and_every_gradient_equal_one_device(name):
    assert_same_step(packed(name, False), packed(name, True))


@pytest.mark.parametrize("name", LAYOUTS)
def test_some_steps_track_one_device(name):
    runs = packed(name, False), packed(name, True), packed(name, True, BOUND)
    assert_tracks(*runs, bias=2 * HYPER.gamma)


# --- one attention ----------------------------------------------------------------------------------------------

# Two heads per device, 128 columns each: blocks of an FP8 weight end where a device's part does.
WIDE = ModelConfig(
    hidden_size=48,
    num_attention_heads=4,
    q_lora_rank=20,
    kv_lora_rank=12,
    qk_nope_head_dim=64,
    qk_rope_head_dim=64,
    v_head_dim=64,
)
B, T = 2, 8


def attention(sequence, policy=None, cfg=WIDE, tokens=T):
    """(params, x, cotangent of the output) -> (output, gradients of parameters and x)"""

    def apply(p, x_btd, g_btd):
        quantised = quantise_weights(p, mla_params(cfg), policy)
        rope = rope_table(cfg, jnp.arange(tokens)[None])

        def product(p, x_btd):
            p = attach(p, quantised, policy)
            inputs = expanded(p, cfg, sequence.gathered(down(p, cfg, x_btd)), rope, False)
            y_btd = sequence.scattered(attend(p, cfg, inputs, rope, None))
            return (y_btd * g_btd).sum(), y_btd

        (_, y_btd), (dp, dx) = jax.value_and_grad(product, (0, 1), has_aux=True)(p, x_btd)
        summed = {n: g if "heads" in mla_params(cfg)[n].axes else sequence.total(g) for n, g in dp.items()}
        return y_btd, summed, dx

    return apply


def attention_over_mesh(parts, *args):
    mesh = make_mesh(MeshConfig(data=1, tensor=parts), jax.devices()[:parts])
    run, x = attention(Divided(), *args), P(None, "tensor")
    params = param_specs(mla_params(args[1] if args[1:] else WIDE), mesh, TENSOR_PARALLEL)
    mapped = jax.shard_map(run, mesh=mesh, in_specs=(params, x, x), out_specs=(x, params, x), check_vma=False)
    return jax.jit(mapped)


def attention_arrays():
    rng = np.random.default_rng(3)
    p = {name: rng.normal(0, 0.3, w.shape).astype(np.float32) for name, w in mla_params(WIDE).items()}
    return p, *rng.normal(size=(2, B, T, WIDE.hidden_size)).astype(np.float32)


def test_an_attention_gathers_latents_once_and_scatters_its_output_once():
    """And the same the other way round in the backward pass. Of DeepSeek-V3 on four devices: 2112 of 7168 values per
    token are gathered, and no parameter or head is."""
    v3, tokens = ModelConfig(), 4096
    p = abstract(mla_params(v3), jnp.bfloat16)
    x = jax.ShapeDtypeStruct((1, tokens, v3.hidden_size), jnp.bfloat16)
    text = attention_over_mesh(4, None, v3, tokens).lower(p, x, x).as_text()
    moved = {
        name: sorted(re.findall(rf'"stablehlo.{name}".*?-> tensor<([\dx]+)xbf16>', text, re.DOTALL))
        for name in ("all_gather", "reduce_scatter")
    }
    assert moved["all_gather"] == ["1x4096x2112", "1x4096x7168"]
    assert moved["reduce_scatter"] == ["1x1024x2112", "1x1024x7168"]
    assert "all_to_all" not in text and "collective_permute" not in text


def test_fp8_blocks_of_a_device_are_those_of_one_device():
    """Weights and the output of the core are quantised as on one device: the forward pass is the same to the order of
    sums. So are gradients, but that one E4M3 operand of some 8,000 may round the other way (by 1/8), and that the
    weight gradients of the down-projections quantise the tokens of a device together, 128 of them: two operands with
    1/16 each."""
    policy = PRESETS["deepseek_fp8"]
    y, dp, dx = attention_over_mesh(2, policy)(*attention_arrays())
    y_1, dp_1, dx_1 = jax.jit(attention(WHOLE, policy))(*attention_arrays())
    assert difference(y, y_1) < BOUND and difference(dx, dx_1) < 1 / 8 / 8000**0.5
    for name, g in dp.items():
        bound = 1 / 8 if name in ("wq_a_dq", "wkv_a_dc") else 1 / 8 / 8000**0.5
        assert difference(g, dp_1[name]) < bound, name


# --- what lies where --------------------------------------------------------------------------------------------


def test_heads_are_spread_and_so_are_experts_and_moments():
    """The attention's up-projections over tensor alone, experts over all devices of a node too; with ZeRO, the rest
    over all that divides tokens."""
    cfg = LAYOUTS["MoE"]
    params = state_shardings(cfg, mesh_of(cfg)).params["moe_layers"]
    for name in ("wq_b_qhk", "wkv_b_chm"):
        assert params["attn"][name].spec == P(None, None, ("tensor",))
    assert params["attn"]["wo_hvd"].spec == P(None, ("tensor",))
    assert params["attn"]["wq_a_dq"].spec == params["ffn"]["gate"]["w_gate_de"].spec == P()
    assert params["ffn"]["experts"]["w_up_edf"].spec == P(None, ("node", "local", "tensor"))
    cfg = config((2, 1, 2, 2), MODELS["MoE"], mesh={"zero": True})
    params = state_shardings(cfg, mesh_of(cfg)).params["moe_layers"]
    assert params["attn"]["wo_hvd"].spec == P(None, ("tensor",), ("data", "local"))
    assert params["attn"]["wq_a_dq"].spec == P(None, ("data", "local", "tensor"))
    assert params["ffn"]["experts"]["w_up_edf"].spec == P(None, ("local", "tensor"), ("data",))


def test_a_checkpoint_goes_to_another_mesh_and_back(tmp_path):
    """State of (data 2, tensor 4) with ZeRO, to one device and to (node 2, local 2, tensor 2), bit for bit."""
    name = "dense and MTP"
    state = put(LAYOUTS[name], BOUND)
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(1, state, {"average": np.zeros(1)}, {"config": {}, "data": {}, "tokens": 0})
    checkpointer.wait()
    for shape in (SINGLE, (1, 2, 2, 2)):
        blank = put(config(shape, MODELS[name]))
        restored = checkpointer.restore(blank).state
        assert_restored(restored, state, blank)
    checkpointer.close()


# --- what does not divide ---------------------------------------------------------------------------------------


def test_sequences_that_do_not_divide():
    cfg = tiny(model=MODELS["MoE"], data={"seq_len": 10}, mesh={"data": 1, "tensor": 4})
    with pytest.raises(
        ValueError, match=r"sequences of 10 tokens do not divide over tensor=4 devices; change data.seq_len"
    ):
        make_train_step(cfg, mesh_of(cfg))


def test_heads_that_do_not_divide():
    cfg = config((1, 1, 1, 4), MODELS["MoE"] | {"num_attention_heads": 6})
    with pytest.raises(
        ValueError,
        match=r"moe_layers.attn.wkv_b_chm \(1, 12, 6, 16\): 6 of 'heads' do not divide over 4 devices of tensor=4; "
        r"change config.mesh.tensor or the model",
    ):
        make_train_step(cfg, mesh_of(cfg))
