"""Worker of `experiments.bench`: Hugging Face `DeepseekV3ForCausalLM` in torch, with transformers' defaults.

Imports nothing of this project but the pipe protocol, so any interpreter with torch and transformers can run it.
"""

import functools
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.bench_worker import Measure, serve
from experiments.serving_load import Answer, Wanted


def start() -> dict[str, str]:
    import platform

    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
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
    if spec["kind"] in ("static", "gaps"):
        return (_static if spec["kind"] == "static" else _gaps)(_saved(spec["checkpoint"]), spec)
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


@functools.cache
def _saved(checkpoint: str) -> Any:
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    return model


def _static(model: Any, spec: Mapping[str, Any]) -> Callable[[], float]:
    """The requests of a trace in batches of `limit`, those of like length together; answers go to the file `out`."""
    wanted = [Wanted(*request) for request in spec["trace"]]
    order = sorted(range(len(wanted)), key=lambda i: wanted[i].max_tokens)
    batches = [order[i : i + spec["limit"]] for i in range(0, len(order), spec["limit"])]

    def run() -> float:
        answers, total = [Answer([], [])] * len(wanted), 0.0
        for batch in batches:
            began = time.perf_counter()
            rows = _batch(model, [wanted[i] for i in batch])
            seconds = time.perf_counter() - began
            total += seconds
            for i, row in zip(batch, rows, strict=True):
                answers[i] = Answer(row, [seconds])
        Path(spec["out"]).write_text(json.dumps(answers))
        return total

    _batch(model, [w._replace(max_tokens=4) for w in wanted[: spec["limit"]]])
    return run


def _batch(model: Any, wanted: Sequence[Wanted]) -> list[list[int]]:
    """Runs to the longest output; a request keeps what it asked for. Prompts are padded on the left."""
    import torch

    longest = max(len(w.prompt) for w in wanted)
    ids = torch.tensor([[0] * (longest - len(w.prompt)) + w.prompt for w in wanted])
    mask = torch.tensor([[0] * (longest - len(w.prompt)) + [1] * len(w.prompt) for w in wanted])
    most = max(w.max_tokens for w in wanted)
    with torch.inference_mode():
        out = model.generate(
            ids, attention_mask=mask, max_new_tokens=most, do_sample=False, use_cache=True, pad_token_id=0
        )
    return [row[longest : longest + w.max_tokens].tolist() for row, w in zip(out, wanted, strict=True)]


def _gaps(model: Any, spec: Mapping[str, Any]) -> Callable[[], float]:
    """How far below the best logit each token of the answers lies, their own text before it: 0 where it is the best one.
    The largest gap of each answer goes to the file `out`."""
    import torch

    def gap(prompt: list[int], tokens: list[int]) -> float:
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
        chosen = logits[torch.arange(len(tokens)), torch.tensor(tokens)]
        return (logits.max(-1).values - chosen).max().item()

    def run() -> float:
        began = time.perf_counter()
        answers = json.loads(Path(spec["answers"]).read_text())
        gaps = [gap(w[0], tokens) for w, (tokens, _) in zip(spec["trace"], answers, strict=True)]
        Path(spec["out"]).write_text(json.dumps(gaps))
        return time.perf_counter() - began

    return run


if __name__ == "__main__":
    serve(start, setup)
