"""The stream of training batches: random access through grain, so that its state is a handful of numbers.

An epoch is a grain MapDataset over the windows of a packed stream, shuffled with a seed of its own. Sequence
number p of epoch e can be read at any time in any process; a stream is therefore no more than (e, p) and:
- the batch may change size from step to step (the report's batch-size ramp, §4.2), across epoch borders too;
- a restored stream goes on with exactly the sequences an uninterrupted one would have handed out;
- each host reads only its own rows of the global batch, whatever the number of hosts.
"""

import concurrent.futures
import dataclasses
from typing import Any

import grain
import numpy as np

from deepseek_jax.data.packing import EpochPacker

Batch = dict[str, np.ndarray]

_SHUFFLE = 105  # keeps the shuffle of windows apart from the random streams inside an epoch


@dataclasses.dataclass(frozen=True)
class _Cursor:
    """The next sequence: `position` in the shuffled `epoch`; `sequences` were handed out before it."""

    epoch: int = 0
    position: int = 0
    sequences: int = 0


class BatchStream:
    """An endless, shuffled, resumable stream of packed sequences.

    The next batch is read in the background while the caller computes. `state()` always refers to what `take`
    has handed out, never to what was read ahead.

    Args:
        packer: builds the packed stream of each epoch.
        fingerprint: JSON-serialisable facts about the data; a state with other facts is refused.
        process_index, process_count: this host among all hosts.

    Raises:
        ValueError: `process_index` outside [0, process_count).
    """

    def __init__(
        self, packer: EpochPacker, fingerprint: dict[str, Any], process_index: int = 0, process_count: int = 1
    ):
        if not 0 <= process_index < process_count:
            raise ValueError(f"process_index {process_index} is outside [0, process_count {process_count})")
        self._packer, self._fingerprint = packer, dict(fingerprint)
        self._process_index, self._process_count = process_index, process_count
        self._cursor = _Cursor()
        # One worker: epochs and their datasets are touched by no other thread.
        self._worker = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="batch-stream")
        self._ahead: tuple[_Cursor, int, concurrent.futures.Future] | None = None
        self._epochs: dict[int, grain.MapDataset] = {}

    def take(self, num_sequences: int) -> Batch:
        """The next global batch of `num_sequences`, this host's rows of it.

        Returns:
            "tokens" int32 [num_sequences / process_count, seq_len + 1 + mtp_depth]; with `segments` also
            "segments" and "positions" of that shape. The hosts' rows, in order of process index, are the rows
            that a single host would get.

        Raises:
            ValueError: `num_sequences` is not a positive multiple of the process count.
        """
        if num_sequences <= 0 or num_sequences % self._process_count:
            raise ValueError(
                f"a batch of {num_sequences} sequences does not divide among {self._process_count} "
                f"processes: use a positive multiple of {self._process_count}"
            )
        ahead, self._ahead = self._ahead, None
        if ahead is None or ahead[:2] != (self._cursor, num_sequences):
            ahead = self._read_ahead(self._cursor, num_sequences)
        batch, following = ahead[2].result()
        self._cursor = following
        self._ahead = self._read_ahead(following, num_sequences)
        return batch

    def state(self) -> dict[str, Any]:
        """JSON-serialisable state: the next sequence, and what data it belongs to. The same on every host."""
        return {**dataclasses.asdict(self._cursor), "data": dict(self._fingerprint)}

    def restore(self, state: dict[str, Any]) -> None:
        """Continues where `state` was taken; the number of hosts may differ.

        Raises:
            ValueError: the state is malformed, or belongs to other data, tokens or packing.
        """
        try:
            cursor = _Cursor(*(int(state[field.name]) for field in dataclasses.fields(_Cursor)))
            data = dict(state["data"])
            if min(cursor.epoch, cursor.position, cursor.sequences) < 0:
                raise ValueError("negative position")
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"not a state of the data stream: {state!r}") from error
        if data != self._fingerprint:
            differing = [
                f"{name} was {data.get(name)!r}, is now {self._fingerprint.get(name)!r}"
                for name in sorted(data.keys() | self._fingerprint.keys())
                if data.get(name) != self._fingerprint.get(name)
            ]
            raise ValueError("the saved data state belongs to other data: " + "; ".join(differing))
        self._cursor, self._ahead = cursor, None

    def close(self) -> None:
        """Stops the background thread. Not needed at exit."""
        self._worker.shutdown(cancel_futures=True)

    def _read_ahead(self, cursor: _Cursor, n: int) -> tuple[_Cursor, int, concurrent.futures.Future]:
        return cursor, n, self._worker.submit(self._read, cursor, n)

    def _read(self, cursor: _Cursor, num_sequences: int) -> tuple[Batch, _Cursor]:
        """This host's rows of the batch at `cursor`, and the cursor after it; changes nothing."""
        local = num_sequences // self._process_count
        mine = range(self._process_index * local, (self._process_index + 1) * local)
        epoch, position, rows = cursor.epoch, cursor.position, []
        for row in range(num_sequences):
            if position >= len(self._epoch(epoch)):
                epoch, position = epoch + 1, 0
            if row in mine:
                rows.append(self._epoch(epoch)[position])
            position += 1
        batch = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
        return batch, _Cursor(epoch, position, cursor.sequences + num_sequences)

    def _epoch(self, epoch: int) -> grain.MapDataset:
        if epoch not in self._epochs:
            self._epochs = {e: dataset for e, dataset in self._epochs.items() if e == epoch - 1}
            seed = np.random.SeedSequence((_SHUFFLE, self._packer.seed, epoch)).generate_state(1)[0]
            self._epochs[epoch] = grain.MapDataset.source(self._packer.epoch(epoch)).seed(int(seed)).shuffle()
        return self._epochs[epoch]
