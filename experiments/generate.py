"""Generate text from a training run:

python -m experiments.generate --checkpoint=runs/tiny --prompt="import os"
"""

import sys
from collections.abc import Sequence

from absl import app, flags, logging

_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "A training run's output folder, or a Hugging Face folder.", required=True
)
_PROMPT = flags.DEFINE_multi_string("prompt", [], "Text to continue; repeat for a batch.")
_STEP = flags.DEFINE_integer("step", None, "Checkpoint step; default: the newest.")
_TOKENS = flags.DEFINE_integer("max_new_tokens", 128, "New tokens per prompt.")
_TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "0 is greedy.")
_TOP_P = flags.DEFINE_float("top_p", 1.0, "Nucleus sampling.")
_SEED = flags.DEFINE_integer("seed", 0, "Of sampling.")
_SPECULATIVE = flags.DEFINE_bool("speculative", False, "Draft with the MTP module.")
_CHAT = flags.DEFINE_bool("chat", False, "Talk: one line of input is one turn; an empty line ends.")
_EMA = flags.DEFINE_bool("ema", False, "Use the averaged parameters.")


def _options() -> dict:
    return {
        "temperature": _TEMPERATURE.value,
        "top_p": _TOP_P.value,
        "seed": _SEED.value,
        "speculative": _SPECULATIVE.value,
    }


def _complete(model) -> None:
    prompts = list(_PROMPT.value)
    if not prompts:
        raise ValueError("give --prompt=TEXT (or --chat)")
    for prompt, out in zip(prompts, model.generate(prompts, _TOKENS.value, **_options()), strict=True):
        print(prompt + out)
        print("-" * 75)
    if model.last_stats is not None:
        stats = model.last_stats
        print(f"drafts accepted: {stats.acceptance:.1%}, {stats.tokens_per_step:.2f} tokens per step")


def _chat(model) -> None:
    messages = []
    for line in sys.stdin:
        if not line.strip():
            break
        messages.append({"role": "user", "content": line.strip()})
        reply = model.chat(messages, _TOKENS.value, **_options())
        messages.append({"role": "assistant", "content": reply})
        print(reply, flush=True)


def run() -> None:
    import deepseek_jax

    model = deepseek_jax.load(_CHECKPOINT.value, step=_STEP.value, ema=_EMA.value)
    _chat(model) if _CHAT.value else _complete(model)


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
