"""Which pages of the latent cache hold what: free ones, cached ones that a prompt may find again, and held ones.

The pool hands out numbers of pages; the latents themselves lie on the device. A page that is full and whose tokens are known
gets a key, the SHA-256 of the key before it and of its own tokens: equal keys mean equal prefixes. A page with a key stays
cached when nobody holds it any more, until its room is needed.

`free`, `cached` and `held` are counts; a sequence gives its pages back by `release`.
"""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from deepseek_jax.checks import require


class BlockStored(NamedTuple):
    """A page can be found from now on. parent: key of the page before it, None for the first of a sequence."""

    key: bytes
    parent: bytes | None
    tokens: Sequence[int]


class BlockRemoved(NamedTuple):
    """A page cannot be found any more: its room went to another."""

    key: bytes


class AllBlocksCleared(NamedTuple):
    """No page can be found any more."""


Event = BlockStored | BlockRemoved | AllBlocksCleared


def page_keys(
    tokens: Sequence[int],
    salt: str = "",
    version: int = 0,
    parent: bytes | None = None,
    page: int = 64,
    ahead: int = 0,
) -> list[bytes]:
    """The keys of the full pages of `tokens`, 32 bytes each.

    parent: key of the page before them; None: they begin a sequence. A caller that has the keys of the first pages gives the
    tokens behind those and the last key, so that no page is hashed twice. salt: prompts of other salts have other keys;
    version: of the weights. ahead: so many tokens behind a page are hashed with it, because its latents depend on them.
    """
    count = (len(tokens) - ahead) // page
    if count <= 0:
        return []
    if parent is None:
        parent = hashlib.sha256(repr((salt, version, page, ahead)).encode()).digest()
    data = memoryview(array("q", tokens[: count * page + ahead])).cast("B")
    keys = []
    for start in range(0, count * page, page):
        digest = hashlib.sha256(parent)
        digest.update(data[8 * start : 8 * (start + page + ahead)])
        parent = digest.digest()
        keys.append(parent)
    return keys


class PagePool:
    """`pages` pages of `page` tokens. Each is free, cached (it has a key, nobody holds it) or held by one or more sequences.

    free, cached, held: how many; together all. listener: called with each `Event` if given.
    """

    def __init__(self, pages: int, page: int = 64, listener: Callable[[Event], Any] | None = None):
        require(pages >= 1 and page >= 1, f"pages={pages} of page={page} tokens: both must be positive")
        self.pages, self.page, self.listener = pages, page, listener
        self.held = 0
        self._free = list(range(pages - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()  # the next to be evicted first
        self._holders = [0] * pages
        self._key: list[bytes | None] = [None] * pages
        self._page_of: dict[bytes, int] = {}

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def cached(self) -> int:
        return len(self._cached)

    def fits(self, n: int, beside: Sequence[int] = ()) -> bool:
        """Whether n pages could be allocated if `beside`, pages that were looked up, were shared before."""
        taken = sum(not self._holders[page] for page in beside)
        return n <= len(self._free) + len(self._cached) - taken

    def held_once(self, pages: Iterable[int]) -> int:
        """How many of these one sequence holds alone."""
        return sum(self._holders[page] == 1 for page in pages)

    def allocate(self, n: int) -> list[int] | None:
        """n pages, held once each: free ones first, then cached ones, the one that was given back longest ago first. None,
        and nothing is changed, if there are not so many."""
        if not self.fits(n):
            return None
        pages = [self._free.pop() if self._free else self._evict() for _ in range(n)]
        for page in pages:
            self._holders[page] = 1
        self.held += n
        return pages

    def _evict(self) -> int:
        page, _ = self._cached.popitem(last=False)
        key = self._key[page]
        assert key is not None
        self._key[page] = None
        del self._page_of[key]
        if self.listener:
            self.listener(BlockRemoved(key))
        return page

    def share(self, pages: Sequence[int]) -> None:
        """One more sequence holds these pages, which are cached or held."""
        for page in pages:
            if not self._holders[page]:
                del self._cached[page]
                self.held += 1
            self._holders[page] += 1

    def release(self, pages: Sequence[int]) -> None:
        """A sequence gives back its pages, in the sequence's order. Those that nobody holds now are cached, of one sequence
        the last to be evicted first: a prefix is worth nothing without what comes before it."""
        for page in reversed(pages):
            assert self._holders[page] > 0, f"page {page} is given back, and nobody holds it"
            self._holders[page] -= 1
            if self._holders[page]:
                continue
            self.held -= 1
            if self._key[page] is None:
                self._free.append(page)
            else:
                self._cached[page] = None

    def lookup(self, keys: Sequence[bytes]) -> list[int]:
        """The pages of the longest run of known keys, from the first on. It holds none of them."""
        pages = []
        for key in keys:
            page = self._page_of.get(key)
            if page is None:
                break
            pages.append(page)
        return pages

    def __contains__(self, key: bytes) -> bool:
        return key in self._page_of

    def register(
        self, page: int, key: bytes, parent: bytes | None = None, tokens: Sequence[int] = ()
    ) -> None:
        """The key of a held page that is full. Of two pages with one key, the first keeps it. parent, tokens: for the event."""
        assert self._holders[page] > 0, f"page {page} gets a key, and nobody holds it"
        if key in self._page_of or self._key[page] is not None:
            return
        self._key[page] = key
        self._page_of[key] = page
        if self.listener:
            self.listener(BlockStored(key, parent, tokens))

    def drop_cache(self) -> None:
        """No page can be found any more. Held ones stay held."""
        self._free.extend(self._cached)
        self._cached.clear()
        self._page_of.clear()
        self._key = [None] * self.pages
        if self.listener:
            self.listener(AllBlocksCleared())
