"""The cache on disk, which all prefill devices read: latents of prompts and answers, page by page, under the engine's own keys."""

from collections.abc import Sequence

from deepseek_jax.serving.pages import PagePool
from experiments.planning.cluster.demand import PAGE


class Disk:
    """What has not been asked for longest goes first. pages: that it holds."""

    def __init__(self, pages: int):
        self.pool = PagePool(max(1, pages), PAGE)

    def put(self, keys: Sequence[bytes]) -> None:
        """The pages of a prefix are there, in order."""
        store(self.pool, keys)

    def found(self, keys: Sequence[bytes]) -> int:
        """How many of the first ones it has."""
        pages = self.pool.lookup(keys)
        self.pool.share(pages)
        self.pool.release(pages)
        return len(pages)


def store(pool: PagePool, keys: Sequence[bytes]) -> None:
    """Puts pages that nobody holds into a pool, where there is room."""
    held = pool.lookup(keys)
    pool.share(held)
    new = pool.allocate(len(keys) - len(held)) or []
    for page, key in zip(new, keys[len(held) :], strict=False):
        pool.register(page, key)
    pool.release(held + new)
