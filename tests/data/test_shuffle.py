import numpy as np
import pytest

from deepseek_jax.data.shuffle import permuted


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 17, 1000, 4097])
def test_it_is_a_permutation_whoever_asks_for_which_part(size):
    whole = permuted(np.arange(size), size, (1, 2))
    assert whole.dtype == np.int64
    np.testing.assert_array_equal(np.sort(whole), np.arange(size))
    np.testing.assert_array_equal(permuted(np.arange(size)[size // 3 :], size, (1, 2)), whole[size // 3 :])


def test_every_order_of_a_few_is_as_likely():
    counts = {}
    for key in range(6000):
        order = tuple(permuted(np.arange(3), 3, (key,)).tolist())
        counts[order] = counts.get(order, 0) + 1
    assert len(counts) == 6
    assert max(abs(count - 1000) for count in counts.values()) < 5 * np.sqrt(1000)


def test_places_and_elements_are_unrelated():
    size = 20_000
    places = np.arange(size)
    one, other = permuted(places, size, (3, 0)), permuted(places, size, (3, 1))
    for left, right in ((places, one), (one[:-1], one[1:]), (one, other)):
        assert abs(np.corrcoef(left, right)[0, 1]) < 5 / np.sqrt(size)
    # Neighbours do not stay neighbours: as many steps of one as chance has it.
    assert (np.abs(np.diff(one)) == 1).sum() < 12


def test_more_than_32_bits():
    size = (1 << 40) + 12_345
    places = np.concatenate([np.arange(10_000), size - 1 - np.arange(10_000)])
    elements = permuted(places, size, (0,))
    assert len(np.unique(elements)) == len(places)
    assert elements.min() >= 0 and elements.max() < size
    share = elements / size
    assert abs(share.mean() - 0.5) < 5 * np.sqrt(1 / 12 / len(places))
    assert (elements >= 1 << 39).any() and abs((elements % 2).mean() - 0.5) < 5 * 0.5 / np.sqrt(len(places))
