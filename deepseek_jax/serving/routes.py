"""The experts of prompts' tokens beside the pages that hold their latents, for who finds these in the cache.

Pages know latents, not routes. A request that asks for routes shares pages with such requests alone (`Request.page_salt`), and
only those that chunks filled: so each page that it finds has been written by chunks whose routes came to the host. They are
kept by page, 59 KB of one of DeepSeek-V3 beside 4.5 MB of latents, and taken over in the order in which the device writes them.

Dims: t token, n page of a sequence, l MoE layer, k selected expert.
"""

from typing import Any

import numpy as np

from deepseek_jax.model.cache import PAGE


class PageRoutes:
    """Of one rank's pages."""

    def __init__(self) -> None:
        self._of: dict[int, np.ndarray] = {}

    def put(self, table_n: Any, start: int, routes_tlk: np.ndarray) -> None:
        """Tokens at start, start + 1, ... of a sequence in these pages were computed by a chunk."""
        end, shape = start + len(routes_tlk), (PAGE, *routes_tlk.shape[1:])
        for n in range(start // PAGE, -(-end // PAGE)):
            here = self._of.setdefault(int(table_n[n]), np.full(shape, -1, np.int16))
            first, last = max(start, n * PAGE), min(end, (n + 1) * PAGE)
            here[first - n * PAGE : last - n * PAGE] = routes_tlk[first - start : last - start]

    def first(self, table_n: Any, tokens: int, like_lk: np.ndarray) -> np.ndarray:
        """Of the first so many tokens of a sequence, a copy [t, l, k]; like_lk: of one token."""
        found = [self._of[int(page)] for page in table_n[: -(-tokens // PAGE)]]
        return np.concatenate([np.zeros((0, *like_lk.shape), np.int16), *found])[:tokens]
