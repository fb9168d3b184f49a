"""Greedy texts by the whole forward pass, again for each token: no cache, no engine."""

import functools

import jax
import numpy as np

from deepseek_jax.model.layers import logits
from deepseek_jax.model.layout import Inputs, single_device
from deepseek_jax.model.transformer import forward

AT_ONCE = 8  # sequences


@functools.partial(jax.jit, static_argnames="cfg")
def _best(params, cfg, bias, tokens, at):
    h, _ = forward(params, cfg, Inputs(tokens), bias, single_device(), mtp=False)
    return logits(params, h[np.arange(len(tokens)), at]).argmax(-1)


def greedy(params, cfg, bias, prompts, new):
    """`new` tokens of each prompt; for all, or for each."""
    new = [new] * len(prompts) if isinstance(new, int) else list(new)
    longest = max(len(p) + n for p, n in zip(prompts, new, strict=True))
    tokens = np.zeros((-(-len(prompts) // AT_ONCE) * AT_ONCE, -(-longest // 64) * 64), np.int32)
    length = np.ones(len(tokens), np.int32)
    for i, prompt in enumerate(prompts):
        tokens[i, : len(prompt)], length[i] = prompt, len(prompt)
    for start in range(0, len(tokens), AT_ONCE):
        rows = slice(start, start + AT_ONCE)
        for _ in range(max(new[rows])):  # what follows cannot matter
            chosen = np.asarray(_best(params, cfg, bias, tokens[rows], length[rows] - 1))
            [room] = np.nonzero(length[rows] < tokens.shape[1])
            tokens[start + room, length[start + room]] = chosen[room]
            length[start + room] += 1
    return [
        tokens[i, len(p) : len(p) + n].tolist() for i, (p, n) in enumerate(zip(prompts, new, strict=True))
    ]
