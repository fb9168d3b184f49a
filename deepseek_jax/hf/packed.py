"""transformers 5 saves routed experts in one tensor per layer with `save_original_format=False`.

    mlp.experts.gate_up_proj  [expert, 2 * f, d]     each expert's gate rows, then its up rows
    mlp.experts.down_proj     [expert, d, f]
    ..._scale_inv             of FP8: [expert, blocks of rows, blocks of columns]

An expert's matrix is a run of bytes in such a tensor, so it is listed as a tensor of its own, under the name that the
published files have, and read like any other.

Dims: d hidden, f FFN inner.
"""

import math
import re
from collections.abc import Iterator

from deepseek_jax.hf.tensors import DTYPES, Tensor

_PACKED = re.compile(r"(model\.layers\.\d+\.mlp\.experts)\.(gate_up_proj|down_proj)(_scale_inv)?")
_MAX_EXPERTS = 100_000


def unpacked(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Replaces each tensor of packed experts by one tensor per expert. Raises ValueError for impossible shapes."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        match = _PACKED.fullmatch(name)
        for part, own in _parts(match, tensor) if match else [(name, tensor)]:
            if part in tensors and match:
                raise ValueError(f"{tensor.file}: tensor {name} holds {part} too, which is there by itself")
            found[part] = own
    return found


def _parts(match: re.Match[str], tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    prefix, kind, scale = match[1], match[2], match[3] or ""
    names = ("gate_proj", "up_proj") if kind == "gate_up_proj" else ("down_proj",)
    shape, dtype = tensor.shape, DTYPES.get(tensor.dtype)
    whole = len(shape) == 3 and shape[1] % len(names) == 0 and 0 not in shape and shape[0] <= _MAX_EXPERTS
    if dtype is None or not whole:
        raise ValueError(
            f"{tensor.file}: tensor {match[0]} is {tensor.dtype}{list(shape)}, expected [expert, rows, columns]"
            f"{' with an even number of rows' * (len(names) - 1)} and one of {list(DTYPES)}"
        )
    own = (shape[1] // len(names), shape[2])
    nbytes = math.prod(own) * dtype.itemsize
    for expert in range(shape[0]):
        for i, name in enumerate(names):
            start = tensor.start + (expert * len(names) + i) * nbytes
            yield f"{prefix}.{expert}.{name}.weight{scale}", tensor._replace(shape=own, start=start)
