"""Bytes on a device of a unit that serves: weights, pages, and what a step has in memory at the same time.

Weights and pages are those of the programs' own arrays; arrays of a step are added up here as the exchange and the layers make
them, an upper bound: XLA lets one take the place of another.

Letters: n tokens of a device, p nodes, m devices of a node, d hidden, f expert inner, e physical experts of a device, v vocabulary.
"""

import dataclasses

from deepseek_jax.model.rows import num_rows
from deepseek_jax.parallel.exchange.dispatcher import Ragged
from deepseek_jax.parallel.exchange.wire import Wire
from deepseek_jax.parallel.layout import dispatcher_over
from deepseek_jax.parallel.mesh import abstract_mesh
from deepseek_jax.serving.deployment import Deployment
from experiments.planning.hardware import Hardware
from experiments.planning.serving_weights import page_bytes, pages_of, state_bytes, weight_bytes
from experiments.study.exchange_memory import buffers_of
from experiments.study.traffic import routing_bytes, row_bytes

BF16, FLOAT32 = 2, 4
EXPANDED = 4096  # tokens of which keys and values are made at a time: `model/over_pages.py`
DRAWING = 3  # float32 arrays of the size of the logits, while tokens are drawn


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on a device. weights: by part. step: arrays of a step, by part. free: what is left for pages.

    pages: how many there are; page: bytes of one.
    """

    weights: dict[str, int]
    state: int
    step: dict[str, float]
    usable: int
    page: int
    pages: int

    @property
    def free(self) -> float:
        return self.usable - sum(self.weights.values()) - self.state - sum(self.step.values())

    @property
    def fits(self) -> bool:
        return self.pages > 0 and self.pages * self.page <= self.free

    def requests(self, tokens: int) -> int:
        """Sequences of so many tokens that the pages hold at the same time."""
        return self.pages // pages_of(tokens)


def memory(unit: Deployment, hardware: Hardware) -> Memory:
    """pages: as the config says, or as many as memory holds, at most those of all rows."""
    found = Memory(
        weight_bytes(unit), state_bytes(unit), step_bytes(unit), hardware.usable, page_bytes(unit), 0
    )
    most = unit.rows * pages_of(unit.max_model_len)
    room = max(0, min(most, int(found.free // found.page)))
    return dataclasses.replace(found, pages=unit.pages or room)


def step_bytes(unit: Deployment, phase: str = "both") -> dict[str, float]:
    """Of the program that takes most, or of that of a phase."""
    programs = []
    if "prefill" not in (unit.role, phase):
        programs.append(_decoding(unit, unit.rows * (2 if unit.drafts else 1)))
    if "decode" not in (unit.role, phase):
        programs.append(_prefill(unit, unit.chunk))
    return max(programs, key=lambda parts: sum(parts.values()))


def _row(unit: Deployment) -> float:
    """Of a token on its way: FP8 with scales where weights are, with expert ids and routing weights."""
    form = "fp8" if unit.weights == "fp8" else "bf16"
    selected = unit.model.num_experts_per_tok + (unit.model.n_shared_experts if unit.shared_routed else 0)
    return row_bytes(unit.model.hidden_size, form) + 2 * routing_bytes(selected)


def _ffn_row(unit: Deployment) -> float:
    """Of a row at an expert: input, gate and up, what is between them and down, and output."""
    m, operand = unit.model, 1 + 4 / 128 if unit.weights == "fp8" else BF16
    d, f = m.hidden_size, m.moe_intermediate_size
    return d * operand + 2 * f * BF16 + f * operand + d * BF16


def _decoding(unit: Deployment, n: int) -> dict[str, float]:
    """With the exchange for few tokens: places for all tokens at each node, rows of all at each device."""
    m, mesh = unit.model, unit.mesh
    at_node, everything = mesh.node * n, unit.devices * n
    few = unit.experts <= m.num_experts_per_tok
    sorted_rows = (
        everything * unit.experts if few else num_rows(everything * m.num_experts_per_tok, unit.experts)
    )
    result = m.hidden_size * BF16
    return {
        "exchange": (2 * at_node + everything) * _row(unit) + (everything + 2 * at_node) * result,
        "rows of experts": sorted_rows * _ffn_row(unit),
        "logits": n * m.vocab_size * FLOAT32 * DRAWING,
    }


def _prefill(unit: Deployment, n: int) -> dict[str, float]:
    """With the exchange for many tokens, and attention in the expanded form; over `tensor`, n tokens of each device of a group."""
    m, mesh = unit.model, abstract_mesh(unit.mesh, unit.devices)
    wire = Wire("fp8", "bf16") if unit.weights == "fp8" else Wire()
    dispatcher = dispatcher_over(m, unit.mesh, mesh, wire)
    parts: dict[str, float] = {}
    pairs = float(n * m.num_experts_per_tok)
    if isinstance(dispatcher, Ragged):
        free = dataclasses.replace(dispatcher, most=None)  # an expert may lie on any node
        buffers = buffers_of(free, m, mesh, n, unit.experts)
        parts["exchange"] = sum(b.bytes for b in buffers if not b.name.startswith("experts"))
        pairs = next(b.rows for b in buffers if b.name.startswith("experts"))
    heads = m.num_attention_heads / unit.mesh.tensor
    queries = heads * (m.qk_head_dim + 2 * m.v_head_dim) * BF16 + heads * m.v_head_dim * FLOAT32
    keys = heads * (m.qk_head_dim + m.v_head_dim) * BF16
    attention = n * unit.mesh.tensor * queries + EXPANDED * unit.mesh.tensor * keys
    return parts | {
        "rows of experts": pairs * _ffn_row(unit),
        "attention": attention,
        "stream": 3 * n * m.hidden_size * BF16,
    }
