"""A tiny checkpoint that chats, reasons and calls tools, and a server process over it: what the scripts of this folder share.

with running(rows=4) as (server, checkpoint):
    server.get("/v1/models")
"""

import contextlib
import dataclasses
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import tokenizers

from deepseek_jax import hf
from deepseek_jax.data.tokenizer import Tokenizer
from experiments.served import Server, end_servers_at_sigterm
from tests.inference.checkpoint import CFG as SMALL
from tests.oracle.tiny import weights
from tests.serving import answers

MODEL, EOS = "tiny", 1
CFG = dataclasses.replace(SMALL, vocab_size=448, max_position_embeddings=2048)
# V3.1's turns, shortened: tools in the system's turn, calls and their results between turns.
TEMPLATE = (
    "{{ bos_token }}{% for m in messages if m['role'] == 'system' %}{{ m['content'] }}{% endfor %}"
    "{% if tools %}{% for t in tools %}{{ t | tojson }}{% endfor %}{% endif %}"
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '<｜User｜>' + m['content'] }}"
    "{% elif m['role'] == 'assistant' %}{{ '<｜Assistant｜></think>' }}{{ m['content'] or '' }}"
    "{% if m['tool_calls'] %}{{ '<｜tool▁calls▁begin｜>' }}{% for c in m['tool_calls'] %}"
    "{{ '<｜tool▁call▁begin｜>' + c['function']['name'] + '<｜tool▁sep｜>' + c['function']['arguments'] }}"
    "{{ '<｜tool▁call▁end｜>' }}{% endfor %}{{ '<｜tool▁calls▁end｜>' }}{% endif %}{{ eos_token }}"
    "{% elif m['role'] == 'tool' %}{{ '<｜tool▁output▁begin｜>' + m['content'] + '<｜tool▁output▁end｜>' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<｜Assistant｜>' }}"
    "{{ '<think>' if thinking else '</think>' }}{% endif %}"
)


def tokenizer(template: str | None = TEMPLATE) -> Tokenizer:
    """With the markers of tools and reasoning. None: without a chat template."""
    plain = answers.tokenizer()
    if template is None:  # nor with tokens that mark turns, for which there is one
        return Tokenizer(tokenizers.Tokenizer.from_str(plain._full.to_str().replace("<｜User｜>", "<other>")))
    with tempfile.TemporaryDirectory() as folder:
        plain.save(folder)
        (Path(folder) / "chat_template.jinja").write_text(template, encoding="utf-8")
        return Tokenizer.load(folder)


def save_checkpoint(path: Path, template: str | None = TEMPLATE, seed: int = 0) -> Path:
    """Random weights in float32. The logit of eos is 0 always: a greedy answer never ends by itself."""
    params, bias = weights(CFG, seed)
    params["head"]["w_head_dv"][:, EOS] = 0
    hf.save(path, CFG, params, bias, format="f32", tokenizer=tokenizer(template))
    return path


def command(checkpoint: Path, **options: object) -> list[str]:
    given = {"checkpoint": checkpoint, "served_model_name": MODEL, "port": "{port}", **options}
    return [
        sys.executable,
        "-m",
        "experiments.serve",
        *(f"--{name}={value}" for name, value in given.items()),
    ]


@contextlib.contextmanager
def running(template: str | None = TEMPLATE, **options: object) -> Iterator[tuple[Server, Path]]:
    """A server over a new tiny checkpoint, with `options` of experiments.serve; its log is shown where it ends badly."""
    end_servers_at_sigterm()
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = save_checkpoint(Path(folder) / "checkpoint", template)
        server = Server(
            command(checkpoint, **options), Path(folder) / "log", {"JAX_PLATFORMS": "cpu"}, ready="/readyz"
        )
        with server:
            try:
                yield server, checkpoint
            except BaseException:
                print(server.log.read_text()[-4000:], file=sys.stderr)
                raise


def quiet(server: Server, seconds: float = 20) -> dict[str, float]:
    """Metrics once nothing runs or waits and no page is held. Raises AssertionError where that does not come about."""
    end = time.monotonic() + seconds
    while True:
        now = server.metrics()
        left = {
            name: now[f"vllm:{name}"]
            for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
        }
        if not any(left.values()):
            return now
        assert time.monotonic() < end, f"left behind after {seconds} s: {left}"
        time.sleep(0.05)
