"""Log-probabilities of the tokens of a batch, without a gradient: those of a policy before its updates, and of a reference.

Dims: b output, w window, t its tokens but the first, as labels.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from deepseek_jax.checks import require
from deepseek_jax.config import Config
from deepseek_jax.model.loss import LogProbs
from deepseek_jax.model.sequence import Whole
from deepseek_jax.posttraining.objective import drawn_logprobs
from deepseek_jax.training.labels import Batch, targets
from deepseek_jax.training.passes import make_pass


def make_logprob_step(
    cfg: Config, mesh: Mesh | AbstractMesh, temperature: float = 1.0, num_ids: int | None = None
) -> Callable[[Any, jax.Array, Batch], LogProbs]:
    """The jitted pass: (params, balance_bias, batch) -> log-probability and entropy of each token that counts, float32 [b, w].

    The entry of a token stands in its own column, as the objective reads it; 0 where none counts. They are of the distribution
    drawn from: at `temperature`, from the first num_ids ids (None: all), from "kept" if the batch has it. The program is the objective's up to here: on policy they
    differ from its own by the rounding of a compiler's order. Raises ValueError for what does not divide over the mesh.
    """
    require(temperature > 0, f"temperature={temperature} must be > 0: greedy outputs have no probabilities")
    t, chunk = cfg.data.seq_len, cfg.train.loss_chunk

    def of(sequence: Whole, head_dv: jax.Array, batch: Batch, h_btd: jax.Array) -> LogProbs:
        found = drawn_logprobs(sequence, head_dv, batch, h_btd, t, chunk, temperature, num_ids)
        valid_bt = sequence.own(targets(batch, t, 0)[1])
        return LogProbs(*(jnp.where(valid_bt, x, 0) for x in found))

    run = make_pass(cfg, mesh, of, per_token=True)

    @jax.jit
    def step(params: Any, balance_bias: jax.Array, batch: Batch) -> LogProbs:
        after = batch["tokens"].shape[1] - t - 1
        found = run(params, balance_bias, batch)
        return LogProbs(*(jnp.pad(x, ((0, 0), (1, after))) for x in found))

    return step
