"""The stream of training batches: random access, so that its state is a handful of numbers.

Each source hands out its epochs block by block (packing.py), the windows of a block shuffled. A stream is therefore no
more than (epoch, block, position) per source, and:
- the batch may change size from step to step (the report's batch-size ramp, §4.2), across epoch borders too;
- a restored stream goes on with exactly the sequences an uninterrupted one would have handed out;
- each host reads only its own rows of the global batch, whatever the number of hosts. (It does make the FIM forms of
  every block that it passes, a tenth of the documents, because their lengths decide where the windows begin.)

Several sources take turns by their weights: the next sequence is of the source that is furthest behind its share, so
that after any number of sequences each has given its share to within a sequence or so.
"""

import concurrent.futures
import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from deepseek_jax.checks import names_that_differ, require
from deepseek_jax.data.packing import Windows
from deepseek_jax.data.shuffle import permuted

Batch = dict[str, np.ndarray]

_SHUFFLE = 105  # keeps the shuffle of windows apart from the random streams inside a block
_BLOCKS_KEPT = 2  # per source: the present one, and its neighbour while a batch reaches over the border


@dataclasses.dataclass(frozen=True)
class _Place:
    """The next sequence of a source: `position` in the shuffled `block`; `sequences` were handed out before it."""

    epoch: int = 0
    block: int = 0
    position: int = 0
    sequences: int = 0


_Cursor = tuple[_Place, ...]  # one place per source


def furthest_behind(shares: Sequence[float], given: Sequence[int]) -> int:
    """The source furthest behind its share of what all have given, the next one counted; of equals, the first."""
    total = sum(given) + 1
    behind = [share * total - number for share, number in zip(shares, given, strict=True)]
    return behind.index(max(behind))


class Packer(Protocol):
    """The windows of a source, block by block. An epoch may be another than the one before; all have a window."""

    @property
    def seed(self) -> int: ...

    @property
    def num_blocks(self) -> int: ...

    def block(self, epoch: int, block: int) -> Windows: ...


class BatchStream:
    """An endless, shuffled, resumable stream of packed sequences.

    The next batch is read in the background while the caller computes. `state()` always refers to what `take`
    has handed out, never to what was read ahead.

    Args:
        packers: of each source, builds the blocks.
        weights: of each source, its share of the sequences; they need not add up to 1.
        fingerprint: JSON-serialisable facts about the data; a state with other facts is refused.
        process_index, process_count: this host among all hosts.

    Raises:
        ValueError: `process_index` outside [0, process_count), or weights that are none.
    """

    def __init__(
        self,
        packers: Sequence[Packer],
        weights: Sequence[float],
        fingerprint: dict[str, Any],
        process_index: int = 0,
        process_count: int = 1,
    ):
        if not 0 <= process_index < process_count:
            raise ValueError(f"process_index {process_index} is outside [0, process_count {process_count})")
        if len(weights) != len(packers) or not all(0 < w < np.inf for w in weights):
            raise ValueError(f"{len(packers)} sources need as many positive weights, got {list(weights)}")
        self._packers, self._fingerprint = tuple(packers), dict(fingerprint)
        self._shares = [w / sum(weights) for w in weights]
        self._process_index, self._process_count = process_index, process_count
        self._cursor: _Cursor = tuple(_Place() for _ in packers)
        # One worker: blocks are touched by no other thread.
        self._worker = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="batch-stream")
        self._ahead: tuple[_Cursor, int, concurrent.futures.Future] | None = None
        self._open: list[dict[tuple[int, int], tuple[Windows, np.ndarray]]] = [{} for _ in packers]

    def take(self, num_sequences: int) -> Batch:
        """The next global batch of `num_sequences`, this host's rows of it.

        Returns:
            "tokens" int32 [num_sequences / process_count, seq_len + 1]; with `segments` also "segments" and
            "positions" of that shape. The hosts' rows, in order of process index, are the rows that a single host
            would get.

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
        """Returns JSON-serialisable state, the same on every host: each source's next sequence, and the fingerprint."""
        return {
            "sequences": sum(place.sequences for place in self._cursor),
            "sources": [dataclasses.asdict(place) for place in self._cursor],
            "data": dict(self._fingerprint),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continues at the place of `state`; the number of hosts may differ.

        Raises:
            ValueError: the state is malformed, or belongs to other data, tokens or packing.
        """
        names = [field.name for field in dataclasses.fields(_Place)]
        try:
            cursor = tuple(_Place(*(int(source[name]) for name in names)) for source in state["sources"])
            data = dict(state["data"])
            require(min(min(dataclasses.astuple(place)) for place in cursor) >= 0, "negative position")
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"not a state of the data stream: {state!r}") from error
        if data != self._fingerprint:
            other = "; ".join(
                f"{name} was {data.get(name)!r}, is now {self._fingerprint.get(name)!r}"
                for name in names_that_differ(data, self._fingerprint)
            )
            raise ValueError(
                f"the saved data state belongs to other data: {other}. A run goes on with its own data: to train its "
                "weights on others, start a run in another train.out_dir with train.init_from"
            )
        if len(cursor) != len(self._packers):
            raise ValueError(
                f"not a state of the data stream: {len(cursor)} places for {len(self._packers)} sources"
            )
        self._cursor, self._ahead = cursor, None

    def close(self) -> None:
        """Stops the background thread; a process may exit without it."""
        self._worker.shutdown(cancel_futures=True)

    def _read_ahead(self, cursor: _Cursor, n: int) -> tuple[_Cursor, int, concurrent.futures.Future]:
        return cursor, n, self._worker.submit(self._read, cursor, n)

    def _read(self, cursor: _Cursor, num_sequences: int) -> tuple[Batch, _Cursor]:
        """This host's rows of the batch at `cursor`, and the cursor after it; changes nothing."""
        local = num_sequences // self._process_count
        mine = range(self._process_index * local, (self._process_index + 1) * local)
        places, rows = list(cursor), []
        for row in range(num_sequences):
            source = self._next_source(places)
            place = self._next_place(source, places[source])
            if row in mine:
                stream, order = self._block(source, place)
                rows.append(stream[order[place.position]])
            places[source] = dataclasses.replace(
                place, position=place.position + 1, sequences=place.sequences + 1
            )
        batch = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
        return batch, tuple(places)

    def _next_source(self, places: Sequence[_Place]) -> int:
        return furthest_behind(self._shares, [place.sequences for place in places])

    def _next_place(self, source: int, place: _Place) -> _Place:
        """`place`, or the first of a later block or epoch if its block ends before it."""
        num_blocks = self._packers[source].num_blocks
        for _ in range(num_blocks + 1):
            stream, order = self._block(source, place)
            if place.position < len(order):
                return place
            epoch, block = divmod(place.block + 1, num_blocks)
            place = _Place(place.epoch + epoch, block, 0, place.sequences)
        stream.require_a_window()
        raise AssertionError("an epoch has a window")

    def _block(self, source: int, place: _Place) -> tuple[Windows, np.ndarray]:
        """The windows of the block of `place`, and the order, int64, in which they are handed out."""
        blocks, name = self._open[source], (place.epoch, place.block)
        if name not in blocks:
            packer = self._packers[source]
            stream = packer.block(*name)
            order = permuted(np.arange(len(stream)), len(stream), (_SHUFFLE, packer.seed, *name))
            blocks[name] = stream, order
            while len(blocks) > _BLOCKS_KEPT:
                blocks.pop(next(iter(blocks)))
        return blocks[name]
