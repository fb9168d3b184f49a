"""GRPO's loss and gradients beside those of TRL, which runs its own code, without a hub:

    python -m tests.posttraining.trl_loss [BATCHES]

TRL's trainer gets a DeepseekV3 that was exported from ours, and batches of random tokens and log-probabilities; of each form
that both have, the loss and the gradient of every parameter are compared, over 100 batches by default.

Dims: b output, c its tokens, p those of the prompt, w window.
"""

import collections
import dataclasses
import os
import sys
import tempfile
import types
from typing import Any, NamedTuple

import numpy as np

os.environ["HF_HUB_OFFLINE"] = "1"

ROWS, PROMPT, ANSWER = 6, 5, 7
CLIP = {"clip_low": 0.2, "clip_high": 0.28}


class Form(NamedTuple):
    """Ours, as options of `grpo_loss`; TRL's loss type, level of the ratio, correction of the KL divergence and delta."""

    ours: dict[str, Any]
    loss_type: str
    level: str = "token"
    corrected: bool = False
    delta: float | None = None


FORMS = {
    "grpo": Form({"beta": 0.04}, "grpo"),
    "grpo, corrected": Form({"beta": 0.04, "kl": "unbiased"}, "grpo", corrected=True),
    "v32": Form(
        {"beta": 0.04, "kl": "unbiased", "off_policy_delta": 0.05}, "grpo", corrected=True, delta=0.05
    ),
    "bnpo": Form({"beta": 0.04, "aggregate": "token"}, "bnpo"),
    "dapo": Form({"beta": 0.0, "aggregate": "token"}, "dapo"),
    "dr_grpo": Form({"beta": 0.04, "aggregate": "constant", "constant_length": 9}, "dr_grpo"),
    "gspo": Form({"beta": 0.04, "ratio": "sequence_mean"}, "grpo", level="sequence"),
}


class Drawn(NamedTuple):
    """Prompts end and answers begin where the two meet, of unlike lengths."""

    tokens: np.ndarray  # int64 [b, p + c]
    prompt: np.ndarray  # how many of each row, [b]
    answer: np.ndarray
    new: np.ndarray  # [b, c]; of a model, where there is one
    old: np.ndarray
    ref: np.ndarray
    advantages: np.ndarray

    @property
    def mask(self) -> np.ndarray:
        return np.arange(ANSWER)[None] < self.answer[:, None]


def drawn(seed: int, vocab: int = 64) -> Drawn:
    rng = np.random.default_rng(seed)
    tokens = rng.integers(2, vocab, (ROWS, PROMPT + ANSWER))
    prompt, answer = rng.integers(1, PROMPT + 1, ROWS), rng.integers(1, ANSWER + 1, ROWS)
    new = rng.normal(-2, 0.5, (ROWS, ANSWER))
    old, ref = (new + rng.normal(0, 0.3, new.shape) for _ in range(2))
    return Drawn(tokens, prompt, answer, new, old, ref, rng.standard_normal(ROWS))


# --- TRL ----------------------------------------------------------------------------------------------------------


def set_to(trainer: Any, form: Form) -> None:
    """What `GRPOTrainer._compute_loss` reads of its options."""
    trainer.loss_type, trainer.importance_sampling_level = form.loss_type, form.level
    trainer.beta, trainer.off_policy_mask_threshold = form.ours["beta"], form.delta
    trainer.epsilon_low, trainer.epsilon_high = CLIP["clip_low"], CLIP["clip_high"]
    trainer.max_completion_length = form.ours.get("constant_length", ANSWER)
    trainer.current_gradient_accumulation_steps = 1
    trainer.args.use_bias_correction_kl = form.corrected


def inputs(batch: Drawn) -> dict[str, Any]:
    """As its trainer makes them of rollouts: prompts padded on the left, answers on the right."""
    import torch

    there = np.arange(PROMPT)[None] >= PROMPT - batch.prompt[:, None]
    arrays = {
        "prompt_ids": np.where(there, batch.tokens[:, :PROMPT], 0),
        "prompt_mask": there.astype(np.int64),
        "completion_ids": np.where(batch.mask, batch.tokens[:, PROMPT:], 0),
        "completion_mask": batch.mask.astype(np.int64),
        "advantages": batch.advantages,
        "old_per_token_logps": batch.old,
        "ref_per_token_logps": batch.ref,
        "num_items_in_batch": batch.mask.sum(),
    }
    return {name: torch.tensor(x) for name, x in arrays.items()}


def trainer_without_a_model() -> Any:
    """What `_compute_loss` reads of a trainer, but the options."""
    alone = types.SimpleNamespace(
        num_processes=1, reduce=lambda x, reduction: x, gather=lambda x: x, sync_gradients=True
    )
    of = {name: False for name in ("use_vllm", "aux_loss_enabled", "_entropy_bonus_enabled")}
    return types.SimpleNamespace(
        **of,
        accelerator=alone,
        top_entropy_quantile=1.0,
        model=types.SimpleNamespace(training=True),
        args=types.SimpleNamespace(delta=None, steps_per_generation=1),
        _metrics=collections.defaultdict(lambda: collections.defaultdict(list)),
    )


def their_loss_of_logps(form: Form, batch: Drawn) -> tuple[float, np.ndarray]:
    """(loss, gradient by the log-probabilities), float64: the loss of TRL's trainer, to which a model gave `batch.new`."""
    import torch
    from trl.trainer.grpo_trainer import GRPOTrainer

    trainer, new = trainer_without_a_model(), torch.tensor(batch.new, requires_grad=True)
    trainer._get_per_token_logps_and_entropies = lambda *args, **kwargs: (new, torch.zeros_like(new), None)
    trainer.get_off_policy_mask = GRPOTrainer.get_off_policy_mask
    set_to(trainer, form)
    loss = GRPOTrainer._compute_loss(trainer, None, inputs(batch))
    loss.backward()
    return loss.item(), new.grad.numpy()


# --- on a model ---------------------------------------------------------------------------------------------------


def trainer_of(folder: str) -> Any:
    """TRL's trainer of an exported model, float32, as it is built for any other."""
    import datasets
    import tokenizers
    import torch
    import transformers
    from trl import GRPOConfig, GRPOTrainer

    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    )
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({str(i): i for i in range(64)}, unk_token="0"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="0", eos_token="1")
    args = GRPOConfig(
        output_dir=f"{folder}/trl",
        per_device_train_batch_size=ROWS,
        num_generations=ROWS,
        max_completion_length=ANSWER,
        beta=0.0,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to=[],
    )
    rows = datasets.Dataset.from_dict({"prompt": ["2 3"] * ROWS})
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=lambda completions, **columns: [0.0] * len(completions),
        args=args,
        train_dataset=rows,
        processing_class=tokenizer,
    )
    trainer.model.train()
    return trainer


def their_loss_of_a_model(trainer: Any, form: Form, batch: Drawn) -> tuple[float, dict[str, np.ndarray]]:
    """(loss, gradient of each tensor of a checkpoint)"""
    from tests.parity.conftest import torch_tensors

    set_to(trainer, form)
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, inputs(batch))
    loss.backward()
    return loss.item(), torch_tensors((name, x.grad) for name, x in trainer.model.named_parameters())


def our_batch(batch: Drawn) -> dict[str, np.ndarray]:
    """Each row from its first token on, its window filled up."""
    w = PROMPT + ANSWER
    tokens = np.zeros((ROWS, w), np.int32)
    mask = np.zeros((ROWS, w), bool)
    padding = np.ones((ROWS, w), bool)
    old, ref = (np.zeros((ROWS, w), np.float32) for _ in range(2))
    for i, (p, c) in enumerate(zip(batch.prompt, batch.answer, strict=True)):
        tokens[i, : p + c] = batch.tokens[i, PROMPT - p : PROMPT + c]
        mask[i, p : p + c], padding[i, : p + c] = True, False
        old[i, p : p + c], ref[i, p : p + c] = batch.old[i, :c], batch.ref[i, :c]
    return {
        "tokens": tokens,
        "loss_mask": mask,
        "padding": padding,
        "old_logp": old,
        "ref_logp": ref,
        "advantages": batch.advantages.astype(np.float32),
    }


def main(batches: int) -> None:
    import jax

    from deepseek_jax import hf
    from deepseek_jax.hf.names import get, leaves
    from deepseek_jax.model.layout import single_device
    from deepseek_jax.parallel.mesh import make_mesh
    from deepseek_jax.posttraining.grpo_loss import PLAIN
    from deepseek_jax.posttraining.logprobs import make_logprob_step
    from deepseek_jax.posttraining.objective import grpo
    from deepseek_jax.training.gradients import value_of
    from deepseek_jax.training.labels import totals
    from tests.oracle.tiny import weights
    from tests.tiny_run import HYPER, tiny

    cfg = tiny(
        model={"vocab_size": 64, "num_nextn_predict_layers": 0, "initializer_range": 0.2},
        data={"vocab_size": 64, "seq_len": PROMPT + ANSWER - 1},
        balance={"mode": "none"},
    )
    params, bias = weights(cfg.model, 3)
    folder = f"{tempfile.mkdtemp()}/model"
    hf.save(folder, cfg.model, params, bias, format="f32")
    trainer, worst = trainer_of(folder), collections.defaultdict(float)
    logps = make_logprob_step(cfg, make_mesh(cfg.mesh, jax.devices()[:1]))

    def by_name(tree: Any) -> dict[str, np.ndarray]:
        found = {}
        for leaf in leaves(cfg.model).values():
            array = np.asarray(get(tree, leaf.path))
            found |= {leaf.name(index): leaf.to_hf(array[index]) for index in leaf.indices()}
        return found

    @jax.jit
    def gradients(batch: Any) -> Any:
        def of(params: Any, options: dict[str, Any]) -> Any:
            objective = grpo(cfg, dataclasses.replace(PLAIN, **CLIP, **options))
            total = totals(cfg, batch, ROWS)
            return value_of(cfg, single_device(), objective)(params, batch, bias, total, HYPER)[0]

        return {
            name: jax.value_and_grad(lambda p, form=form: of(p, form.ours))(params)
            for name, form in FORMS.items()
        }

    for seed in range(batches):
        batch = drawn(seed)
        near = np.asarray(logps(params, bias, our_batch(batch)).logp)
        new = np.zeros((ROWS, ANSWER), np.float32)
        for i, (p, c) in enumerate(zip(batch.prompt, batch.answer, strict=True)):
            new[i, :c] = near[i, p : p + c]
        old, ref = (np.float32(new + x - batch.new) for x in (batch.old, batch.ref))
        batch = batch._replace(new=new, old=old, ref=ref, advantages=np.float32(batch.advantages))
        for name, (value, of) in jax.device_get(gradients(our_batch(batch))).items():
            theirs, grads = their_loss_of_a_model(trainer, FORMS[name], batch)
            got = by_name(of)
            assert got.keys() == grads.keys()
            whole = np.sqrt(sum(np.vdot(x, x) for x in grads.values()))
            apart = max(np.linalg.norm(got[key] - x) for key, x in grads.items()) / whole
            worst[name, "loss"] = max(worst[name, "loss"], abs(value - theirs))
            worst[name, "gradient"] = max(worst[name, "gradient"], float(apart))
    for (name, what), x in worst.items():
        print(f"{name:16} {what:9} {x:.1e} at most, over {batches} batches")
    # Float32 passes of two libraries (as in test_parity_training): a loss of order 1, gradients by the norm of all.
    assert max(worst.values()) < 2e-5


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 100)
