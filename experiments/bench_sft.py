"""Fine-tuning beside TRL's `SFTTrainer`: same dimensions, same samples, tokens that are no padding per second.

    python -m experiments.bench sft

Samples are random ids of lengths as conversations have them, many short and few long, half of each a prompt. Ours packs them
into windows of data.seq_len by best fit. TRL runs both ways that it has, each with about as many tokens a step: samples padded to the
longest of a batch, which is its default, and packed (`packing=True`), whose windows it joins to one sequence; the faster one counts.
"""

import argparse
import functools
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from deepseek_jax.config import Config, to_dict
from experiments.bench_worker import Round, Worker

_SAMPLES, _MEDIAN, _SPREAD = 2000, 60, 0.7  # lengths are log-normal
OURS, PADDED, PACKED = "deepseek_jax", "TRL, padded", "TRL, packed"


def samples(cfg: Config) -> list[dict[str, list[int]]]:
    """The same for both sides, as TRL reads ids and labels."""
    rng = np.random.default_rng(0)
    longest = cfg.data.seq_len
    lengths = np.clip(np.exp(rng.normal(np.log(_MEDIAN), _SPREAD, _SAMPLES)), 8, longest).astype(int)
    found = []
    for length in lengths.tolist():
        ids = rng.integers(1, cfg.model.vocab_size, length).tolist()
        prompt = length // 2
        found.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return found


def run(args: argparse.Namespace, cfg: Config, alternate: Callable[..., Any]) -> int:
    """Measures and prints. alternate: as `experiments.bench` has it. Raises ValueError where TRL is missing."""
    peer = Worker("experiments.bench_trl", args.peer_python, {"OMP_WAIT_POLICY": "PASSIVE"})
    if peer.missing is not None:
        peer.close()
        raise ValueError(f"no comparison: {args.peer_python}: {peer.missing}; pip install -e '.[test]'")
    ours = Worker("experiments.bench_ours", environment={"JAX_PLATFORMS": "cpu"})
    rows, batch, length = samples(cfg), cfg.train.batch_size, cfg.data.seq_len
    mean = sum(len(row["input_ids"]) for row in rows) / len(rows)
    spec = {
        "threads": args.threads,
        "steps": args.steps,
        "config": to_dict(cfg),
        "samples": rows,
        "hf_config": cfg.model.to_hf(),
    }
    of_trl: Mapping[str, Any] = {PADDED: (False, round(batch * length / mean)), PACKED: (True, batch)}
    try:
        ours.setup("sft", kind="sft", **spec)
        tasks = [(OURS, functools.partial(ours.measure, "sft"))]
        for name, (packing, size) in of_trl.items():
            peer.setup(name, kind="sft", packing=packing, batch=size, **spec)
            tasks.append((name, functools.partial(peer.measure, name)))
        measured: dict[str, list[Round]] = alternate(tasks, args.rounds)
    finally:
        ours.close()
        peer.close()
    print(f"sft, steps of about {batch * length} tokens, {cfg.model.dtype}, {args.threads} threads")
    print(report(measured))
    return 0


def report(measured: Mapping[str, Sequence[Round]]) -> str:
    """Tokens per second of each side, and ours over the faster of TRL's two. Rounds are of one token."""
    medians = {name: statistics.median(r.seconds for r in rounds) for name, rounds in measured.items()}
    lines = []
    for name, rounds in measured.items():
        seconds = [r.seconds for r in rounds]
        cpu = statistics.median(r.cpu for r in rounds)
        lines.append(
            f"  {name:<14}{1 / medians[name]:>10,.0f} tokens/s   ({1 / max(seconds):,.0f} to {1 / min(seconds):,.0f}; "
            f"{cpu * 1e6:,.0f} CPU us per token)"
        )
    fastest = min((PADDED, PACKED), key=lambda name: medians[name])
    single = [p.seconds / o.seconds for p, o in zip(measured[fastest], measured[OURS], strict=True)]
    ratio = medians[fastest] / medians[OURS]
    return "\n".join(
        [*lines, f"  ratio to {fastest} {ratio:.2f}x   (rounds {min(single):.2f} to {max(single):.2f})"]
    )
