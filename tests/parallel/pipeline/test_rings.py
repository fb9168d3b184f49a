"""What waits between two ops comes back as it was, whatever lies beside it."""

import chex
import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.parallel.pipeline.rings import Form, put, ring, take, widths


def test_contents_of_different_stages_share_a_ring():
    """The same array is kept once; a place is as large as the largest content of each dtype; one more is for nobody."""
    rng = np.random.default_rng(0)
    x, y = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((2, 3), (5,)))
    first = {"x": x, "again": x, "n": jnp.arange(4)}
    second = (y, y.astype(jnp.bfloat16))
    forms = Form(first), Form(second)
    wide = widths(forms)
    assert wide == {"float32": 6, "int32": 4, "bfloat16": 5}
    full = ring(3, wide)
    assert {name: a.shape for name, a in full.items()} == {name: (4, n) for name, n in wide.items()}
    for place, form, tree in ((2, forms[0], first), (0, forms[1], second), (-1, forms[1], second)):
        full = put(full, jnp.int32(place), form.laid_out(tree, wide))
    chex.assert_trees_all_equal(forms[0].read(take(full, jnp.int32(2))), first)
    chex.assert_trees_all_equal(forms[1].read(take(full, jnp.int32(0))), second)
    assert not any(np.asarray(a[1]).any() for a in full.values())


def test_no_offset_leaves_int32():
    """XLA wraps larger ones around in silence: what comes behind them lies in an array of its own."""
    tree = [jax.ShapeDtypeStruct((1_500_000_000,), jnp.uint8) for _ in range(3)]
    tree.insert(1, jax.ShapeDtypeStruct((600_000_000,), jnp.uint8))
    form = Form(tree)
    assert form.elements == {"uint8": 2_100_000_000, "uint8.1": 1_500_000_000, "uint8.2": 1_500_000_000}
    back = jax.eval_shape(lambda t: form.read(form.laid_out(t, form.elements)), tree)
    chex.assert_trees_all_equal_shapes_and_dtypes(back, tree)
