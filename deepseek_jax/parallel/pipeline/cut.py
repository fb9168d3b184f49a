"""What one part of a program hands over to a later part: the values of the fewest bytes.

The later part may make values again by light steps from others. Which values to hand over is then a minimum cut, between
what the earlier part has to make and what the later part reads, of the graph whose nodes are values, as capable as they
have bytes, and whose arcs are light steps.
"""

from collections.abc import Hashable, Iterable, Mapping
from typing import Any

import numpy as np
from scipy.sparse import csgraph, csr_array

ENDLESS = np.iinfo(np.int32).max
_SOURCE, _SINK = 0, 1


def fewest_bytes(
    sizes: Mapping[Any, int],
    light: Iterable[tuple[Iterable[Hashable], Iterable[Hashable]]],
    made: Iterable[Hashable],
    wanted: Iterable[Hashable],
) -> list[Any]:
    """The values, of those in `sizes` (bytes, in the order of the result), from which light steps make all of `wanted`.

    light: (what it reads, what it makes) of each step that may be done again. made: values that are not made again.
    Values that are not in `sizes` are not handed over. Of two cuts of as many bytes, the earlier.
    """
    number = {v: 2 + 2 * i for i, v in enumerate(sizes)}
    other: dict[Hashable, int] = {}  # values that are not in sizes

    def node(v: Hashable, out: bool) -> int:
        if v in number:
            return number[v] + out
        return other.setdefault(v, 2 + 2 * len(number) + len(other))

    unit = 1 + sum(sizes.values()) // 2**30  # capacities are int32, and so are their sums
    arcs = {(number[v], number[v] + 1): size // unit + 1 for v, size in sizes.items()}
    arcs |= {(_SOURCE, node(v, out=False)): ENDLESS for v in made}
    arcs |= {(node(v, out=True), _SINK): ENDLESS for v in wanted}
    for reads, makes in light:
        arcs |= {(node(u, out=True), node(v, out=False)): ENDLESS for u in reads for v in makes}
    reached = _before_the_cut(arcs, 2 + 2 * len(number) + len(other))
    return [v for v in sizes if number[v] in reached and number[v] + 1 not in reached]


def _before_the_cut(arcs: dict[tuple[int, int], int], nodes: int) -> set[int]:
    """What still can be reached from the source beside a maximum flow."""
    rows, columns = np.array(list(arcs), np.int32).reshape(-1, 2).T
    capacity = csr_array((np.array(list(arcs.values()), np.int32), (rows, columns)), shape=(nodes, nodes))
    left = capacity - csgraph.maximum_flow(capacity, _SOURCE, _SINK).flow
    left.eliminate_zeros()
    return set(csgraph.breadth_first_order(left, _SOURCE, return_predecessors=False).tolist())
