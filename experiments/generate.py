"""Generate text from a training run:

    python -m experiments.generate --checkpoint=runs/tiny --prompt="import os"
    python -m experiments.generate --checkpoint=runs/tiny --prompt="import os" --mesh=node=2,local=4

`--mesh` spreads the experts over devices: sizes of the mesh axes data, node, local and tensor, and any other key of
`config.mesh` that says how tokens travel (experts, dispatch, combine, receive). On CPU, as many devices are made.
"""

import contextlib
import sys
from collections.abc import Sequence
from typing import Any

from absl import flags

from deepseek_jax.config import MeshConfig, build
from experiments import command_line
from experiments.devices import cpu_devices

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
_MESH = flags.DEFINE_string("mesh", "", "Over which devices, as node=2,local=4; empty: on one.")
_MTP = flags.DEFINE_bool("mtp", True, "--nomtp leaves the MTP modules of a Hugging Face folder out.")
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


def parse_mesh(text: str) -> MeshConfig | None:
    """ "node=2,local=4" -> MeshConfig with `data` 1 unless it is named; None for "". Raises ValueError."""
    values: dict[str, Any] = {"data": 1} if text else {}
    for pair in text.split(",") if text else ():
        key, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"--mesh={text}: {pair!r} should be KEY=VALUE, as node=2,local=4")
        values[key.strip()] = _number(value.strip())
    return build(MeshConfig, values, "mesh.") if values else None


def _number(text: str) -> Any:
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return {"True": True, "False": False}.get(text, text)


def main(argv: Sequence[str]) -> int:
    command_line.parse_flags(argv)
    mesh = parse_mesh(_MESH.value)
    if mesh is not None:
        cpu_devices(max(1, mesh.data) * mesh.node * mesh.local * mesh.tensor)
    import deepseek_jax

    model = deepseek_jax.load(_CHECKPOINT.value, step=_STEP.value, ema=_EMA.value, mtp=_MTP.value, mesh=mesh)
    _chat(model) if _CHAT.value else _complete(model)
    return 0


if __name__ == "__main__":
    command_line.run(main)
