"""The loss of TRL's own trainer beside ours, by log-probabilities; `trl_loss.py` compares the whole on a model."""

import jax
import numpy as np
import pytest

from deepseek_jax.posttraining.grpo_loss import grpo_loss
from tests.posttraining.trl_loss import CLIP, FORMS, drawn, their_loss_of_logps


@pytest.mark.filterwarnings("ignore")  # of what TRL imports
def test_losses_and_gradients_are_those_of_trl():
    with jax.enable_x64(True):

        @jax.jit
        def ours(batch, mask):
            def of(new, options):
                return grpo_loss(new, batch.old, batch.ref, batch.advantages, mask, **CLIP, **options)[0]

            return {
                name: jax.value_and_grad(lambda x, form=form: of(x, form.ours))(batch.new)
                for name, form in FORMS.items()
            }

        for seed in range(10):
            batch = drawn(seed)
            found, losses = jax.device_get(ours(batch, batch.mask)), []
            for name, (value, gradient) in found.items():
                theirs, of = their_loss_of_logps(FORMS[name], batch)
                np.testing.assert_allclose(value, theirs, rtol=1e-12, atol=1e-14, err_msg=name)
                np.testing.assert_allclose(gradient, of, rtol=1e-10, atol=1e-14, err_msg=name)
                losses.append(value)
            # No two forms are the same but by chance: where nothing is dropped, V3.2's is the corrected one.
            assert len(np.unique(np.round(losses, 9))) >= len(FORMS) - 1
