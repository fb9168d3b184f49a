"""Which pages of a prompt are there already, because another one began alike, and which are being computed."""

from deepseek_jax.serving.pages import PagePool, page_keys
from deepseek_jax.serving.steps import Limits, Running


class Prefixes:
    """What a scheduler knows of beginnings. version: of the weights, under which all pages that can be found were computed;
    generation: how many weights there were before, whatever they are called."""

    def __init__(self, limits: Limits, pool: PagePool, version: int):
        self.limits, self.pool, self.version = limits, pool, version
        self.generation = 0
        self._coming: dict[bytes, Running] = {}  # pages that chunks of a sequence with a slot will fill

    def set_version(self, version: int) -> None:
        self.version = version
        self.generation += 1
        self.pool.drop_cache()
        self._coming.clear()

    def find(self, running: Running) -> list[int] | None:
        """Cached pages with which the tokens of a sequence begin, of which one at least is left to compute; None if another
        sequence computes the next page now, for which this one should wait. What is asked of all tokens of a prompt is found
        in no page: it is computed whole."""
        if running.awaits is not None and self._is_coming(running, running.awaits):
            return None
        self._hash(running)
        if running.request.prompt_logprobs is not None:
            return []
        keys = running.keys[: (running.end - 1) // self.pool.page]
        found = self.pool.lookup(keys)
        running.awaits = keys[len(found)] if len(found) < len(keys) else None
        if running.awaits is not None and self._is_coming(running, running.awaits):
            return None
        return found

    def _is_coming(self, running: Running, key: bytes) -> bool:
        """Whether a sequence computes this page that is not held up by those of a higher priority than `running`."""
        other = self._coming.get(key)
        return other is not None and other.request.priority <= running.request.priority

    def begin(self, running: Running) -> None:
        """A sequence got a slot: its chunks will fill the pages that nobody has."""
        for key in running.keys[running.registered :]:
            if key not in self.pool:
                self._coming[key] = running

    def leave(self, running: Running) -> None:
        """It lost its slot: nobody waits for it any more."""
        for key in running.keys[running.registered :]:
            if self._coming.get(key) is running:
                del self._coming[key]

    def register(self, running: Running) -> None:
        """Makes its pages that are full, of tokens that are known and computed, such as can be found.

        A draft head's latent depends on the token behind as well. So with drafts a page's key has that token, and the page is
        full when it is computed: whoever finds the page finds that latent, too. In `whole_pages`, pages that decode rows have
        written to are left out, be it that one latent: a chunk would have computed other bits. So are they where experts of a
        prompt's tokens are asked for, which are kept beside the pages of chunks alone (`routes.py`).
        """
        page = self.pool.page
        full = (min(running.computed, len(running.tokens)) - self.limits.drafts) // page
        if self.limits.whole_pages or running.request.routes:
            full = min(full, (running.goal - self.limits.drafts) // page)
        if full <= running.registered or running.generation != self.generation:
            return
        self._hash(running)
        for i in range(running.registered, full):
            key = running.keys[i]
            self._coming.pop(key, None)
            parent = running.keys[i - 1] if i else None
            self.pool.register(running.pages[i], key, parent, running.tokens[i * page : (i + 1) * page])
        running.registered = full

    def _hash(self, running: Running) -> None:
        """The keys of the full pages, under the present weights; those that it has stay."""
        if running.generation != self.generation:
            running.generation, running.keys = self.generation, []
        page, ahead = self.pool.page, self.limits.drafts
        done = len(running.keys) * page
        if len(running.tokens) - done >= page + ahead:
            parent = running.keys[-1] if running.keys else None
            tokens = running.tokens[done:]
            running.keys += page_keys(tokens, running.request.page_salt, self.version, parent, page, ahead)
