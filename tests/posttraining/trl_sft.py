"""TRL's fine-tuning of a model that this project wrote: its own preparation of rows, collation and loss."""

from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import transformers
import trl

from deepseek_jax import hf
from deepseek_jax.data.conversations import Conversations, Sample
from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.hf.names import get, leaves
from tests.golden.config import HERE
from tests.parity.conftest import torch_tensors
from tests.posttraining.sft_cases import CFG, loss_and_gradient, packed

IGNORED = -100
SEP = "\n"  # between prompt and completion of texts: no token crosses it, as TRL's common prefix needs
WORDS = ("the", "apple", "of", "peel", "cut", "an", "into", "oven", "for", "dish", "7", "+", "é", "{")


def random_rows(rng: np.random.Generator, count: int, conversational: bool) -> list[dict[str, Any]]:
    """Prompts and completions of a few words each, as TRL and this project read them."""

    def text(most: int) -> str:
        return " ".join(rng.choice(WORDS, rng.integers(1, most + 1)))

    def row() -> dict[str, Any]:
        if not conversational:
            return {"prompt": text(5) + SEP, "completion": text(4)}
        system = [{"role": "system", "content": text(3)}] if rng.random() < 0.3 else []
        prompt = [*system, {"role": "user", "content": text(4)}]
        return {"prompt": prompt, "completion": [{"role": "assistant", "content": text(4)}]}

    return [row() for _ in range(count)]


class Compared(NamedTuple):
    """Of a batch: both losses, and each parameter's distance between the two gradients as a share of its norm."""

    ours: float
    theirs: float
    gradients: dict[str, float]


class Peer:
    """A `trl.SFTTrainer` of a model with `params`, whose dataset are `rows`.

    samples: of this project, of the same rows.
    """

    def __init__(self, params: Any, bias: Any, rows: list[dict[str, Any]], folder: Path):
        self.params, self.bias = params, bias
        tokenizer = Tokenizer.load(HERE / "tokenizer.json")
        hf.save(folder / "model", CFG.model, params, bias, format="f32", tokenizer=tokenizer)
        model = transformers.DeepseekV3ForCausalLM.from_pretrained(
            folder / "model", attn_implementation="eager", experts_implementation="eager"
        )
        args = trl.SFTConfig(
            output_dir=str(folder / "trl"),
            use_cpu=True,
            bf16=False,
            activation_checkpointing=False,
            max_length=None,
            report_to=[],
            disable_tqdm=True,
        )
        datasets.disable_progress_bars()
        self.trainer = trl.SFTTrainer(
            model,
            args,
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=transformers.AutoTokenizer.from_pretrained(folder / "model"),
        )
        conversations = Conversations(tokenizer)
        self.samples = [
            one for row in conversations.samples([conversations.turns(x) for x in rows]) for one in row
        ]

    def example(self, place: int) -> Sample:
        """Of TRL: ids, and which of them are labels."""
        row = self.trainer.train_dataset[place]
        return Sample(np.array(row["input_ids"]), np.array(row["labels"]) != IGNORED)

    def loss_and_gradient(self, places: range) -> tuple[float, dict[str, np.ndarray]]:
        """Of a batch of rows, by TRL; gradients by checkpoint name."""
        trainer = self.trainer
        inputs = trainer.data_collator([trainer.train_dataset[i] for i in places])
        trainer.model.zero_grad()
        loss = trainer.compute_loss(trainer.model, inputs)
        loss.backward()
        named = ((name, x.grad) for name, x in trainer.model.named_parameters())
        return loss.item(), torch_tensors(named)

    def compared(self, places: range) -> Compared:
        """Both losses and gradients of a batch; ours packed, several samples in a window."""
        theirs, want = self.loss_and_gradient(places)
        batch = packed(self.samples[places.start : places.stop])
        found, grads = loss_and_gradient(self.params, self.bias, batch, mtp_lambda=0.0)
        got = by_name(grads)
        shares = {
            name: float(np.linalg.norm(got[name] - x) / np.linalg.norm(x))
            for name, x in want.items()
            if x.any()
        }
        return Compared(float(found["loss"]), theirs, shares)


def by_name(tree: Any) -> dict[str, np.ndarray]:
    """A tree like the parameters, as tensors by checkpoint name."""
    found = {}
    for leaf in leaves(CFG.model).values():
        array = np.asarray(get(tree, leaf.path))
        found |= {leaf.name(index): leaf.to_hf(array[index]) for index in leaf.indices()}
    return found
