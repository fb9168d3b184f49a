"""Gradients of every parameter, and twenty steps of AdamW, against torch."""

import jax
import numpy as np
import optax
import torch

from deepseek_jax.config import OptimizerConfig
from deepseek_jax.training.optimizer import adamw

from .conftest import build, torch_tensors

STEPS, LR = 20, 1e-3
OPTIMIZER = OptimizerConfig(moment_dtype="float32")


def torch_loss(model, tokens):
    ids = torch.tensor(tokens, dtype=torch.long)
    logits = model(ids).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), ids[:, 1:].reshape(-1))


def test_gradient_of_every_parameter(variant):
    *_, grads = variant.apply(variant.params, variant.tokens)
    variant.torch_model.zero_grad()
    torch_loss(variant.torch_model, variant.tokens).backward()
    want = torch_tensors((name, x.grad) for name, x in variant.torch_model.named_parameters())
    got = variant.by_name(grads)
    assert got.keys() == want.keys()
    for name in want:
        assert np.linalg.norm(got[name] - want[name]) <= 2e-5 * np.linalg.norm(want[name]), name


def test_20_adamw_steps_track_torch(trained_variant):
    """Bound: gradients agree to a relative e = 2e-5 of their norm (above). Adam divides by each entry's own size,
    so an entry of less than e times the typical size moves at random; about e of all entries are, which makes
    sqrt(2 e) = 0.6% of a tensor's movement. The loss, being first order in it, moves by far less.
    """
    tokens, params = trained_variant.tokens, trained_variant.params
    optimizer = adamw(OPTIMIZER)
    update, moments, losses = jax.jit(optimizer.update), optimizer.init(params), []
    for _ in range(STEPS):
        value, _, grads = trained_variant.apply(params, tokens)
        updates, moments = update(grads, moments, params, LR)
        params = optax.apply_updates(params, updates)
        losses.append(float(value))

    theirs = build(trained_variant.name)
    named = dict(theirs.named_parameters())
    groups = [
        {"params": [x for n, x in named.items() if "norm" not in n], "weight_decay": OPTIMIZER.weight_decay},
        {"params": [x for n, x in named.items() if "norm" in n], "weight_decay": 0.0},
    ]
    torch_adamw = torch.optim.AdamW(groups, lr=LR, betas=(OPTIMIZER.b1, OPTIMIZER.b2), eps=OPTIMIZER.eps)
    torch_losses = []
    for _ in range(STEPS):
        torch_adamw.zero_grad()
        value = torch_loss(theirs, tokens)
        value.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), OPTIMIZER.clip_norm)
        torch_adamw.step()
        torch_losses.append(value.item())

    assert torch_losses[-1] < torch_losses[0] - 0.5
    np.testing.assert_allclose(losses, torch_losses, rtol=2e-5)
    before, after = trained_variant.by_name(trained_variant.params), torch_tensors(theirs.named_parameters())
    ours = trained_variant.by_name(params)
    for name, want in after.items():
        moved = np.linalg.norm(want - before[name])
        assert np.linalg.norm(ours[name] - want) < 6e-3 * moved, name
