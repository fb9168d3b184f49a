"""What the engine draws is what the policy learns: at a temperature, from the ids that top-p left."""

import jax
import numpy as np
import pytest

from deepseek_jax.config import Config, DataConfig, TrainConfig
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.posttraining.grpo_loss import grpo_loss
from deepseek_jax.posttraining.logprobs import make_logprob_step
from deepseek_jax.serving.request import Request
from deepseek_jax.serving.sampling import Sampling
from tests.oracle import model as oracle
from tests.oracle.tiny import checkpoint
from tests.serving.tiny_engine import CFG, engine, model, run

T, TEMPERATURE = 32, 0.7
PROMPTS = [[3, 1, 4, 1, 5], [9, 2, 6], [5, 3, 5, 8, 9, 7], [9, 3]]


@pytest.fixture(scope="module")
def drawn():
    """Four answers of the engine as a batch, and the probability of the ids that each token was drawn from."""
    sampling = Sampling(temperature=TEMPERATURE, top_p=0.8)
    asked = [Request(str(i), p, 20, sampling, seed=i, kept=True) for i, p in enumerate(PROMPTS)]
    answers = run(engine(), asked)
    w, m = T + 1, model()
    batch = {
        "tokens": np.zeros((4, w), np.int32),
        "loss_mask": np.zeros((4, w), bool),
        "sampler_logp": np.zeros((4, w), np.float32),
        "kept": np.zeros((4, w, -(-CFG.vocab_size // 32)), np.uint32),
    }
    for i, prompt in enumerate(PROMPTS):
        at = slice(len(prompt), len(prompt) + 20)
        batch["tokens"][i, : at.stop] = [*prompt, *(token.id for token in answers[str(i)])]
        batch["loss_mask"][i, at] = True
        batch["sampler_logp"][i, at] = [token.sampled_logprob for token in answers[str(i)]]
        batch["kept"][i, at] = [token.kept for token in answers[str(i)]]
    batch["padding"] = ~(batch["loss_mask"] | (np.cumsum(batch["loss_mask"], 1) == 0))
    tensors = checkpoint(CFG, jax.device_get(m.params), jax.device_get(m.balance_bias))
    logits = oracle.forward(*tensors, batch["tokens"][:, :-1]).logits / TEMPERATURE
    p = oracle.softmax(logits)
    bits = np.unpackbits(batch["kept"].view(np.uint8), axis=-1, bitorder="little")[..., : CFG.vocab_size]
    mass = np.pad((p * bits[:, 1:]).sum(-1), ((0, 0), (1, 0)))
    return batch, mass


def test_the_ratio_is_one_with_the_sets_and_else_their_mass(drawn):
    batch, mass = drawn
    cfg = Config(
        model=CFG,
        data=DataConfig(vocab_size=CFG.vocab_size, seq_len=T),
        train=TrainConfig(loss_chunk=64),
    )
    step = make_logprob_step(cfg, make_mesh(cfg.mesh, jax.devices()[:1]), TEMPERATURE)
    m, mask = model(), batch["loss_mask"]

    def metrics(batch, sets):
        kept = batch["kept"] if sets else 0 * batch["kept"]
        logp = step(m.params, m.balance_bias, batch | {"kept": kept}).logp
        found = grpo_loss(logp, batch["sampler_logp"], None, np.ones(4), mask, clip_low=0.9, clip_high=9.0)[1]
        return jax.device_get(found)

    on_policy = metrics(batch, sets=True)
    # The largest distance that a sampler may have from its trainer in float32.
    assert on_policy["sampler_gap_max"] < 1e-4
    np.testing.assert_allclose(on_policy["ratio"], 1, atol=1e-5)
    without = metrics(batch, sets=False)
    np.testing.assert_allclose(without["ratio"], mass[mask].mean(), atol=1e-4)
    assert mass[mask].min() >= 0.8 and without["ratio"] < 0.95
