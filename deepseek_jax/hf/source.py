"""A `Source` gives the parameters of a checkpoint, one tensor at a time; `stacks` makes stacked arrays of them.

Sources are a Hugging Face folder (read.py), a tree in memory (write.py) and an orbax checkpoint (orbax.py). Loading,
saving and conversion all read from a source, so FP8 in files is dequantised in one place.
"""

import abc
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from deepseek_jax.config import ModelConfig
from deepseek_jax.hf import fp8
from deepseek_jax.hf.names import Index, Leaf, leaves
from deepseek_jax.hf.tensors import DTYPES, Spec

# A leaf kept in FP8 is a dict of these two: checkpoint layout [stack..., out, in] and [stack..., blocks, blocks].
Q, SCALE = "fp8", "scale"

Window = tuple[slice, ...]  # a part of one tensor, or of a stacked array


class Source(abc.ABC):
    """The tensors of a model. dtypes: of each leaf by its path; `fp8.E4M3` where all its tensors are FP8."""

    cfg: ModelConfig
    dtypes: dict[str, np.dtype]

    @abc.abstractmethod
    def piece(self, leaf: Leaf, index: Index) -> np.ndarray:
        """One tensor in this model's layout; an FP8 tensor in the checkpoint's, [out, in]."""

    @abc.abstractmethod
    def scale(self, leaf: Leaf, index: Index) -> np.ndarray:
        """The scales, float32, of an FP8 tensor."""

    @abc.abstractmethod
    def bias(self) -> np.ndarray:
        """balance_bias, float32 [layer, expert]."""

    def forget(self) -> None:  # noqa: B027 (most sources keep nothing)
        """Drops the data that the source keeps in memory between two calls."""

    def read(self, leaf: Leaf, index: Index, window: Window, out: np.ndarray) -> None:
        """Fills `out` with a window of a tensor in this model's layout, dequantised, in the dtype of `out`.

        Of an FP8 matrix only the rows and columns around the window are dequantised.
        """
        piece = self.piece(leaf, index)
        if piece.dtype != fp8.E4M3:
            out[...] = piece[window]
            return
        n, dims = leaf.split, leaf.piece_shape
        columns, in_dims, in_window = _around(dims[:n], window[:n])
        rows, out_dims, out_window = _around(dims[n:], window[n:])
        scales = self.scale(leaf, index)
        w_oi = fp8.dequantise(piece[rows, columns], scales, out.dtype, rows.start, columns.start)
        out[...] = w_oi.T.reshape(*in_dims, *out_dims)[*in_window, *out_window]


def _around(dims: Sequence[int], window: Window) -> tuple[slice, tuple[int, ...], Window]:
    """Returns (rows of the flattened dims that contain a window, the dims of these rows, the window within them)."""
    width, (start, stop, _) = math.prod(dims[1:]), window[0].indices(dims[0])
    return slice(start * width, stop * width), (stop - start, *dims[1:]), (slice(None), *window[1:])


class Stacked(NamedTuple):
    """One array of the parameter tree, its tensors stacked on the axes `stack`.

    `read(index, window, out)` fills `out` with a window of the tensor at `index`.
    """

    name: str
    shape: tuple[int, ...]
    stack: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[Index, Window, np.ndarray], None]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def piece(self, index: Index) -> np.ndarray:
        """The whole tensor at `index`."""
        dims = self.shape[len(self.stack) :]
        out = np.empty(dims, self.dtype)
        self.read(index, (slice(None),) * len(dims), out)
        return out

    def fill(self, window: Window, out: np.ndarray) -> None:
        """Fills `out` with a window of the stacked array, one tensor at a time."""
        n = len(self.stack)
        starts = [s.indices(size)[0] for s, size in zip(window[:n], self.stack, strict=True)]
        for local in np.ndindex(*out.shape[:n]):
            index = tuple(start + i for start, i in zip(starts, local, strict=True))
            self.read(index, window[n:], out[local])


def stacks(source: Source, dtype: np.dtype | None = None, keep_fp8: bool = False) -> Iterator[Stacked]:
    """The arrays that hold a source's parameters, named by dotted paths.

    dtype: of all of them; None: as stored, FP8 as bfloat16. keep_fp8: FP8 leaves as "<path>.fp8" and "<path>.scale".
    """
    for path, leaf in leaves(source.cfg).items():
        is_fp8 = source.dtypes[path] == fp8.E4M3
        if is_fp8 and keep_fp8:
            blocks = fp8.scale_shape(leaf.hf_shape)
            for part, dims, kind, get in (
                (Q, leaf.hf_shape, fp8.E4M3, source.piece),
                (SCALE, blocks, DTYPES["F32"], source.scale),
            ):
                read = windowed(functools.partial(get, leaf))
                yield Stacked(f"{path}.{part}", (*leaf.stack, *dims), leaf.stack, kind, read)
        else:
            kind = dtype or (DTYPES["BF16"] if is_fp8 else source.dtypes[path])
            yield Stacked(path, leaf.shape, leaf.stack, kind, functools.partial(source.read, leaf))


def windowed(get: Callable[[Index], np.ndarray]) -> Callable[[Index, Window, np.ndarray], None]:
    """Makes a `Stacked.read` of `get`, which returns whole tensors, or memory maps of them."""

    def read(index: Index, window: Window, out: np.ndarray) -> None:
        out[...] = get(index)[window]

    return read


def require_fit(name: str, found: Spec, dtypes: Sequence[np.dtype], shape: tuple[int, ...]) -> None:
    """Raises ValueError unless `found`, the (dtype, shape) of the array `name`, is one of `dtypes` and `shape`."""
    dtype, dims = found
    if dims != tuple(shape) or dtype not in dtypes:
        allowed = [str(d) for d in dtypes]
        raise ValueError(f"{name} is {dtype}{list(dims)}, expected one of {allowed} and shape {list(shape)}")
