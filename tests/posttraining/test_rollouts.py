"""Samples have keys of their own, and the generator on the engine gives what it promises."""

import re

import pytest

from deepseek_jax.posttraining.rollouts import seed_of, seed_of_sample, seeds_of_prompts


def test_seeds_are_a_function_of_all_numbers_in_their_order():
    numbers = [(0, 1, 2), (0, 2, 1), (1, 0, 2), (0, 1, 3), (0, 1)]
    assert len({seed_of(*x) for x in numbers}) == len(numbers)
    assert seed_of(0, 1, 2) == seed_of(0, 1, 2) and 0 <= seed_of(0, 1, 2) < 2**32


def test_no_two_samples_of_a_prompt_share_a_key():
    assert len({seed_of_sample(2**32 - 1, i) for i in range(4096)}) == 4096


def test_a_prompt_has_the_same_seed_alone_and_in_a_share():
    """Whoever shares prompts among processes gives each its own seed."""
    whole = seeds_of_prompts(7, 4)
    assert seeds_of_prompts(whole[2:], 2) == whole[2:]
    assert whole == [seed_of(7, i) for i in range(4)]


def test_too_few_seeds_are_named():
    with pytest.raises(ValueError, match=re.escape("2 seeds for 3 prompts: give one, or one for each")):
        seeds_of_prompts([1, 2], 3)
