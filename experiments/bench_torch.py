"""Worker of `experiments.bench`: Hugging Face `DeepseekV3ForCausalLM` in torch, with transformers' defaults.

Imports nothing of this project but the pipe protocol, so any interpreter with torch and transformers can run it.
"""

import time
from collections.abc import Callable, Mapping
from typing import Any

from experiments.bench_worker import Measure, serve


def start() -> dict[str, str]:
    import platform

    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def setup(spec: Mapping[str, Any]) -> Measure:
    import torch
    import transformers

    torch.set_num_threads(spec["threads"])
    if spec["kind"] == "peak":
        return _peak(spec["size"], spec["products"])
    torch.manual_seed(0)
    config = transformers.DeepseekV3Config(**spec["hf_config"])
    model = transformers.DeepseekV3ForCausalLM(config)
    return (_train if spec["kind"] == "train" else _decode)(model, spec)


def _train(model: Any, spec: Mapping[str, Any]) -> Callable[[], float]:
    import torch

    model.train()
    c = spec["config"]["optimizer"]
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=c["peak_lr"], betas=(c["b1"], c["b2"]), weight_decay=c["weight_decay"]
    )
    tokens = torch.randint(model.config.vocab_size, (spec["batch"], spec["config"]["data"]["seq_len"]))

    def run(steps: int) -> float:
        began = time.perf_counter()
        for _ in range(steps):
            optimizer.zero_grad()
            model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), c["clip_norm"])
            optimizer.step()
        return (time.perf_counter() - began) / steps

    run(2)
    return lambda: run(spec["steps"])


def _peak(size: int, products: int) -> Measure:
    """A float32 matrix product."""
    import torch

    a = torch.ones(size, size)

    def run() -> float:
        began = time.perf_counter()
        for _ in range(products):
            a @ a
        return (time.perf_counter() - began) / products

    run()
    return run


def _decode(model: Any, spec: Mapping[str, Any]) -> Callable[[], float]:
    import torch

    model.eval()
    model.generation_config.eos_token_id = None  # random weights: nothing may end a row early
    model.generation_config.pad_token_id = 0
    tokens = torch.randint(model.config.vocab_size, (spec["batch"], spec["prompt"]))
    mask = torch.ones_like(tokens)

    def run() -> float:
        began = time.perf_counter()
        with torch.no_grad():
            out = model.generate(
                tokens, attention_mask=mask, max_new_tokens=spec["new"], do_sample=False, use_cache=True
            )
        seconds = time.perf_counter() - began
        assert out.shape == (spec["batch"], spec["prompt"] + spec["new"])
        return seconds

    run()
    return run


if __name__ == "__main__":
    serve(start, setup)
