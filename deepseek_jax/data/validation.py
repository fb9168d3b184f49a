"""Fixed windows of the held-out documents."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from deepseek_jax.data.packing import Windows
from deepseek_jax.data.tokenizer import Tokenizer

# Validation windows are held in memory; of a larger split, windows spread evenly over it.
MAX_VALIDATION_TOKENS = 1 << 23


@dataclasses.dataclass(frozen=True)
class Validation:
    """Fixed windows of the validation documents: plain text in order, no FIM, nothing random.

    All windows of a split up to `MAX_VALIDATION_TOKENS`, else that many tokens, spread evenly over it.

    Attributes:
        batch: "tokens" int32 [n, seq_len + 1]; with segments also "segments" and "positions", of conversations
            "loss_mask" and "padding" as well.
        bytes_n: int64 [n], UTF-8 bytes of the seq_len tokens that the main model predicts in each window,
            `tokens[:, 1:]`, where they count; special tokens count none.
    """

    batch: dict[str, np.ndarray]
    bytes_n: np.ndarray

    def __len__(self) -> int:
        return len(self.bytes_n)

    @property
    def tokens(self) -> np.ndarray:
        return self.batch["tokens"]

    @property
    def targets(self) -> np.ndarray:
        """int32 [n, seq_len]: what the main model predicts."""
        return self.tokens[:, 1:]

    @property
    def counted(self) -> np.ndarray:
        """bool [n, seq_len]: which targets count. With segments, the first token of a document does not; with a loss mask,
        those in it do."""
        return _counted(self.batch)

    @property
    def num_bytes(self) -> int:
        return int(self.bytes_n.sum())

    def subset(self, max_windows: int) -> "Validation":
        """At most `max_windows` windows, spread evenly over all: the same ones every time."""
        if max_windows >= len(self):
            return self
        if max_windows < 1:
            raise ValueError(f"max_windows must be at least 1, got {max_windows}")
        chosen = np.arange(max_windows) * len(self) // max_windows
        batch = {name: array[chosen] for name, array in self.batch.items()}
        return Validation(batch, self.bytes_n[chosen])


def _counted(batch: dict[str, np.ndarray]) -> np.ndarray:
    counted = np.ones_like(batch["tokens"][:, 1:], bool)
    if "segments" in batch:
        counted &= batch["segments"][:, 1:] == batch["segments"][:, :-1]
    if "loss_mask" in batch:
        counted &= batch["loss_mask"][:, 1:]
    return counted


def validation_windows(streams: Sequence[Windows], tokenizer: Tokenizer, seq_len: int) -> Validation:
    """Windows of all `streams`, one after the other.

    Raises:
        ValueError: no stream has a window.
    """
    if not any(len(stream) for stream in streams):
        streams[0].require_a_window()
    starts = np.cumsum([0, *map(len, streams)], dtype=np.int64)
    total = int(starts[-1])
    num_windows = min(total, max(1, MAX_VALIDATION_TOKENS // seq_len))

    def window(i: int) -> dict[str, np.ndarray]:
        place = i * total // num_windows
        source = int(np.searchsorted(starts, place, side="right")) - 1
        return streams[source][place - int(starts[source])]

    windows = [window(i) for i in range(num_windows)]
    batch = {name: np.stack([x[name] for x in windows]) for name in windows[0]}
    lengths_v = tokenizer.byte_lengths()
    labels = zip(batch["tokens"][:, 1:], _counted(batch), strict=True)
    bytes_n = np.array([lengths_v[tokens[counted]].sum() for tokens, counted in labels], np.int64)
    return Validation(batch, bytes_n)
