"""RoPE on interleaved pairs, and YaRN at DeepSeek-V3's own numbers."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from deepseek_jax.config import ModelConfig, YarnConfig
from deepseek_jax.model.rope import apply_rope, inverse_frequencies, rope_table, softmax_scale
from tests.oracle import model as oracle
from tests.oracle.tiny import V2

RELEASED = ModelConfig(rope_scaling=YarnConfig(), max_position_embeddings=163840)


def test_frequencies_of_the_released_model():
    got = inverse_frequencies(RELEASED)
    want = {
        0: 1.0,
        9: 0.0749894209,
        10: 0.0562341325,
        11: 0.0390069266,
        16: 0.0055,
        22: 1.77827941e-4,
        23: 3.33380358e-5,
        31: 3.33380358e-6,
    }
    for pair, value in want.items():
        np.testing.assert_allclose(got[pair], value, rtol=5e-9, err_msg=str(pair))


def test_a_ramp_that_falls():
    """Where even the fastest pair turns too rarely, the ramp's end (the last pair, 3) lies before its beginning (8):
    the reference divides by the negative width, so that every pair is interpolated. An empty ramp has width 0.001."""
    falls = ModelConfig(qk_rope_head_dim=4, rope_theta=2.0, rope_scaling=YarnConfig())
    plain = 2.0 ** -np.array([0.0, 0.5])
    np.testing.assert_allclose(inverse_frequencies(falls), plain / 40)
    # Both ends lie at pair -0.5: the ramp goes from floor(-0.5), but at least 0, to ceil(-0.5) = 0.
    ends = 7 / (2 * np.pi * 2**-0.25)
    yarn = YarnConfig(original_max_position_embeddings=7, beta_fast=ends, beta_slow=ends)
    got = inverse_frequencies(dataclasses.replace(falls, rope_scaling=yarn))
    np.testing.assert_allclose(got, [plain[0], plain[1] / 40])


def test_mscale_enters_the_softmax_scale_squared_and_not_the_rotation():
    np.testing.assert_allclose(softmax_scale(RELEASED), 0.1352337789, rtol=1e-9)
    np.testing.assert_allclose(softmax_scale(ModelConfig()), 0.0721687836, rtol=1e-8)
    cos, sin = rope_table(RELEASED, jnp.array([[0, 5000]]))
    np.testing.assert_allclose(cos**2 + sin**2, 1.0, atol=1e-6)


def test_rotation_against_complex_numbers():
    config = dataclasses.asdict(V2)
    x = np.random.default_rng(0).standard_normal((1, 3, V2.qk_rope_head_dim)).astype(np.float32)
    positions = np.array([[0, 7, 40]])
    got = apply_rope(x, *rope_table(V2, jnp.asarray(positions)))
    for t in range(3):
        np.testing.assert_allclose(got[0, t], oracle.rotate(x[0, t], positions[0, t], config), atol=1e-5)


def test_scores_depend_on_distance_alone():
    q, k = np.random.default_rng(0).standard_normal((2, 1, 1, 8)).astype(np.float32)

    def score(i, j):
        tables = [rope_table(V2, jnp.array([[at]])) for at in (i, j)]
        return (apply_rope(q, *tables[0]) * apply_rope(k, *tables[1])).sum()

    np.testing.assert_allclose(score(3, 1), score(33, 31), rtol=1e-4)
    assert abs(score(3, 1) - score(3, 2)) > 0.05
