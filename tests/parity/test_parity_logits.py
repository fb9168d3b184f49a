"""Forward pass against transformers, for every variant of the family."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import torch

from deepseek_jax import hf
from deepseek_jax.model.modules import DeepSeekV3

from .conftest import PROMPT, torch_tensors


def test_every_weight_arrives(variant):
    """Each tensor of the torch model, bit for bit, under its checkpoint name."""
    ours, theirs = variant.by_name(variant.params), torch_tensors(variant.torch_model.named_parameters())
    assert ours.keys() == theirs.keys()
    for name, want in theirs.items():
        np.testing.assert_array_equal(ours[name], want, err_msg=name)


def test_float32_logits(variant):
    got = np.asarray(variant.apply(variant.params, variant.tokens)[1])
    assert np.abs(got - variant.torch_logits).max() < 2e-5 * np.abs(variant.torch_logits).max()


def test_64_greedy_tokens(variant):
    """Greedy decoding by full forward; transformers uses its cache."""
    prompt = variant.tokens[:, :PROMPT]
    model = variant.torch_model
    want = model.generate(
        torch.tensor(prompt, dtype=torch.long),
        attention_mask=torch.ones(prompt.shape, dtype=torch.long),
        max_new_tokens=variant.tokens.shape[1] - PROMPT,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    ).numpy()
    tokens = np.zeros_like(variant.tokens)
    tokens[:, :PROMPT] = prompt
    for t in range(PROMPT, tokens.shape[1]):  # what lies to the right of t - 1 is not seen
        tokens[:, t] = np.asarray(variant.apply(variant.params, tokens)[1])[:, t - 1].argmax(-1)
    assert tokens.shape[1] - PROMPT == 64
    np.testing.assert_array_equal(tokens, want)


def test_bfloat16_logits(variant, tmp_path):
    """A token's logits go through R roundings to bfloat16, each of relative size u = 2**-9 at most.

    As independent errors they add up to about u * sqrt(R); twice that is allowed, for the median token, because
    a token whose routing flips is another function. And no more than 1.5 times the error of torch in bfloat16.
    """
    hf.save(tmp_path / "bf16", variant.cfg, variant.params, variant.bias, format="bf16")
    cfg, params, bias = hf.load(tmp_path / "bf16")
    assert cfg == dataclasses.replace(variant.cfg, dtype="bfloat16")
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.bfloat16.dtype}
    got = jax.jit(DeepSeekV3(cfg).apply)({"params": params}, variant.tokens, balance_bias=bias)[0]
    theirs = type(variant.torch_model).from_pretrained(
        tmp_path / "bf16",
        dtype=torch.bfloat16,
        attn_implementation="eager",
        experts_implementation="eager",
    )
    with torch.no_grad():
        torch_bf16 = theirs(torch.tensor(variant.tokens, dtype=torch.long)).logits.float().numpy()

    def error(x):
        difference = np.linalg.norm(np.asarray(x, np.float64) - variant.torch_logits, axis=-1)
        return np.median(difference / np.linalg.norm(variant.torch_logits, axis=-1))

    per_block = 24  # norms 4, products 9, rotary 2, scores, softmax, SwiGLU 3, gains, residuals 2, weights
    roundings = per_block * cfg.num_hidden_layers + 3
    assert error(got) < 2 * 2**-9 * np.sqrt(roundings)
    assert error(got) < 1.5 * error(torch_bf16)
