"""Worker of `experiments.bench serve`: vLLM's engine, in this process, so that its CPU seconds are the worker's.

Imports nothing of this project but the pipe protocol and the load, so any interpreter with vLLM can run it. What its CPU
build needs to give right tokens in its own best time is in `environment` and `engine_options`.
"""

import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.bench_worker import Measure, serve
from experiments.serving_load import Wanted, closed_loop

# Threads that spin at a barrier while a neighbour has their core: 3 tokens/s where this gives 50.
_ENVIRONMENT = {
    "OMP_WAIT_POLICY": "PASSIVE",
    "GOMP_SPINCOUNT": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "PYTHONWARNINGS": "ignore",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


def environment(threads: int, in_process: bool = True) -> dict[str, str]:
    """Changes to the environment: `threads` of OpenMP; a server has its engine in another process."""
    return {
        **_ENVIRONMENT,
        "OMP_NUM_THREADS": str(threads),
        "VLLM_ENABLE_V1_MULTIPROCESSING": str(int(not in_process)),
    }


def engine_options(longest: int, rows: int) -> dict[str, Any]:
    """Of vLLM's engine. Its CPU rotary kernel turns queries of three dims, which MLA gives it, wrongly (0.32.0): PyTorch's
    instead. No prefix cache: its MLA kernel has none, and the trace's prompts share nothing."""
    return {
        "dtype": "float32",
        "max_model_len": longest,
        "max_num_seqs": rows,
        "enforce_eager": True,
        "enable_prefix_caching": False,
        "compilation_config": {"custom_ops": ["all", "-rotary_embedding"]},
    }


def start() -> dict[str, str]:
    import platform
    from importlib.metadata import version

    import torch
    import vllm  # noqa: F401  (missing: said at once)

    return {
        "python": platform.python_version(),
        "vllm-cpu": version("vllm-cpu"),
        "torch": torch.__version__,
    }


@functools.cache
def _engine(checkpoint: str, longest: int, rows: int) -> Any:
    from vllm import LLM

    return LLM(model=checkpoint, skip_tokenizer_init=True, **engine_options(longest, rows)).llm_engine


def setup(spec: Mapping[str, Any]) -> Measure:
    """A closed loop over the spec's trace; a round leaves its answers in the file `out`."""
    from vllm import SamplingParams

    engine = _engine(spec["checkpoint"], spec["longest"], spec["rows"])
    wanted = [Wanted(*request) for request in spec["trace"]]
    seen: dict[str, int] = {}

    def submit(i: int, request: Wanted) -> None:
        sampling = SamplingParams(
            max_tokens=request.max_tokens, temperature=0, detokenize=False, ignore_eos=True
        )
        engine.add_request(str(i), {"prompt_token_ids": request.prompt}, sampling)

    def step() -> Iterator[tuple[int, Sequence[int]]]:
        for output in engine.step():
            tokens, had = output.outputs[0].token_ids, seen.get(output.request_id, 0)
            seen[output.request_id] = 0 if output.finished else len(tokens)
            yield int(output.request_id), list(tokens[had:])

    def run() -> float:
        answers, seconds = closed_loop(wanted, spec["limit"], submit, step)
        Path(spec["out"]).write_text(json.dumps(answers))
        return seconds

    closed_loop([r._replace(max_tokens=8) for r in wanted], spec["limit"], submit, step)  # warm
    return run


if __name__ == "__main__":
    serve(start, setup)
