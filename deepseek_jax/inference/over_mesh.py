"""Generation over a mesh: prefill and decoding as they are deployed (report section 3.4), in two programs.

- Prefill: prompts over data x node x local, attention tensor and sequence parallel over `tensor`, tokens to their
  experts by the exchange of training (`parallel/exchange.py`), made for many tokens.
- Decoding: sequences over all devices, attention data parallel, tokens to their experts by the exchange made for few
  (`parallel/low_latency.py`).

Both read the same parameters: experts spread over node x local x tensor, everything else whole on each device, of
whose heads the prefill takes a slice. Between the programs nothing travels: a device keeps the latents of the
sequences that it goes on to decode. No step of the decoding loop waits for the host; the devices tell each other
whether any of them has a sequence that is not done.

Dims: b sequence, t prompt token, s cache slot, n new token, v vocabulary.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from deepseek_jax.config import MeshConfig, ModelConfig
from deepseek_jax.inference.generate import (
    BUCKET,
    Prompts,
    check_request,
    decode_loop,
    pad_prompts,
    prefill,
    slots_for,
    stop_array,
    until_stop,
)
from deepseek_jax.inference.sampling import Sampling
from deepseek_jax.model.experts import decode_experts
from deepseek_jax.model.transformer import model_params
from deepseek_jax.parallel.compiler import compiler_options
from deepseek_jax.parallel.exchange import AS_IT_IS
from deepseek_jax.parallel.experts import MeshExperts, experts_over, named_wire
from deepseek_jax.parallel.low_latency import decoding_experts, low_latency_experts
from deepseek_jax.parallel.mesh import BATCH_AXES, TOKEN_AXES, WHOLE_ATTENTION, make_mesh, param_specs, rules
from deepseek_jax.parallel.tensor import sequence_over

WHOLE, ROWS = PartitionSpec(), PartitionSpec(TOKEN_AXES)


def generation_mesh(cfg: ModelConfig, mesh: MeshConfig) -> Mesh:
    """The devices of `mesh`. Raises ValueError for what generation does not do, and for what does not divide."""
    for name, idle in (("pipe", 1), ("zero", False), ("overlap", False)):
        if getattr(mesh, name) != idle:
            raise ValueError(
                f"mesh.{name}={getattr(mesh, name)} is for training: generation divides work over "
                f"{', '.join(TOKEN_AXES)}; leave it out"
            )
    devices = make_mesh(mesh)
    param_specs(model_params(cfg), devices, rules(mesh, devices))  # heads of the prefill divide
    return devices


def _specs(cfg: ModelConfig, mesh: MeshConfig, devices: Mesh) -> Any:
    spread = "expert" in rules(mesh, devices)
    return param_specs(model_params(cfg), devices, WHOLE_ATTENTION if spread else {})


def parameter_shardings(cfg: ModelConfig, mesh: MeshConfig) -> Any:
    """Where `generate_over_mesh` reads each parameter: a tree of shardings, for `deepseek_jax.hf.load`."""
    devices = generation_mesh(cfg, mesh)
    is_spec = lambda x: isinstance(x, PartitionSpec)  # noqa: E731
    return jax.tree.map(
        lambda spec: NamedSharding(devices, spec), _specs(cfg, mesh, devices), is_leaf=is_spec
    )


# --- the two programs ---------------------------------------------------------------------------------------------


class Programs(NamedTuple):
    """Jitted, over global arrays.

    prefill: (params, prompts, bias, slots) -> (logits [b, v], cache); loop: as `generate.decode_loop`, from the logits.
    """

    prefill: Callable[..., Any]
    loop: Callable[..., Any]


def _anyone(going_b: jax.Array) -> jax.Array:
    return lax.psum(going_b.any().astype(jnp.int32), TOKEN_AXES) > 0


@functools.cache
def programs(cfg: ModelConfig, mesh: MeshConfig) -> Programs:
    """Of a model over a mesh; compiled once per bucket of lengths."""
    devices = generation_mesh(cfg, mesh)
    specs, options = _specs(cfg, mesh, devices), compiler_options(mesh, devices)
    many = experts_over(cfg, mesh, devices)
    wire = named_wire(mesh, AS_IT_IS)
    few = (
        low_latency_experts(masked=decoding_experts, wire=wire)
        if isinstance(many, MeshExperts)
        else decode_experts
    )

    def over_devices(local: Any, in_specs: Any, out_specs: Any) -> Any:
        return jax.shard_map(local, mesh=devices, in_specs=in_specs, out_specs=out_specs, check_vma=False)

    @functools.partial(jax.jit, static_argnames="slots", compiler_options=options)
    def run_prefill(params: Any, prompts: Prompts, bias_le: Any, slots: int) -> tuple[jax.Array, Any]:
        def local(params, prompts, bias_le):  # type: ignore[no-untyped-def]
            sequence = sequence_over(devices, prompts.tokens_bt.shape[1])
            params = sequence.own_heads(params, model_params(cfg))
            return prefill(params, cfg, prompts, bias_le, slots, many, sequence)

        in_specs = (specs, PartitionSpec(BATCH_AXES), WHOLE)
        return over_devices(local, in_specs, (ROWS, PartitionSpec(None, TOKEN_AXES)))(
            params, prompts, bias_le
        )

    @functools.partial(
        jax.jit, static_argnames=("sampling", "new_tokens", "num_ids"), compiler_options=options
    )
    def run_loop(params, rows, start, bias_le, stop_ids, key, sampling, new_tokens, num_ids):  # type: ignore[no-untyped-def]
        def local(params, rows, cache, start, bias_le, stop_ids, key):  # type: ignore[no-untyped-def]
            first_bv, pad_b, absent_b = rows
            key = jax.random.fold_in(key, lax.axis_index(TOKEN_AXES))
            state = (first_bv, cache, pad_b, start, bias_le, stop_ids, key)
            rest = (sampling, new_tokens, num_ids, few, absent_b, _anyone)
            return decode_loop(params, cfg, *state, *rest)

        (first_bv, cache, pad_b, absent_b), by_row = rows, PartitionSpec(None, TOKEN_AXES)
        in_specs = (specs, ROWS, by_row, WHOLE, WHOLE, WHOLE, WHOLE)
        return over_devices(local, in_specs, (ROWS, WHOLE))(
            params, (first_bv, pad_b, absent_b), cache, start, bias_le, stop_ids, key
        )

    return Programs(run_prefill, run_loop)


# --- generation ---------------------------------------------------------------------------------------------------


def generate_over_mesh(
    params: Any,
    cfg: ModelConfig,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    mesh: MeshConfig,
    *,
    balance_bias: Any = None,
    sampling: Sampling = Sampling(),
    stop_ids: Sequence[int] = (),
    seed: int = 0,
    num_ids: int | None = None,
) -> list[list[int]]:
    """As `generate.generate`, over the devices of `mesh`; greedy, the same tokens.

    Args:
        params: laid out by `parameter_shardings`; what lies elsewhere is moved there first.
        prompts: any number; rows that only fill the batch make it divide over the devices.
        mesh: `data`, `node`, `local`, `tensor`; `experts`, `dispatch`, `combine` and `receive` as in training.
        seed: of each device's own stream of random numbers.

    Raises:
        ValueError: as `generate`, or a mesh that does not fit the devices or the model.
    """
    check_request(cfg, prompts, max_new_tokens)
    run = programs(cfg, mesh)
    params = jax.device_put(params, parameter_shardings(cfg, mesh))
    fill = -len(prompts) % make_mesh(mesh).size
    padded = pad_prompts([*prompts, *[[0]] * fill], math.lcm(BUCKET, mesh.tensor))
    length = padded.tokens_bt.shape[1]
    first_bv, cache = run.prefill(params, padded, balance_bias, slots_for(length, max_new_tokens))
    absent_b = jnp.arange(len(padded.pad_b)) >= len(prompts)
    out_bn, steps = run.loop(
        params,
        (first_bv, cache, padded.pad_b, absent_b),
        jnp.int32(length),
        balance_bias,
        stop_array(stop_ids),
        jax.random.key(seed),
        sampling,
        max_new_tokens,
        num_ids or cfg.vocab_size,
    )
    rows = np.asarray(out_bn)[: len(prompts), : int(steps)].tolist()
    return [until_stop(row, stop_ids) for row in rows]
