"""A pass runs on the mesh that its layout was made for, or not at all. Nothing is computed: passes are traced."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from deepseek_jax.config import MeshConfig
from deepseek_jax.model import decoding
from deepseek_jax.model.cache import empty_pages, paged_view
from deepseek_jax.model.decoding import ONE_DEVICE, decode, prepare
from deepseek_jax.model.layout import Inputs, single_device
from deepseek_jax.model.params import abstract
from deepseek_jax.model.transformer import forward, model_params
from deepseek_jax.parallel.layout import few_tokens, layout_over
from deepseek_jax.parallel.mesh import BATCH_AXES, abstract_mesh
from deepseek_jax.training.passes import make_eval_step
from deepseek_jax.training.step import make_train_step
from tests.tiny_run import tiny

MESHES = {
    "data": MeshConfig(data=2),
    "experts": MeshConfig(data=1, node=2, local=2),
    "replicated": MeshConfig(data=1, node=2, local=2, experts="replicated"),
    "tensor": MeshConfig(data=1, tensor=2),
}


def config(mesh):
    cfg = tiny()
    return dataclasses.replace(cfg, mesh=mesh)


def over(mesh_cfg):
    return abstract_mesh(mesh_cfg, mesh_cfg.data * mesh_cfg.node * mesh_cfg.local * mesh_cfg.tensor)


def traced(cfg, layout, mesh=None):
    """The shape of the hidden states; experts of each device as many as the layout's dispatcher expects."""
    params = abstract(model_params(cfg.model))
    tokens = jax.ShapeDtypeStruct((4, cfg.data.seq_len), jnp.int32)

    def run(params, tokens):
        return forward(params, cfg.model, Inputs(tokens), None, layout)[0]

    if mesh is not None:
        specs = dict(in_specs=(P(), P(BATCH_AXES)), out_specs=P(BATCH_AXES), check_vma=False)
        run = jax.shard_map(run, mesh=mesh, **specs)
    return jax.eval_shape(run, params, tokens).shape


def test_without_a_mesh():
    cfg = config(MeshConfig())
    assert traced(cfg, single_device()) == (4, cfg.data.seq_len, cfg.model.hidden_size)
    assert traced(cfg, layout_over(cfg, over(MeshConfig(data=1)))) == traced(cfg, single_device())


@pytest.mark.parametrize("name", MESHES)
def test_one_devices_layout_inside_a_mesh(name):
    mesh = over(MESHES[name])
    size = {"data": "data=2", "tensor": "tensor=2"}.get(name, "node=2 x local=2")
    with pytest.raises(
        ValueError, match=f"made for a single device is used on {size}: build the one of this mesh"
    ):
        traced(config(MESHES[name]), single_device(), mesh)


def test_a_meshs_layout_elsewhere():
    cfg = config(MESHES["experts"])
    layout = layout_over(cfg, over(cfg.mesh))
    with pytest.raises(ValueError, match="made for node=2 x local=2 is used on a single device"):
        traced(cfg, layout)
    with pytest.raises(ValueError, match="made for node=2 x local=2 is used on data=2"):
        traced(cfg, layout, over(MESHES["data"]))


def test_the_meshs_own_layout_and_axes_of_one_device():
    cfg = config(MESHES["replicated"])
    assert traced(cfg, layout_over(cfg, over(cfg.mesh)), over(cfg.mesh))
    assert traced(cfg, single_device(), over(MeshConfig(data=1)))


def decoded(layout, mesh):
    cfg = config(MeshConfig()).model
    ready = jax.eval_shape(functools.partial(prepare, cfg=cfg), abstract(model_params(cfg)))
    pages, table = empty_pages(cfg, cfg.num_hidden_layers, 2), jnp.arange(2, dtype=jnp.int32)[:, None]

    def run(ready, tokens):
        view = paged_view(pages, table, jnp.ones(2, jnp.int32), 1)
        return decode(ready, cfg, tokens, view, None, layout)[0]

    run = jax.shard_map(run, mesh=mesh, in_specs=(P(), P()), out_specs=P(), check_vma=False)
    return jax.eval_shape(run, ready, jax.ShapeDtypeStruct((2, 1), jnp.int32)).shape


def test_decoding():
    assert decoding.unrolled(config(MeshConfig()).model)
    mesh = over(MESHES["replicated"])
    with pytest.raises(ValueError, match="made for a single device is used on node=2 x local=2"):
        decoded(ONE_DEVICE, mesh)
    assert decoded(few_tokens(config(MeshConfig()).model, MESHES["replicated"], mesh), mesh)


def test_steps_build_their_own():
    """Training and evaluation find the layout of whatever mesh they are given; the tests of meshes run them."""
    for mesh in MESHES.values():
        cfg = config(mesh)
        assert layout_over(cfg, over(mesh)).mesh == tuple(
            (a, n) for a, n in over(mesh).shape.items() if n > 1
        )
        make_train_step(cfg, over(mesh)), make_eval_step(cfg, over(mesh))
