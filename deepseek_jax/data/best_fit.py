"""Packs whole samples into windows, best fit: none is cut, none sees another, what stays free is padding.

An epoch permutes all samples and packs them block by block (as `packing.EpochPacker` does with documents). Inside a
block, samples are placed from the longest to the shortest, each in the window with the least room that is enough. With
the thousands of samples of a block, short ones fill what long ones leave: windows are full to a few tokens in a hundred,
where the lengths allow it.

Every sample of a window is a segment of its own whose positions begin at 0; so is the padding, which comes last. A window
has seq_len + 1 tokens, the last a label only.

Legend: n samples, l = seq_len + 1.
"""

import bisect
import dataclasses
import functools
from collections.abc import Iterator, Sequence

import numpy as np

from deepseek_jax.data.conversations import Sample
from deepseek_jax.data.packing import BLOCK_TOKENS, BLOCK_WINDOWS
from deepseek_jax.data.sample_cache import Samples
from deepseek_jax.data.shuffle import permuted

_ORDER = 106  # keeps this random stream apart from those of the other packing


def best_fit(length_n: Sequence[int], room: int) -> list[list[int]]:
    """The places in `length_n` that each window of `room` tokens takes. None is longer than `room`.

    Best fit decreasing; of samples of a length, and of windows with the same room, the first.
    """
    windows: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (room left, window), in order; full windows are gone
    for place in sorted(range(len(length_n)), key=lambda i: -length_n[i]):
        length = length_n[place]
        found = bisect.bisect_left(free, (length, -1))
        if found < len(free):
            left, window = free.pop(found)
        else:
            left, window = room, len(windows)
            windows.append([])
        windows[window].append(place)
        if left > length:
            bisect.insort(free, (left - length, window))
    return windows


class PackedSamples:
    """Random access to the windows of some samples.

    Args:
        samples: all of them.
        index: int64 [n], which of them, in order.
        seq_len: inputs of a window; longer samples are cut to seq_len + 1 tokens.
        pad: the id of what is no token.
    """

    def __init__(self, samples: Samples, index: np.ndarray, seq_len: int, pad: int):
        self._samples, self._index, self._length, self._pad = samples, index, seq_len + 1, pad
        self._windows = best_fit(np.minimum(samples.lengths[index], self._length).tolist(), self._length)

    def __len__(self) -> int:
        return len(self._windows)

    def require_a_window(self) -> None:
        """Raises ValueError where there is none."""
        if not len(self):
            raise ValueError("there is no sample")

    @property
    def num_tokens(self) -> int:
        """Tokens in all windows that are no padding."""
        return int(np.minimum(self._samples.lengths[self._index], self._length).sum())

    def __getitem__(self, window: int) -> dict[str, np.ndarray]:
        """Arrays [l]: "tokens", "segments" (from 1), "positions" int32, "loss_mask", "padding" bool."""
        places = self._windows[window]
        tokens = np.full(self._length, self._pad, np.int32)
        segments = np.full(self._length, len(places) + 1, np.int32)
        positions = np.empty(self._length, np.int32)
        learned, padding = np.zeros((2, self._length), bool)
        begin = 0
        for segment, place in enumerate(places, start=1):
            ids, said = self._samples[int(self._index[place])]
            here = slice(begin, min(begin + len(ids), self._length))
            size = here.stop - begin
            tokens[here], learned[here], segments[here] = ids[:size], said[:size], segment
            positions[here] = np.arange(size)
            begin += size
        padding[begin:] = True
        positions[begin:] = np.arange(self._length - begin)
        return {
            "tokens": tokens,
            "segments": segments,
            "positions": positions,
            "loss_mask": learned,
            "padding": padding,
        }


@dataclasses.dataclass(frozen=True)
class SamplePacker:
    """Builds the blocks of each epoch; which samples a block has depends on (seed, epoch, block) alone.

    index: int64 [n], which of `samples` there are.
    """

    samples: Samples
    index: np.ndarray
    seq_len: int
    pad: int
    seed: int = 0

    def __iter__(self) -> Iterator[Sample]:
        """The samples as they are in windows."""
        for i in self.index.tolist():
            ids, learned = self.samples[i]
            yield Sample(ids[: self.seq_len + 1], learned[: self.seq_len + 1])

    @functools.cached_property
    def num_tokens(self) -> int:
        """Tokens of an epoch."""
        return int(np.minimum(self.samples.lengths[self.index], self.seq_len + 1).sum())

    @functools.cached_property
    def num_learned(self) -> int:
        """Labels of an epoch."""
        cut = self.index[self.samples.lengths[self.index] > self.seq_len + 1]
        lost = sum(int(self.samples[i].learned[self.seq_len + 1 :].sum()) for i in cut.tolist())
        return int(self.samples.labels[self.index].sum()) - lost

    @functools.cached_property
    def num_blocks(self) -> int:
        """Blocks of an epoch: as many samples each, give or take one, and a few million tokens on average."""
        tokens = max(BLOCK_TOKENS, BLOCK_WINDOWS * self.seq_len)
        return min(max(1, round(self.num_tokens / tokens)), len(self.index))

    def block(self, epoch: int, block: int) -> PackedSamples:
        """The windows of a block of an epoch, both from 0."""
        size, num_blocks = len(self.index), self.num_blocks
        places = np.arange(block * size // num_blocks, (block + 1) * size // num_blocks)
        order = permuted(places, size, (_ORDER, self.seed, epoch))
        return PackedSamples(self.samples, self.index[order], self.seq_len, self.pad)
