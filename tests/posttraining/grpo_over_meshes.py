"""A step of GRPO over meshes beside the gradient of the whole batch on one device:

    python -m tests.posttraining.grpo_over_meshes

Devices with outputs of their own, outputs divided over devices, experts and layers of other devices, divided masters, each in
micro-batches of unlike outputs. FP8 is traced.
"""

import dataclasses
from typing import Any

import jax

jax.config.update("jax_num_cpu_devices", 4)

import numpy as np  # noqa: E402

from deepseek_jax.config import MeshConfig  # noqa: E402
from deepseek_jax.parallel.layout import layout_over  # noqa: E402
from deepseek_jax.parallel.mesh import abstract_mesh, batch_sharding, make_mesh  # noqa: E402
from deepseek_jax.posttraining.objective import grpo  # noqa: E402
from deepseek_jax.training.gradients import value_of  # noqa: E402
from deepseek_jax.training.labels import totals  # noqa: E402
from deepseek_jax.training.state import state_shardings  # noqa: E402
from deepseek_jax.training.step import abstract_state, make_train_step  # noqa: E402
from tests.posttraining.grpo_batches import LOSS, TEMPERATURE, config, outputs  # noqa: E402
from tests.tiny_run import HYPER, fresh_state  # noqa: E402

REORDERED = 1e-5  # float32 sums in another order, as in test_step
MESHES: dict[str, dict[str, Any]] = {
    "data": {"data": 2},
    "data x tensor": {"data": 2, "tensor": 2},
    "node x local": {"node": 2, "local": 2},
    "tensor, ZeRO": {"tensor": 2, "zero": True},
    "1F1B": {"pipe": 2, "schedule": "one_f_one_b"},
    "DualPipeV": {"pipe": 2, "schedule": "dualpipe_v"},
}
MODEL = {"num_hidden_layers": 3}


def alone(state: Any, batch: Any) -> Any:
    """((scalar, parts), gradient) of the whole batch at once."""
    cfg = config(MODEL)
    layout = layout_over(cfg, make_mesh(cfg.mesh, jax.devices()[:1]))

    def run(params: Any) -> Any:
        total = totals(cfg, batch, len(batch["tokens"]))
        return value_of(cfg, layout, grpo(cfg, LOSS, TEMPERATURE))(
            params, batch, state.balance_bias, total, HYPER
        )

    return jax.device_get(jax.jit(jax.value_and_grad(run, has_aux=True))(state.params))


def compare(name: str, want: Any, state: Any, batch: Any) -> None:
    (_, parts), gradient = want
    cfg = dataclasses.replace(
        config(MODEL, grad_accumulation=4, batch_size=len(batch["tokens"])), mesh=MeshConfig(**MESHES[name])
    )
    n = 4 if name in ("data x tensor", "node x local") else 2
    mesh = make_mesh(cfg.mesh, jax.devices()[:n])
    step = make_train_step(cfg, mesh, grpo(cfg, LOSS, TEMPERATURE))
    laid_out = jax.device_put(jax.device_get(state), state_shardings(cfg, mesh))
    after, metrics = step(laid_out, jax.device_put(batch, batch_sharding(mesh)), HYPER)
    for key, x in parts.metrics.items():
        np.testing.assert_allclose(
            metrics.scalars[key], x, rtol=REORDERED, atol=1e-7, err_msg=f"{name}: {key}"
        )
    np.testing.assert_array_equal(metrics.counts_le, parts.counts_le)
    pairs = zip(*map(jax.tree.leaves, jax.device_get((after.opt_state.mu, gradient))), strict=True)
    worst = max(
        np.linalg.norm(10 * x - y) / np.linalg.norm(y) for x, y in pairs if y.any()
    )  # 1 - beta_1 = 0.1
    print(f"{name:14} gradients differ by {worst:.1e} of their norm at most")
    assert worst < REORDERED


def trace_fp8(name: str) -> None:
    cfg = config(MODEL, grad_accumulation=4)
    cfg = dataclasses.replace(cfg, mesh=MeshConfig(**MESHES[name]), precision="deepseek_fp8")
    n = 4 if name in ("data x tensor", "node x local") else 2
    mesh = abstract_mesh(cfg.mesh, n)
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), outputs(16)[0])
    step = make_train_step(cfg, mesh, grpo(cfg, LOSS, TEMPERATURE))
    _, metrics = jax.eval_shape(step, abstract_state(cfg, mesh), batch, HYPER)
    print(f"{name:14} FP8 is traced: {sorted(metrics.objective)}")


def main() -> None:
    batch, _ = outputs(16)
    state = fresh_state(config(MODEL))
    want = alone(state, batch)
    for name in MESHES:
        compare(name, want, fresh_state(config(MODEL)), batch)
    for name in ("node x local", "1F1B"):
        trace_fp8(name)


if __name__ == "__main__":
    main()
