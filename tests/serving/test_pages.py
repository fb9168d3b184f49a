"""Pages and their keys, against a model of a few lines; the scheduler's tests drive the rest."""

import hashlib
import random
import struct

import pytest

from deepseek_jax.serving.pages import AllBlocksCleared, BlockRemoved, BlockStored, PagePool, page_keys


def test_a_key_is_the_sha_256_of_the_key_before_and_the_tokens():
    tokens = list(range(11))
    root = hashlib.sha256(b"('s', 7, 4, 0)").digest()
    first = hashlib.sha256(root + struct.pack("<4q", 0, 1, 2, 3)).digest()
    second = hashlib.sha256(first + struct.pack("<4q", 4, 5, 6, 7)).digest()
    assert page_keys(tokens, "s", 7, page=4) == [first, second]


def test_keys_go_on_from_a_parent():
    tokens = list(range(300))
    whole = page_keys(tokens, "salt", 3)
    assert len(whole) == 4
    for pages in range(1, 5):
        assert whole[:pages] + page_keys(tokens[pages * 64 :], "salt", 3, whole[pages - 1]) == whole


def test_whatever_a_page_depends_on_changes_its_key():
    """Salt (else hit times tell what others asked), version, tokens before it, the token behind it under drafts."""
    tokens = [5] * 12
    keys = {page_keys(tokens, page=4)[1]}
    for others in (
        page_keys(tokens, "salt", page=4),
        page_keys(tokens, version=1, page=4),
        page_keys([6, *tokens[1:]], page=4),
        page_keys(tokens, page=4, ahead=1),
        page_keys(tokens[:8] + [6] * 4, page=4, ahead=1),
    ):
        assert others[1] not in keys
        keys.add(others[1])
    assert page_keys(tokens[:8], page=4, ahead=1) == page_keys(tokens, page=4, ahead=1)[:1]
    assert page_keys([1, 2], "1", page=2) != page_keys([1, 2], version=1, page=2)
    assert page_keys([1, 2, 3], page=4) == page_keys([1, 2, 3, 4], page=4, ahead=1) == []


def cached(pool: PagePool, *names: bytes) -> list[int]:
    """Pages of one sequence, given back."""
    pages = pool.allocate(len(names))
    for page, name in zip(pages, names, strict=True):
        pool.register(page, name)
    pool.release(pages)
    return pages


def test_the_end_of_a_sequence_is_evicted_before_its_start_and_the_older_sequence_first():
    pool = PagePool(5)
    cached(pool, b"a0", b"a1", b"a2")
    cached(pool, b"b0", b"b1")
    gone = []
    for _ in range(5):
        pool.allocate(1)
        gone += [k for k in (b"a0", b"a1", b"a2", b"b0", b"b1") if k not in pool and k not in gone]
    assert gone == [b"a2", b"a1", b"a0", b"b1", b"b0"]


def test_pages_without_a_key_are_taken_before_cached_ones():
    pool = PagePool(4)
    pages = pool.allocate(4)
    pool.register(pages[0], b"k")
    pool.release(pages)
    assert (pool.free, pool.cached) == (3, 1)
    assert pages[0] not in pool.allocate(3) and b"k" in pool
    assert pool.allocate(1) == [pages[0]] and b"k" not in pool


def test_a_page_found_again_is_young_again():
    pool = PagePool(2)
    (a,), (b,) = cached(pool, b"a"), cached(pool, b"b")
    pool.share([a])
    pool.release([a])
    assert pool.allocate(1) == [b]


def test_allocate_takes_all_or_nothing():
    pool = PagePool(3)
    cached(pool, b"a", b"b")
    assert pool.allocate(4) is None
    assert (pool.free, pool.cached, pool.held) == (1, 2, 0) and b"a" in pool and b"b" in pool


def test_what_is_found_does_not_count_twice_as_room():
    """A cached page that is shared is no page to allocate."""
    pool = PagePool(3)
    pages = cached(pool, b"a", b"b")
    assert pool.fits(3) and pool.fits(1, beside=pages) and not pool.fits(2, beside=pages)
    pool.share(pages)
    assert pool.fits(1, beside=pages)


def test_a_page_is_free_when_its_last_holder_gives_it_back():
    pool = PagePool(1)
    (page,) = pool.allocate(1)
    pool.share([page])
    pool.release([page])
    assert pool.held == 1 and pool.allocate(1) is None
    pool.release([page])
    assert pool.held == 0 and pool.allocate(1) == [page]


def test_giving_back_twice_is_an_error():
    pool = PagePool(1)
    pages = pool.allocate(1)
    pool.release(pages)
    with pytest.raises(AssertionError, match="page 0 is given back, and nobody holds it"):
        pool.release(pages)


def test_of_two_pages_with_one_key_the_first_keeps_it():
    pool = PagePool(2)
    a, b = pool.allocate(2)
    pool.register(a, b"k")
    pool.register(b, b"k")
    pool.release([a, b])
    assert pool.lookup([b"k"]) == [a] and (pool.free, pool.cached) == (1, 1)


def test_a_dropped_cache_finds_nothing_and_loses_no_page():
    pool = PagePool(4)
    (held,) = pool.allocate(1)
    pool.register(held, b"held")
    cached(pool, b"a")
    pool.drop_cache()
    assert pool.lookup([b"held"]) == pool.lookup([b"a"]) == []
    assert (pool.free, pool.cached, pool.held) == (3, 0, 1)
    pool.release([held])
    assert (pool.free, pool.cached, pool.held) == (4, 0, 0)


@pytest.mark.parametrize("size", [(0, 64), (3, 0)])
def test_an_empty_pool_is_refused(size):
    with pytest.raises(ValueError, match="both must be positive"):
        PagePool(*size)


def test_events_tell_a_router_what_can_be_found():
    """Replaying them gives the pool's own index, after each of 3,000 random operations."""
    known: dict[bytes, BlockStored] = {}

    def listen(event):
        if isinstance(event, BlockStored):
            assert event.key not in known
            known[event.key] = event
        elif isinstance(event, BlockRemoved):
            del known[event.key]
        else:
            assert isinstance(event, AllBlocksCleared)
            known.clear()

    rng, pool, sequences, names = random.Random(0), PagePool(16, listener=listen), [], set()
    for i in range(3000):
        x = rng.random()
        if x < 0.4 and (pages := pool.allocate(rng.randrange(1, 5))):
            for j, page in enumerate(pages[: rng.randrange(5)]):
                key = f"{i % 50} {j}".encode()
                names.add(key)
                pool.register(page, key, b"parent", (i, j))
            sequences.append(pages)
        elif x < 0.99 and sequences:
            pool.release(sequences.pop(rng.randrange(len(sequences))))
        elif x > 0.998:
            pool.drop_cache()
        assert set(known) == {name for name in names if name in pool}
        assert pool.free + pool.cached + pool.held == 16
    assert known
    assert all(event.parent == b"parent" and len(event.tokens) == 2 for event in known.values())
