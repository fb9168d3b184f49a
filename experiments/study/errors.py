"""Measures the errors of a policy's GEMMs against the unquantised product.

Dims: m token, k input channel, n output channel.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.checks import choice
from deepseek_jax.precision.operands import TILE, Operand, along_rows, multiply, quantise
from deepseek_jax.precision.policy import Policy
from deepseek_jax.precision.product import Plain, quantise_weight
from experiments.study.accumulation import tensor_core_product
from pallas_kernels.testing.metrics import calc_diff, relative_l2

GEMMS = ("fprop", "dgrad", "wgrad")


class Errors(NamedTuple):
    """Errors of one GEMM. `underflow` and `saturated` are the shares of the first operand's non-zero elements that became
    zero, or lie at the largest E4M3 value."""

    relative_l2: float
    calc_diff: float
    underflow: float
    saturated: float


def _errors(a: Operand, b: Operand, plain: Any, exact: Any) -> Errors:
    got = multiply(a, b, jnp.float32)
    q = np.abs(np.asarray(a.q, np.float32))
    present = np.asarray(plain) != 0
    count = max(1, int(present.sum()))
    return Errors(
        relative_l2(got, exact),
        calc_diff(got, exact),
        float((present & (q == 0)).sum() / count),
        float((q == 448).sum() / count),
    )


def gemm_errors(policy: Policy | None, x_mk: Any, w_kn: Any, dy_mn: Any) -> dict[str, Errors]:
    """Returns the errors of fprop, dgrad and wgrad of a linear layer; with BF16 operands for no policy."""
    x, w, dy = (jnp.asarray(v, jnp.float32) for v in (x_mk, w_kn, dy_mn))
    x64, w64, dy64 = (np.asarray(v, np.float64) for v in (x, w, dy))
    exact = dict(zip(GEMMS, (x64 @ w64, dy64 @ w64.T, x64.T @ dy64), strict=True))
    if policy is None:
        x16, w16, dy16 = (np.asarray(v.astype(jnp.bfloat16), np.float64) for v in (x, w, dy))
        got = dict(zip(GEMMS, (x16 @ w16, dy16 @ w16.T, x16.T @ dy16), strict=True))
        return {
            g: Errors(relative_l2(got[g], exact[g]), calc_diff(got[g], exact[g]), 0.0, 0.0) for g in GEMMS
        }
    fprop_w, dgrad_w = quantise_weight(w, policy)
    x_q, dy_q = quantise(x, policy.fprop[0]), quantise(dy, policy.dgrad[0])
    x_t, dy_t = along_rows(x_q, policy.wgrad[0]), along_rows(dy, policy.wgrad[1])
    return {
        "fprop": _errors(x_q, fprop_w, x, exact["fprop"]),
        "dgrad": _errors(dy_q, dgrad_w, dy, exact["dgrad"]),
        "wgrad": _errors(x_t, dy_t, x.T, exact["wgrad"]),
    }


# --- tensors of a real model ------------------------------------------------------------------------------


@flax.struct.dataclass
class Probe(Plain):
    """An unquantised weight whose "gradient" is what its product saw: the input and the gradient of the output.

    x, dy: zeros [..., m, k] and [..., m, n], to be differentiated with respect to.
    """

    x: Any = None
    dy: Any = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.w.shape

    def wgrad(self, a: Any, dy: Any, groups: Any = None) -> Any:
        seen = {"w": None, "x": a.reshape(self.x.shape), "dy": dy.reshape(self.dy.shape)}
        return dataclasses.replace(self, **seen)


Path = tuple[str, ...]


def _replace(tree: Any, path: Path, new: Any) -> Any:
    return new if not path else {**tree, path[0]: _replace(tree[path[0]], path[1:], new)}


def capture(loss: Any, params: Any, where: dict[str, tuple[Path, int]], tokens: int) -> dict[str, Any]:
    """Returns what linear layers see in a backward pass: name -> (x [m, k], w [k, n], dy [m, n]) of the last layer.

    loss: params -> scalar. where: path of each stacked weight [layer, ...] in `params`, and how many of its dims are
    the input. tokens: m. Raises KeyError for a path that is not there.
    """
    probes = {}
    for name, (path, n_in) in where.items():
        w = params
        for key in path:
            w = w[key]
        k = int(np.prod(w.shape[1 : 1 + n_in]))
        n = w[0].size // k
        probes[name] = Probe(w, n_in, jnp.zeros((len(w), tokens, k)), jnp.zeros((len(w), tokens, n)))

    def probed(probes: dict[str, Probe]) -> jax.Array:
        with_probes = params
        for name, probe in probes.items():
            with_probes = _replace(with_probes, where[name][0], probe)
        return loss(with_probes)

    seen = jax.jit(jax.grad(probed))(probes)
    return {
        name: (s.x[-1], probes[name].w[-1].reshape(s.x.shape[-1], s.dy.shape[-1]), s.dy[-1])
        for name, s in seen.items()
    }


# --- synthetic tensors ------------------------------------------------------------------------------------


def synthetic(kind: str, rng: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    """Draws float32 [rows, columns]: "gaussian", "heavy-tailed" (Student t, 2 degrees of freedom) or "outlier channels"
    (Gaussian, one channel in a hundred 100 times larger)."""
    choice("kind", kind, KINDS)
    if kind == "gaussian":
        x = rng.standard_normal((rows, columns))
    elif kind == "heavy-tailed":
        x = rng.standard_t(2, (rows, columns))
    else:
        x = rng.standard_normal((rows, columns))
        x[:, rng.permutation(columns)[: max(1, columns // 100)]] *= 100
    return x.astype(np.float32)


KINDS = ("gaussian", "heavy-tailed", "outlier channels")


def accumulation_errors(
    depths: Iterable[int], rng: np.random.Generator, size: int = 32
) -> dict[str, list[float]]:
    """Returns the relative L2 error of a tensor core's sums of exact E4M3 products, for each contraction depth.

    The data are positive (uniform) or Gaussian; they meet in one 14-bit accumulator or are promoted every 128.
    """
    draw = {
        "positive": lambda k: rng.uniform(0, 1, (size, k)),
        "gaussian": lambda k: rng.standard_normal((size, k)),
    }
    out: dict[str, list[float]] = {}
    for k in depths:
        for data, sample in draw.items():
            operands = (quantise(jnp.asarray(sample(k), jnp.float32), TILE).q for _ in range(2))
            a, b = (np.asarray(q, np.float64) for q in operands)
            for name, every in (("14 bits", None), ("promoted", 128)):
                error = relative_l2(tensor_core_product(a, b, every), a @ b.T)
                out.setdefault(f"{data}, {name}", []).append(error)
    return out
