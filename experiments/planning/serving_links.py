"""Bytes that a device sends in a dispatch or a combine of serving, and the seconds that they take.

As DeepEP sends them, at the rates of its own tables (H800, NVLink at 160 GB/s, a ConnectX-7 per GPU; docs/legacy.md): for many
tokens ("normal") a row per node that a token has experts in, counted with the token's own node, as those tables are; for few
tokens ("low latency") a row per chosen expert, and no SM. Or as this project's programs do (`parallel/exchange/`): a row per
node, of few tokens taken or not, then a row per device inside, one hop after the other at the links' own rates.
"""

import functools
import math
from collections.abc import Mapping
from typing import NamedTuple

from deepseek_jax.config import ModelConfig
from experiments.planning.hardware import GIGA, Hardware
from experiments.planning.units import Unit
from experiments.study.traffic import routing_bytes, row_bytes, sample_rows

SAMPLED = 4000  # tokens, of which rows are counted
HEADER = 16  # bytes of a row that DeepEP sends to an expert, beside the token

# devices -> (dispatch, combine): bytes/s of the slower link, FP8 there and BF16 back, 4,096 tokens each.
MANY = {8: (153, 158), 16: (43, 43), 32: (58, 57), 64: (51, 50)}
# devices -> (dispatch, combine): microseconds of 128 tokens with 8 experts each, all over the NICs.
FEW = {
    8: (77, 114),
    16: (118, 195),
    32: (155, 273),
    64: (173, 314),
    128: (192, 369),
    256: (194, 360),
}
FEW_TOKENS, FEW_EXPERTS = 128, 8


class Trip(NamedTuple):
    """Bytes that a device sends over each link, one way, and seconds."""

    nvlink: float
    nic: float
    seconds: float


def between(table: Mapping[int, tuple[float, float]], devices: int, way: int) -> float:
    """What a table says of so many devices: a straight line over the logarithm, its ends beyond."""
    sizes = sorted(table)
    n = min(max(devices, sizes[0]), sizes[-1])
    above = next(s for s in sizes if s >= n)
    below = max(s for s in sizes if s <= n)
    if above == below:
        return table[above][way]
    share = math.log(n / below) / math.log(above / below)
    return (1 - share) * table[below][way] + share * table[above][way]


def trip(model: ModelConfig, unit: Unit, hardware: Hardware, tokens: float, way: str, few: bool) -> Trip:
    """way: "dispatch" or "combine". few: by the exchange for few tokens."""
    if unit.devices == 1:
        return Trip(0.0, 0.0, 0.0)
    if unit.house:
        return _house(model, unit, hardware, tokens, way, few)
    return (_few if few else _many)(model, unit, hardware, tokens, way)


def _row(model: ModelConfig, way: str) -> int:
    return row_bytes(model.hidden_size, "fp8" if way == "dispatch" else "bf16")


def _few(model: ModelConfig, unit: Unit, hardware: Hardware, tokens: float, way: str) -> Trip:
    """A row per token and expert; the table's times are of 7,168 channels, and bytes per second is what is taken from them."""
    which = way == "combine"
    size = FEW_TOKENS * FEW_EXPERTS * (2 * 7168 if which else row_bytes(7168, "fp8") + HEADER)
    rate = size / (1e-6 * between(FEW, unit.devices, which))
    sent = tokens * unit.selected(model) * (_row(model, way) + (0 if which else HEADER))
    inside = unit.nodes == 1
    return Trip(sent * inside, sent * (not inside), sent / rate)


def _many(model: ModelConfig, unit: Unit, hardware: Hardware, tokens: float, way: str) -> Trip:
    nodes, forwarded = rows_of(model, unit)
    rate = GIGA * between(MANY, unit.devices, way == "combine")
    size = tokens * (_row(model, way) + (routing_bytes(unit.selected(model)) if way == "dispatch" else 0))
    if unit.nodes == 1:
        return Trip(forwarded * size, 0.0, forwarded * size / rate)
    crossing = nodes * (1 - 1 / unit.nodes)
    return Trip(forwarded * size, crossing * size, nodes * size / rate)


def _house(model: ModelConfig, unit: Unit, hardware: Hardware, tokens: float, way: str, few: bool) -> Trip:
    nodes, forwarded = rows_of(model, unit)
    crossing = unit.nodes - 1 if few else nodes * (1 - 1 / unit.nodes)
    beside = 2 * routing_bytes(unit.selected(model)) if way == "dispatch" else 0
    size = tokens * (_row(model, way) + beside)
    nvlink, nic = forwarded * size, crossing * size
    seconds = nvlink / hardware.nvlink.reached + nic / hardware.nic.reached
    return Trip(nvlink, nic, seconds + (0 if few else hardware.exchange_start))


@functools.lru_cache(64)
def rows_of(model: ModelConfig, unit: Unit) -> tuple[float, float]:
    """Means per token: nodes that have experts of it, its own included; rows that are forwarded to other devices of these.

    Experts lie in order where they divide over the nodes by groups, as hierarchical balancing keeps them; else, and for
    a shared expert that is routed, anywhere.
    """
    p, m = unit.nodes, unit.local * unit.tensor
    grouped = model.n_group % p == 0 and model.n_routed_experts % (p * m) == 0 and not unit.shared_routed
    if grouped:
        rows = sample_rows(model, p, m, SAMPLED)
        nodes = float(rows.two_hop.mean()) / (1 - 1 / p) if p > 1 else 1.0
        return nodes, float(rows.forwarded.mean())
    k = unit.selected(model)
    nodes, devices = (n * (1 - (1 - 1 / n) ** k) for n in (p, p * m))
    return nodes, devices * (1 - 1 / m)
