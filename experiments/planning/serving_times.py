"""Seconds of a step of serving on one device of a unit, part by part: a roofline.

A part's time is the longest of its FLOPs at the rate that kernels reach and its weights and latents at the rate at which
they are read, and of the bytes of passes between (`hardware.py` names the source of each rate). No constant is fitted to a
step: launches, waiting for other devices, uneven experts and the host are not in it, so a real step takes longer.

    decode_step(model, unit, hardware, rows=88, context=4989).serial      # seconds; .overlapped with two micro-batches
    prefill_step(model, unit, hardware, tokens=16384, prefix=2048)

With two micro-batches each half reads all weights, and its exchanges run beside the other's arithmetic in the order that
DeepSeek tells: in prefill attention and experts of one beside dispatch and combine of the other; in decoding five stages, the
halves two stages apart (inference overview; SGLang's published cuts).

Letters: n tokens of a device in a step, d hidden, q and c latents, r rope, h heads, k keys, v values, f FFN inner.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import NamedTuple

from deepseek_jax.config import ModelConfig
from experiments.planning.hardware import COMM_SMS, Hardware
from experiments.planning.serving_links import trip
from experiments.planning.times import Task, span
from experiments.planning.units import Unit

FP8 = 1 + 4 / 128  # bytes of an activation in E4M3 with a scale per 128
BF16, FLOAT32 = 2, 4
LAG = 2  # stages between the halves of a decode step


@dataclasses.dataclass(frozen=True)
class Part:
    """flops: of a device; read: bytes of weights, latents: bytes of the cache; nvlink, nic: bytes sent; seconds."""

    flops: float = 0.0
    read: float = 0.0
    latents: float = 0.0
    nvlink: float = 0.0
    nic: float = 0.0
    seconds: float = 0.0

    def times(self, factor: float) -> "Part":
        return Part(*(factor * x for x in dataclasses.astuple(self)))

    def plus(self, other: "Part") -> "Part":
        return Part(
            *(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True))
        )


Layer = dict[str, Part]
EXCHANGE = ("dispatch", "combine")


@dataclasses.dataclass(frozen=True)
class Parts:
    """A step. parts: name -> all layers together, one micro-batch. overlapped: seconds with two micro-batches.

    halves: seconds of (arithmetic, exchange) of both halves, each on its own: no order of them takes less than the larger.
    """

    parts: Layer
    overlapped: float
    halves: tuple[float, float]

    def __getitem__(self, name: str) -> Part:
        return self.parts.get(name, Part())

    @property
    def serial(self) -> float:
        """Seconds, one part after the other."""
        return self.total.seconds

    @property
    def total(self) -> Part:
        return functools.reduce(Part.plus, self.parts.values(), Part())

    @property
    def seconds(self) -> float:
        """The better of the two."""
        return min(self.serial, self.overlapped)


class Load(NamedTuple):
    """What a step has to do on a device: n tokens, those whose logits are made, and attention of a layer: FLOPs and the rate
    at which they run, products with weights in BF16 of cached tokens, bytes of latents.

    absorbed: queries and outputs go through the up-projections of latents instead of keys and values.
    """

    n: float
    logits: float
    core: float
    core_rate: float
    expanded: float
    latents: float
    few: bool


@dataclasses.dataclass(frozen=True)
class _Device:
    """A model on a device of a unit, while `busy` SMs move data."""

    model: ModelConfig
    unit: Unit
    hardware: Hardware
    busy: int = 0

    @functools.cached_property
    def _factor(self) -> float:
        return self.hardware.rates_beside(self.busy)

    def product(
        self, n: float, weights: float, kind: str = "linear", bf16: bool = False, copies: float = 1
    ) -> Part:
        """n rows by a weight of so many entries, or by as many of `copies` weights in all."""
        hw, fp8 = self.hardware, self.unit.fp8 and not bf16
        rates = hw.grouped if kind == "grouped" else hw.linear
        rate = rates["fp8" if fp8 else "bf16"].fprop * self._factor
        read = copies * weights * (self.unit.weight() if fp8 else BF16)
        flops = 2.0 * n * weights
        return Part(flops, read, seconds=max(flops / rate, read / hw.few_rows))

    def gate(self, n: float) -> Part:
        """Affinities in float32, as the router has them."""
        weights = self.model.hidden_size * self.model.n_routed_experts
        flops, read = 2.0 * n * weights, FLOAT32 * weights
        rate = self.hardware.linear["float32"].fprop
        return Part(flops, read, seconds=max(flops / rate, read / self.hardware.few_rows)).plus(
            self.passes(n * (2 * self.model.hidden_size * BF16 + 3 * FLOAT32 * self.model.n_routed_experts))
        )

    def passes(self, size: float) -> Part:
        """Norms, casts, rotary embedding, copies: bytes read and written."""
        return Part(seconds=size / (self.hardware.passes * self._factor))

    # --- attention ------------------------------------------------------------------------------------------------

    def projections(self, load: Load) -> Part:
        m, n, t = self.model, load.n, self.unit.tensor
        d, h, q, c = m.hidden_size, m.num_attention_heads, m.q_lora_rank or 0, m.kv_lora_rank
        low, queries, values = q + c + m.qk_rope_head_dim, h * m.qk_head_dim, h * m.v_head_dim
        up = c * h * (m.qk_nope_head_dim + m.v_head_dim)
        found = self.product(n, d * low).plus(self.shared_by(t, n, (q or d) * queries + values * d))
        found = found.plus(
            self.shared_by(t, n if load.few else 0, up, bf16=True)
        )  # absorbed; else in the core
        moved = d * (2 * BF16 + BF16 + FP8) + low * (3 * BF16 + FP8) + 2 * queries * BF16
        moved += values * (BF16 + FP8) + 3 * d * BF16 + (h * 2 * c * BF16 if load.few else 0)
        return found.plus(self.passes(n * moved))

    def shared_by(self, devices: int, n: float, weights: float, bf16: bool = False) -> Part:
        """A weight divided over devices that run each other's rows."""
        return self.product(n * devices, weights / devices, bf16=bf16)

    def core(self, load: Load) -> Part:
        hw = self.hardware
        reads = load.latents / hw.latent_reads
        found = Part(load.core, 0.0, load.latents, seconds=max(load.core / load.core_rate, reads))
        if not load.few:  # keys and values of all tokens seen, made and read by the attention
            m = self.model
            width = m.num_attention_heads * (m.qk_nope_head_dim + m.v_head_dim)
            made = self.shared_by(self.unit.tensor, load.expanded, m.kv_lora_rank * width, bf16=True)
            found = found.plus(made).plus(self.passes(load.expanded * 2 * width * BF16))
        return found

    def over_tensor(self, n: float) -> Part:
        """Latents are gathered and outputs scattered."""
        m = self.model
        low = (m.q_lora_rank or m.hidden_size) + m.kv_lora_rank + m.qk_rope_head_dim
        sent = (self.unit.tensor - 1) * n * (low + m.hidden_size) * BF16
        return Part(nvlink=sent, seconds=sent / self.hardware.nvlink.reached)

    # --- MLP ------------------------------------------------------------------------------------------------------

    def ffn(self, n: float, width: int, kind: str = "linear", copies: float = 1) -> Part:
        up, down = 2 * self.model.hidden_size * width, self.model.hidden_size * width
        moved = width * (2 * BF16 + BF16 + FP8)
        products = self.product(n, up, kind, copies=copies).plus(self.product(n, down, kind, copies=copies))
        return products.plus(self.passes(n * moved))

    def routed(self, n: float) -> Part:
        """Rows of all devices are even over all: as many as this one's tokens choose."""
        m, k, d = self.model, self.unit.selected(self.model), self.model.hidden_size
        experts = self.ffn(n * k, m.moe_intermediate_size, "grouped", self.unit.experts)
        return experts.plus(self.passes(n * (2 * k * d * (FP8 + BF16) + 3 * d * BF16)))

    def trip(self, n: float, way: str, few: bool) -> Part:
        t = trip(self.model, self.unit, self.hardware, n, way, few)
        return Part(nvlink=t.nvlink, nic=t.nic, seconds=t.seconds)

    # --- layers and ends ------------------------------------------------------------------------------------------

    def layer(self, load: Load, moe: bool) -> Layer:
        m, n = self.model, load.n
        parts = {"attention projections": self.projections(load), "attention core": self.core(load)}
        if self.unit.tensor > 1:
            parts["attention over tensor"] = self.over_tensor(n)
        if not moe:
            around = self.passes(n * m.hidden_size * (5 * BF16 + FP8))
            return parts | {"dense MLP": self.ffn(n, m.intermediate_size).plus(around)}
        parts |= {"gate": self.gate(n), "dispatch": self.trip(n, "dispatch", load.few)}
        if m.n_shared_experts and not self.unit.shared_routed:
            parts["shared expert"] = self.ffn(n, m.n_shared_experts * m.moe_intermediate_size)
        return parts | {"routed experts": self.routed(n), "combine": self.trip(n, "combine", load.few)}

    def head(self, rows: float) -> Part:
        """Logits in BF16, and what draws from them."""
        product = self.product(rows, self.model.hidden_size * self.model.vocab_size, bf16=True)
        return product.plus(self.passes(rows * self.model.vocab_size * 4 * FLOAT32))

    def module(self, load: Load, drafted: float) -> Layer:
        """The MTP module: its latents of `load.n` tokens; and its layer and logits for those that draft."""
        m = self.model
        d, low = m.hidden_size, m.kv_lora_rank + m.qk_rope_head_dim
        latents = self.product(load.n, 2 * d * d + d * low)
        if not drafted:
            return {"MTP": latents}
        share = drafted / load.n
        once = load._replace(n=drafted, core=share * load.core, logits=drafted)
        found = self.layer(once, True)
        inside = [part for name, part in found.items() if name not in EXCHANGE]
        own = functools.reduce(Part.plus, [*inside, latents, self.head(drafted)], Part())
        return {"MTP": own} | {name: found[name] for name in EXCHANGE}

    def ends(self, load: Load, drafted: float) -> Layer:
        found = {"head": self.head(load.logits)}
        return found | (self.module(load, drafted) if self.unit.drafts else {})


# --- a step -------------------------------------------------------------------------------------------------------


def decode_step(model: ModelConfig, unit: Unit, hardware: Hardware, rows: float, context: float) -> Parts:
    """One token of each of `rows` sequences on a device, each with so many tokens in the cache, all devices alike; with
    `unit.drafts` two tokens of each, the last and its draft, and the module's next draft."""
    return _step(
        model, unit, hardware, lambda share: _decode_load(model, unit, hardware, share * rows, context), rows
    )


def _decode_load(model: ModelConfig, unit: Unit, hardware: Hardware, rows: float, context: float) -> Load:
    n = rows * (2 if unit.drafts else 1)  # both tokens of a pair read the latents together
    pairs = 2.0 * model.num_attention_heads * (2 * model.kv_lora_rank + model.qk_rope_head_dim)
    latents = rows * context * unit.latent(model)
    return Load(n, n, n * context * pairs, hardware.latent_core, 0.0, latents, True)


def prefill_step(
    model: ModelConfig, unit: Unit, hardware: Hardware, tokens: float, prefix: float, sequences: float = 1
) -> Parts:
    """`tokens` new tokens of a device, of so many sequences together, each behind `prefix` tokens in the cache; all devices
    alike. Attention is expanded: keys and values of the prefix are made again."""

    def load(share: float) -> Load:
        n, s = share * tokens, share * sequences
        pairs = n * (prefix + tokens / sequences / 2)
        flops = 2.0 * model.num_attention_heads * (model.qk_head_dim + model.v_head_dim) * pairs
        seen = n + s * prefix
        return Load(n, s, flops, hardware.core_forward, seen, seen * unit.latent(model), False)

    return _step(model, unit, hardware, load, 0)


def _step(
    model: ModelConfig, unit: Unit, hardware: Hardware, load: Callable[[float], Load], rows: float
) -> Parts:
    """load: of a share of the step's rows."""
    drafted = rows if unit.drafts else 0
    whole = _Device(model, unit, hardware)
    all_of, half_of = load(1.0), load(0.5)
    parts = _sum(whole, all_of, drafted)
    half = dataclasses.replace(whole, busy=0 if all_of.few else COMM_SMS)
    halves = _sum(half, half_of, drafted / 2)
    exchange = 2 * sum(halves[name].seconds for name in EXCHANGE if name in halves)
    arithmetic = 2 * sum(part.seconds for part in halves.values()) - exchange
    dense, moe = half.layer(half_of, False), half.layer(half_of, True)
    layers = [dense] * model.first_k_dense_replace + [moe] * model.num_moe_layers
    ends = half.ends(half_of, drafted / 2)
    alone = 2 * sum(part.seconds for part in ends.values())
    order = _stages(layers) if all_of.few else _turns(layers)
    return Parts(parts, span(order) + alone, (arithmetic, exchange))


def _sum(device: _Device, load: Load, drafted: float) -> Layer:
    """Name -> the part of all layers and ends."""
    m, found = device.model, dict[str, Part]()
    both = [(m.first_k_dense_replace, False), (m.num_moe_layers, True)]
    terms = [(count, device.layer(load, moe)) for count, moe in both if count]
    for count, parts in [*terms, (1, device.ends(load, drafted))]:
        for name, part in parts.items():
            found[name] = found.get(name, Part()).plus(part.times(count))
    return found


# --- two micro-batches --------------------------------------------------------------------------------------------

PROJECTIONS, CORE = ("attention projections",), ("attention core", "attention over tensor", "gate")


def _tasks(layers: Iterable[Layer], half: str) -> list[list[Task]]:
    """The stages of a half, five per layer: projections | core, gate | dispatch beside the shared expert or the dense MLP |
    experts | combine."""
    found: list[list[Task]] = []
    for i, parts in enumerate(layers):

        def seconds(*names: str, parts: Layer = parts) -> float:
            return sum(parts[name].seconds for name in names if name in parts)

        def key(stage: str, i: int = i) -> tuple[str, int, str]:
            return half, i, stage

        found += [
            [Task(key("low"), "compute", seconds(*PROJECTIONS), (key("back", i - 1), key("beside", i - 1)))],
            [Task(key("core"), "compute", seconds(*CORE), (key("low"),))],
            [
                Task(key("there"), "exchange", seconds("dispatch"), (key("core"),)),
                Task(key("beside"), "compute", seconds("shared expert", "dense MLP"), (key("core"),)),
            ],
            [Task(key("experts"), "compute", seconds("routed experts"), (key("there"),))],
            [Task(key("back"), "exchange", seconds("combine"), (key("experts"),))],
        ]
    return found


def _stages(layers: list[Layer]) -> list[Task]:
    """Decoding: the second half runs LAG stages behind the first."""
    first, second = _tasks(layers, "a"), _tasks(layers, "b")
    order: list[Task] = []
    for i in range(len(first) + LAG):
        order += [*(first[i] if i < len(first) else []), *(second[i - LAG] if i >= LAG else [])]
    return order


def _turns(layers: list[Layer]) -> list[Task]:
    """Prefill: the halves take turns by attention and by experts, and what travels does so beside the other's turn."""
    order: list[Task] = []
    first, second = _tasks(layers, "a"), _tasks(layers, "b")
    for i in range(0, len(first), 5):
        for stages in ((0, 1, 2), (3, 4)):
            for half in (first, second):
                order += [task for j in stages for task in half[i + j]]
    return order
