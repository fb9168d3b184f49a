"""Experts of a checkpoint read straight into the slots of a plan (`balancing/plan.py`), copies and all.

So the model's own experts need not divide over the devices, as 256 over 144 do not, and no device holds them twice. A plan that
has one expert more than the model has the shared one as the last of them (`model/moe.py: with_shared`): it lies in slots then, and
nowhere else.

Dims: l layer, p slot, e expert.
"""

import re
from collections.abc import Iterable, Iterator

import numpy as np

from deepseek_jax.balancing.plan import Plan
from deepseek_jax.checks import require
from deepseek_jax.hf.source import Index, Stacked, Window

_EXPERTS = re.compile(r"(.*\.ffn)\.experts\.(w_\w+)_(edf|efd)(\..*)?")
_SHARED = re.compile(r".*\.ffn\.shared\..*")


def in_slots(found: Iterable[Stacked], plan: Plan) -> Iterator[Stacked]:
    """The arrays of a checkpoint, those of experts [l, p, ...] by the plan's slots. plan: of the MoE layers, and, for MTP modules, one
    layer more. Raises ValueError where the plan has a shared expert, and the checkpoint no single one of the same dtype."""
    by_name = {one.name: one for one in found}
    for one in by_name.values():
        match = _EXPERTS.fullmatch(one.name)
        if match is None:
            if not (_SHARED.fullmatch(one.name) and _has_shared(plan, by_name)):
                yield one
            continue
        block, matrix, dims, part = match.groups()
        shared = by_name.get(f"{block}.shared.{matrix}_{dims.replace('e', '')}{part or ''}")
        yield _slotted(one, shared, plan)


def _has_shared(plan: Plan, by_name: dict[str, Stacked]) -> bool:
    """Whether the plan has an expert more than the layers."""
    experts = next(one.stack[1] for one in by_name.values() if _EXPERTS.fullmatch(one.name))
    return plan.experts > experts


def _slotted(one: Stacked, shared: Stacked | None, plan: Plan) -> Stacked:
    layers, experts = one.stack
    if plan.experts > experts:
        fits = shared is not None and shared.shape[1:] == one.shape[2:] and shared.dtype == one.dtype
        require(
            fits and plan.experts == experts + 1,
            f"{one.name}: the shared expert is no one more of these, of the same shape and dtype; leave it apart",
        )
    mtp = one.name.startswith("mtp.")
    expert_lp = plan.physical_lp[-1:].repeat(layers, 0) if mtp else plan.physical_lp[:layers]

    def read(index: Index, window: Window, out: np.ndarray) -> None:
        layer, slot = index
        expert = int(expert_lp[layer, slot])
        if expert < experts:
            one.read((layer, expert), window, out)
        else:
            assert shared is not None
            shared.read((layer,), window, out)

    stack = layers, expert_lp.shape[1]
    return one._replace(shape=(*stack, *one.shape[2:]), stack=stack, read=read)
