"""The layout of a pass over a mesh (`model/layout.py`), from what the config says of it.

Experts are spread over node x local x tensor as `mesh.experts` says (report section 3.2.2), the attention's heads and
the tokens of a sequence over `tensor`. Everything else is whole on every device while it computes.
"""

import dataclasses
import functools

from jax.sharding import AbstractMesh, Mesh

from deepseek_jax.config import Config, MeshConfig, ModelConfig
from deepseek_jax.model.dispatch import Dispatcher, Local
from deepseek_jax.model.experts import decode_experts
from deepseek_jax.model.layout import Layout
from deepseek_jax.parallel import two_batches
from deepseek_jax.parallel.exchange.dispatcher import AS_IT_IS, Ragged
from deepseek_jax.parallel.exchange.low_latency import LowLatency
from deepseek_jax.parallel.exchange.placement import nodes_per_token
from deepseek_jax.parallel.exchange.wire import Wire
from deepseek_jax.parallel.mesh import expert_exchange
from deepseek_jax.parallel.overlap import overlapped
from deepseek_jax.parallel.tensor import sequence_over
from deepseek_jax.precision import preset


def _axes(mesh: Mesh | AbstractMesh) -> tuple[tuple[str, int], ...]:
    return tuple((name, size) for name, size in mesh.shape.items() if size > 1)


def _tokens_travel(model: ModelConfig, cfg: MeshConfig, mesh: Mesh | AbstractMesh) -> bool:
    return bool(model.n_routed_experts) and expert_exchange(cfg, mesh) != "replicated"


def _wire(cfg: MeshConfig, default: Wire) -> Wire:
    """The formats of an exchange: what the config names, else the default's."""
    named = {name: getattr(cfg, name) for name in ("dispatch", "combine")}
    return dataclasses.replace(default, **{name: form for name, form in named.items() if form != "auto"})


def dispatcher_over(
    model: ModelConfig, cfg: MeshConfig, mesh: Mesh | AbstractMesh, wire: Wire, anywhere: bool = False
) -> Dispatcher:
    """What brings many tokens to their experts, as `cfg` says; `wire`: the formats that it leaves open ("auto"). anywhere: an
    expert may lie on any node, by a placement; then the group limit bounds the nodes of a token no more."""
    if not _tokens_travel(model, cfg, mesh):
        return Local()
    mode = expert_exchange(cfg, mesh)
    return Ragged(
        mode=mode,
        wire=_wire(cfg, wire),
        most=nodes_per_token(model, mesh.shape["node"]) if mode == "two_hop" and not anywhere else None,
        receive=cfg.receive or None,
        apart=cfg.pipe > 1,
    )


def many_tokens(
    model: ModelConfig,
    cfg: MeshConfig,
    mesh: Mesh | AbstractMesh,
    tokens: int,
    wire: Wire = AS_IT_IS,
    anywhere: bool = False,
) -> Layout:
    """The layout for whole sequences of `tokens` tokens: prefill, and what training and evaluation begin with.

    wire: formats of the exchange that `mesh.dispatch` and `mesh.combine` leave open. anywhere: as for `dispatcher_over`. Raises
    ValueError for what does not divide over the mesh.
    """
    return Layout(
        dispatcher=dispatcher_over(model, cfg, mesh, wire, anywhere),
        sequence=sequence_over(mesh, tokens),
        mesh=_axes(mesh),
    )


def few_tokens(
    model: ModelConfig, cfg: MeshConfig, mesh: Mesh | AbstractMesh, wire: Wire = AS_IT_IS
) -> Layout:
    """The layout of decoding: every device attends to its own sequences, tokens reach their experts by the low-latency
    exchange. wire: as for `many_tokens`."""
    if _tokens_travel(model, cfg, mesh):
        return Layout(LowLatency(wire=_wire(cfg, wire)), mesh=_axes(mesh))
    return Layout(Local(decode_experts), mesh=_axes(mesh))


def halved(layout: Layout) -> Layout:
    """The same for passes over pages whose rows are to be in two halves; as it is where no tokens travel."""
    dispatcher = layout.dispatcher
    if not isinstance(dispatcher, LowLatency | Ragged):
        return layout
    order = two_batches.decoding if isinstance(dispatcher, LowLatency) else two_batches.prompts
    return dataclasses.replace(layout, in_two=functools.partial(two_batches.in_two, order))


def layout_over(cfg: Config, mesh: Mesh | AbstractMesh, anywhere: bool = False) -> Layout:
    """The layout of training; `forward_only` of it is that of evaluation. The precision policy says in which formats tokens travel
    where the mesh config does not. anywhere: as for `dispatcher_over`.

    Raises ValueError for what does not divide over the mesh, and if there is no exchange to overlap with.
    """
    policy = preset(cfg.precision)
    wire = AS_IT_IS if policy is None else Wire(policy.dispatch, policy.combine)
    layout = many_tokens(cfg.model, cfg.mesh, mesh, cfg.data.seq_len, wire, anywhere)
    if cfg.mesh.overlap and not _tokens_travel(cfg.model, cfg.mesh, mesh):
        raise ValueError(
            f"mesh.overlap=True, but no tokens travel: mesh.experts={cfg.mesh.experts!r} on mesh "
            f"node={mesh.shape['node']} local={mesh.shape['local']} tensor={mesh.shape['tensor']} with "
            f"n_routed_experts={cfg.model.n_routed_experts}; spread the experts over node x local x tensor, or set "
            "config.mesh.overlap=False"
        )
    stack = overlapped if cfg.mesh.overlap and mesh.shape["pipe"] == 1 else None
    return dataclasses.replace(
        layout, remat=cfg.train.remat, detached_mtp=cfg.train.detached_mtp, moe_stack=stack
    )
