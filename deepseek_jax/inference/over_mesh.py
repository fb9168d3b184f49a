"""Generation over a mesh: prefill and decoding as they are deployed (report section 3.4), in two programs.

- Prefill: prompts over data x node x local, attention tensor and sequence parallel over `tensor`, tokens to their
  experts by the exchange of training (`parallel/exchange/dispatcher.py`), made for many tokens.
- Decoding: sequences over all devices, attention data parallel, tokens to their experts by the exchange made for few
  (`parallel/exchange/low_latency.py`).

Both read the same parameters: experts spread over node x local x tensor, everything else whole on each device, of
whose heads the prefill takes a slice. Between the programs nothing travels: a device keeps the latents of the
sequences that it goes on to decode. With FP8 weights, as a checkpoint has them, tokens travel in FP8 and are multiplied as
they came, in both.

On GPUs, a decoding step has nothing for which the host has to wait: no branch, no loop of unknown length, no exchange whose
sizes must be read first (`experiments/study/host_waits.py` lists them in the compiled program); the host looks between
steps whether all rows are done. The prefill waits twice for each exchange between nodes, which sends the rows that there
are and no others: with many tokens, what that saves takes longer (`parallel/compiler.py`). On CPUs the steps are a loop of
one program, in which the devices tell each other whether any of them has a sequence that is not done.

Dims: b sequence, t prompt token, s cache slot, n new token, v vocabulary.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from deepseek_jax.config import MeshConfig, ModelConfig
from deepseek_jax.inference.batch import Batch, Prompts, Request
from deepseek_jax.inference.driver import Method, State, complete, grown, in_turn, steps
from deepseek_jax.inference.generate import prefill, step
from deepseek_jax.model.decoding import decoding_config, unrolled
from deepseek_jax.model.transformer import model_params
from deepseek_jax.parallel.compiler import compiler_options
from deepseek_jax.parallel.exchange.dispatcher import AS_IT_IS
from deepseek_jax.parallel.exchange.wire import Wire
from deepseek_jax.parallel.layout import few_tokens, many_tokens
from deepseek_jax.parallel.mesh import BATCH_AXES, TOKEN_AXES
from deepseek_jax.parallel.prepared import (
    WHOLE,
    Devices,
    generation_mesh,
    parameter_shardings,
    parameter_specs,
    policy_of,
    preparing,
    ready_specs,
)
from deepseek_jax.precision.policy import Policy

ROWS = PartitionSpec(TOKEN_AXES)


# --- the programs -------------------------------------------------------------------------------------------------


class Programs(NamedTuple):
    """Jitted, over global arrays.

    prepare: parameters for decoding; prefill: (params, prompts, batch, bias) -> state; grow: (state, slots) -> state;
    advance: (ready, batch, bias, state, at_most) -> state, see `driver.Method`.
    """

    prepare: Callable[..., Any]
    prefill: Callable[..., State]
    grow: Callable[..., State]
    advance: Callable[..., State]


BATCH = Batch(pad_b=ROWS, length=WHOLE, limit_b=ROWS, stop_s=WHOLE, num_ids=WHOLE, sampling=ROWS)  # type: ignore[arg-type]
BY_LAYER = PartitionSpec(None, TOKEN_AXES)


def check_fp8(mesh: MeshConfig) -> None:
    """Raises ValueError for a mesh over which weights cannot stay in FP8."""
    if mesh.tensor > 1:
        raise ValueError(
            f"mesh.tensor={mesh.tensor} divides heads, whose weights in FP8 have blocks across them: leave out tensor, or "
            "keep_fp8"
        )


def _anyone(going_b: jax.Array) -> jax.Array:
    return lax.psum(going_b.any().astype(jnp.int32), TOKEN_AXES) > 0


def _state_specs(cache: PartitionSpec) -> Any:
    return State(out=ROWS, token_b=ROWS, cache=cache, extra=ROWS, steps=WHOLE)  # type: ignore[arg-type]


@functools.cache
def programs(
    cfg: ModelConfig, mesh: MeshConfig, policy: Policy | None = None, at: Devices = None
) -> Programs:
    """Of a model over a mesh; compiled once per size of prompts, and of the cache. policy: of weights in FP8.

    Raises ValueError as `generation_mesh`, and for weights in FP8 whose heads would be divided.
    """
    devices, decoding = generation_mesh(cfg, mesh, at), decoding_config(cfg)
    if policy is not None:
        check_fp8(mesh)
    specs, options = parameter_specs(cfg, mesh, devices), compiler_options(mesh, devices)
    wire = AS_IT_IS if policy is None else Wire(policy.dispatch, policy.combine)
    few = few_tokens(cfg, mesh, devices, wire)
    of_ready = ready_specs(decoding, specs)
    prefilled, decoded = _state_specs(BY_LAYER), _state_specs(ROWS if unrolled(decoding) else BY_LAYER)
    over_devices = functools.partial(jax.shard_map, mesh=devices, check_vma=False)
    compiled = functools.partial(jax.jit, compiler_options=options)

    prompts_specs = Prompts(PartitionSpec(BATCH_AXES), PartitionSpec(BATCH_AXES), ROWS)  # type: ignore[arg-type]

    @compiled
    @functools.partial(over_devices, in_specs=(specs, prompts_specs, BATCH, WHOLE), out_specs=prefilled)
    def run_prefill(params: Any, prompts: Prompts, batch: Batch, bias_le: Any) -> State:
        layout = many_tokens(cfg, mesh, devices, prompts.tokens_bt.shape[1], wire)
        params = layout.sequence.own_heads(params, model_params(cfg))
        return prefill(params, cfg, prompts, batch, bias_le, layout)

    @functools.partial(compiled, static_argnames="slots")
    def run_grow(state: State, slots: int) -> State:
        local = functools.partial(grown, cfg=decoding, slots=slots)
        return over_devices(local, in_specs=(prefilled,), out_specs=decoded)(state)

    @functools.partial(compiled, donate_argnames="state")
    @functools.partial(over_devices, in_specs=(of_ready, BATCH, WHOLE, decoded, WHOLE), out_specs=decoded)
    def run_advance(ready: Any, batch: Batch, bias_le: Any, state: State, at_most: jax.Array) -> State:
        one = functools.partial(step, ready, decoding, batch, bias_le, layout=few)
        return steps(one, state, at_most, _anyone)

    return Programs(preparing(cfg, mesh, at), run_prefill, run_grow, run_advance)


# --- generation ---------------------------------------------------------------------------------------------------


def over_mesh(
    params: Any, cfg: ModelConfig, balance_bias: Any = None, ready: Any = None, *, mesh: MeshConfig
) -> Method:
    """As `generate.plain`, over the devices of `mesh`. `params`: laid out by `parameter_shardings`; what lies elsewhere
    is moved there first. `ready`: as `programs(cfg, mesh).prepare` makes them of `params`, made here if None."""
    run, devices = programs(cfg, mesh, policy_of(params)), generation_mesh(cfg, mesh)
    params = jax.device_put(params, parameter_shardings(cfg, mesh))
    ready = run.prepare(params) if ready is None else ready
    put = functools.partial(NamedSharding, devices)
    of_batch = jax.tree.map(put, BATCH, is_leaf=lambda x: isinstance(x, PartitionSpec))

    def advance(batch: Batch, state: State, n: int) -> State:
        return in_turn(run.advance, (ready, jax.device_put(batch, of_batch), balance_bias), state, n)

    return Method(
        prefill=lambda prompts, batch: run.prefill(params, prompts, batch, balance_bias),
        grow=run.grow,
        advance=advance,
        rows=devices.size,
        tokens=mesh.tensor,
    )


def generate_over_mesh(
    params: Any,
    cfg: ModelConfig,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    mesh: MeshConfig,
    *,
    balance_bias: Any = None,
    **options: Any,
) -> list[list[int]]:
    """As `generate.generate`, over the devices of `mesh`; greedy, the same tokens.

    Args:
        params: laid out by `parameter_shardings`; what lies elsewhere is moved there first.
        prompts: any number; rows that only fill the batch make it divide over the devices.
        mesh: `data`, `node`, `local`, `tensor`; `experts`, `dispatch`, `combine` and `receive` as in training.

    Raises:
        ValueError: as `generate`, or a mesh that does not fit the devices or the model.
    """
    request = Request(prompts, max_new_tokens, **options)
    request.check(cfg)
    rows, _ = complete(over_mesh(params, cfg, balance_bias, mesh=mesh), cfg, request)
    return [row.tokens for row in rows]
