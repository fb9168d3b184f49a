"""Worker of `experiments.bench sft`: TRL's `SFTTrainer` on Hugging Face's `DeepseekV3ForCausalLM`.

Imports nothing of this project but the pipe protocol, so any interpreter with TRL can run it.
"""

import importlib
import tempfile
import time
from collections.abc import Mapping
from typing import Any

from experiments.bench_worker import Measure, serve


def start() -> dict[str, str]:
    import platform

    import datasets
    import torch
    import transformers
    import trl

    importlib.import_module("trl.trainer.sft_trainer")  # which trl loads when first asked for
    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "trl": trl.__version__,
    }


def setup(spec: Mapping[str, Any]) -> Measure:
    """A round trains for `steps` steps, after one that does not count; seconds are per token that is no padding.

    spec: "samples": a list of {"input_ids", "labels"}; "packing": whether several share a window, or each is padded; "batch":
    samples or windows of a step.
    """
    import torch
    import transformers
    from datasets import Dataset

    torch.set_num_threads(spec["threads"])
    if spec["kind"] == "peak":
        from experiments.bench_torch import _peak

        return _peak(spec["size"], spec["products"])
    torch.manual_seed(0)
    model = transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(**spec["hf_config"]))
    dataset = Dataset.from_list(spec["samples"])
    folder = tempfile.mkdtemp()  # nothing is saved there

    def run(steps: int) -> float:
        trainer, times = _trainer(model, dataset, spec, folder, steps)
        trainer.train()
        (first, *_, last), counted = times.ends, times.tokens
        return (last - first) / counted

    run(1)
    return lambda: run(spec["steps"])


def _trainer(model: Any, dataset: Any, spec: Mapping[str, Any], folder: str, steps: int) -> Any:
    """A trainer of one step more than `steps`, and what times them."""
    import transformers
    import trl

    c = spec["config"]["optimizer"]

    class Times(transformers.TrainerCallback):
        """When steps ended, and the tokens of all but the first."""

        ends: list[float] = []  # noqa: RUF012
        tokens = 0

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.ends = [*self.ends, time.perf_counter()]

    times = Times()

    class Counting(trl.SFTTrainer):
        def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            if times.ends:
                mask = inputs.get("attention_mask")
                times.tokens += int(inputs["input_ids"].numel() if mask is None else mask.sum())
            return super().training_step(model, inputs, *args, **kwargs)

    args = trl.SFTConfig(
        output_dir=folder,
        use_cpu=True,
        bf16=False,
        activation_checkpointing=False,
        per_device_train_batch_size=spec["batch"],
        max_steps=steps + 1,
        max_length=spec["config"]["data"]["seq_len"],
        packing=spec["packing"],
        learning_rate=c["peak_lr"],
        adam_beta1=c["b1"],
        adam_beta2=c["b2"],
        weight_decay=c["weight_decay"],
        max_grad_norm=c["clip_norm"],
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    trainer = Counting(model, args, train_dataset=dataset, processing_class=_of_ids(), callbacks=[times])
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer, times


def _of_ids() -> Any:
    """A tokenizer for rows that are ids already: it only has to name a token for padding."""
    import tokenizers
    import transformers

    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<pad>": 0}, unk_token="<pad>"))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<pad>"
    )


if __name__ == "__main__":
    serve(start, setup)
