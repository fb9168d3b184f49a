"""Generate text from a training run:

python -m experiments.generate --checkpoint=runs/tiny --prompt="import os"
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from absl import app, flags, logging

_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Output folder of a training run.", required=True)
_PROMPT = flags.DEFINE_multi_string("prompt", None, "Text to continue; repeat for a batch.", required=True)
_STEP = flags.DEFINE_integer("step", None, "Checkpoint step; default: the newest.")
_TOKENS = flags.DEFINE_integer("max_new_tokens", 128, "New tokens per prompt.")
_TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "0 is greedy.")
_TOP_P = flags.DEFINE_float("top_p", 1.0, "Nucleus sampling.")
_SEED = flags.DEFINE_integer("seed", 0, "Of sampling.")
_EMA = flags.DEFINE_bool("ema", False, "Use the averaged parameters.")


def run() -> None:
    from deepseek_jax.config import Config, build
    from deepseek_jax.data import Tokenizer
    from deepseek_jax.inference.generate import generate
    from deepseek_jax.inference.sampling import Sampling
    from deepseek_jax.training.checkpoint import load_params

    folder = Path(_CHECKPOINT.value)
    config, params, bias, _ = load_params(folder / "checkpoints", _STEP.value, _EMA.value)
    cfg = build(Config, config)
    tokenizer = Tokenizer.load(folder / "tokenizer.json")
    outputs = generate(
        params,
        cfg.model,
        [tokenizer.encode(text, allow_special=True) or [tokenizer.bos_id] for text in _PROMPT.value],
        _TOKENS.value,
        balance_bias=bias,
        sampling=Sampling(_TEMPERATURE.value, _TOP_P.value),
        stop_ids=[tokenizer.eos_id],
        seed=_SEED.value,
        num_ids=tokenizer.vocab_size,
    )
    for prompt, out in zip(_PROMPT.value, outputs, strict=True):
        print(prompt + tokenizer.decode(out, skip_special=True))
        print("-" * 75)


def main(argv: Sequence[str]) -> int:
    if len(argv) > 1:
        print(f"error: unexpected arguments {argv[1:]}", file=sys.stderr)
        return 2
    logging.set_verbosity(logging.ERROR)
    try:
        run()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    app.run(main)
