"""The model on the device at hand: `python -m experiments.bench gpu`, which `pallas_kernels.bench --all` starts.

Trains configs/tiny.py and configs/small_1b.py for some steps on one batch, in BF16 and in FP8, and decodes. Losses of
tiny.py stand beside those of the same steps on CPU, in processes of their own. A line is printed as soon as it is known;
after --seconds nothing is begun. Without a GPU: tiny.py alone, for a few steps.
"""

import dataclasses
import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deepseek_jax.config import Config, from_config_dict
from pallas_kernels.testing.gpu_lock import exclusive

PRECISIONS = {"BF16": "bf16", "FP8": "deepseek_fp8"}
ON_CPU = "tiny"  # the config whose losses a CPU gives in time
SHOWN = 8  # kernels of a profile
PROMPT, NEW, BATCHES = 128, 128, (1, 8)
STEPS, CPU_STEPS = 12, 3
# No product is tried out while others use the device, nor waited for.
QUICKLY = "--xla_gpu_autotune_level=0"


@dataclasses.dataclass(frozen=True)
class Trained:
    """shares: of a step's kernel time, by kernel."""

    losses: list[float]
    compile_s: float
    step_s: float
    shares: dict[str, float]


def config(name: str, precision: str) -> Config:
    """A run of few sequences in BF16, with the precision; of a larger config as much as one GPU takes at once."""
    cfg = importlib.import_module(f"configs.{name}").get_config()
    cfg.precision, cfg.model.dtype = precision, "bfloat16"
    cfg.train.batch_size, cfg.train.grad_accumulation = min(cfg.train.batch_size, 8), 1
    return from_config_dict(cfg)


def train(cfg: Config, steps: int, profiled: bool = True) -> Trained:
    """Steps on one batch, the last two in a profile. Compiles while others use the GPU, runs alone."""
    import jax
    import numpy as np

    from deepseek_jax.parallel.mesh import batch_sharding, make_mesh
    from deepseek_jax.training.step import abstract_state, init_state, make_train_step
    from experiments.study.kernel_shares import shares

    mesh = make_mesh(cfg.mesh, jax.devices()[:1])
    shape = (cfg.train.batch_size, cfg.data.seq_len + 1)
    tokens = np.random.default_rng(0).integers(0, cfg.model.vocab_size, shape, np.int32)
    hyper = _hyper(cfg)
    batch = {"tokens": jax.ShapeDtypeStruct(shape, np.int32, sharding=batch_sharding(mesh))}
    began = time.perf_counter()
    jitted: Any = make_train_step(cfg, mesh)
    step: Any = jitted.lower(abstract_state(cfg, mesh), batch, hyper).compile()
    compile_s = time.perf_counter() - began
    losses, times, found = [], [], {}
    with exclusive(), tempfile.TemporaryDirectory() as folder:
        state, batch = init_state(cfg, mesh), jax.device_put({"tokens": tokens}, batch_sharding(mesh))
        for i in range(steps):
            if profiled and i == max(0, steps - 2):
                jax.profiler.start_trace(folder)
            began = time.perf_counter()
            state, metrics = step(state, batch, hyper)
            losses.append(float(metrics.objective["loss"]))
            times.append(time.perf_counter() - began)
        if profiled:
            jax.profiler.stop_trace()
            found = shares(Path(folder), step.as_text())
    return Trained(losses, compile_s, statistics.median(times[1:-2] or times), found)


def _hyper(cfg: Config) -> Any:
    import numpy as np

    from deepseek_jax.training.state import Hyper

    values: Any = (np.float32(cfg.optimizer.peak_lr), np.float32(cfg.optimizer.gamma), np.float32(0.3))
    return Hyper(*values)


def decode(cfg: Config, batch: int) -> float:
    """Tokens per second of greedy generation from random weights, prefill included."""
    from deepseek_jax.config import to_dict
    from experiments.bench_ours import setup

    spec = {"kind": "decode", "config": to_dict(cfg), "batch": batch, "prompt": PROMPT, "new": NEW}
    measure = setup(spec)  # compiles, and generates once
    with exclusive():
        return batch * NEW / measure()


# --- the losses of a CPU ------------------------------------------------------------------------------------------


def on_cpu(name: str, precision: str, steps: int) -> subprocess.Popen[str]:
    """A process that trains the same steps on CPU and prints its losses."""
    command = [sys.executable, "-m", "experiments.bench_gpu", name, precision, str(steps)]
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    environment["JAX_PLATFORMS"] = "cpu"
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def beside_cpu(label: str, ours: Sequence[float], process: subprocess.Popen[str], seconds: float) -> str:
    """How far losses are from the CPU's. The first is before any update: a rounding to BF16 of it is allowed."""
    try:
        out, _ = process.communicate(timeout=max(1.0, seconds))
        cpu = json.loads(out)
    except (subprocess.TimeoutExpired, json.JSONDecodeError):
        process.kill()
        process.communicate()
        return f"{label}: no losses of a CPU in time"
    if not ours:
        return f"{label}: nothing to compare with the CPU's losses"
    apart = [abs(a - b) for a, b in zip(ours, cpu, strict=True)]
    verdict = "agree" if apart[0] <= 2**-8 * cpu[0] else "DISAGREE"
    return (
        f"{label}: first losses {verdict}, {ours[0]:.4f} and {cpu[0]:.4f} on CPU; after {len(cpu)} steps {ours[-1]:.4f} "
        f"and {cpu[-1]:.4f}, at most {max(apart):.4f} apart"
    )


# --- the command --------------------------------------------------------------------------------------------------


def trained_line(label: str, cfg: Config, found: Trained) -> str:
    import jax

    from deepseek_jax.training.throughput import peak_flops

    rate = cfg.train.batch_size * cfg.data.seq_len / found.step_s
    peak = peak_flops(jax.devices()[0])
    mfu = "" if peak is None else f", {rate * cfg.model.flops_per_token(cfg.data.seq_len) / peak:.1%} MFU"
    kernels = [f"{kernel} {share:.0%}" for kernel, share in list(found.shares.items())[:SHOWN]]
    return (
        f"{label}: loss {found.losses[0]:.4f} to {found.losses[-1]:.4f}, compiled in {found.compile_s:.0f} s, "
        f"{found.step_s * 1e3:.1f} ms per step, {rate:,.0f} tokens/s{mfu}\n  of a step's time: {', '.join(kernels)}"
    )


def _cases(on_gpu: bool) -> list[tuple[str, str, str]]:
    """(what is done, name of a config, label of a precision), the most telling first."""
    cases = [("train", "tiny", label) for label in PRECISIONS] + [("decode", "tiny", "BF16")]
    more = [("train", "small_1b", label) for label in PRECISIONS] + [("decode", "small_1b", "BF16")]
    return cases + more if on_gpu else cases


def run(seconds: float) -> int:
    """Prints what is found; returns 1 if something failed or was left."""
    until = time.monotonic() + seconds
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {QUICKLY}".strip()
    import jax

    on_gpu, failed = jax.default_backend() == "gpu", 0
    steps = STEPS if on_gpu else CPU_STEPS
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}; one batch, nothing autotuned", flush=True)
    if not on_gpu:
        print("no GPU: a few steps on this CPU, whose speeds say nothing of a GPU's", flush=True)
    cpus = {label: on_cpu(ON_CPU, p, steps) for label, p in PRECISIONS.items() if on_gpu}
    losses: dict[str, list[float]] = {}
    for what, name, label in _cases(on_gpu):
        title = f"{name} {label}"
        if time.monotonic() > until:
            print(f"{title}: time is up, {what} is left", flush=True)
            failed += 1
            continue
        try:
            cfg = config(name, PRECISIONS[label])
            if what == "decode":
                for batch in BATCHES:
                    print(f"{title}: decode, batch {batch}: {decode(cfg, batch):,.0f} tokens/s", flush=True)
                continue
            found = train(cfg, steps)
            print(trained_line(title, cfg, found), flush=True)
            if name == ON_CPU:
                losses[label] = found.losses
        except Exception as error:  # whatever compiler or device raise is this case's result
            print(
                f"{title}: {what} failed: {type(error).__name__}: {error}"[:300].replace("\n", " "),
                flush=True,
            )
            failed += 1
    for label, process in cpus.items():
        print(
            beside_cpu(f"{ON_CPU} {label}", losses.get(label, []), process, until - time.monotonic()),
            flush=True,
        )
    return 1 if failed else 0


def main(argv: Sequence[str]) -> int:
    """CONFIG PRECISION STEPS: prints the losses, for `on_cpu`."""
    name, precision, steps = argv
    print(json.dumps(train(config(name, precision), int(steps), profiled=False).losses))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
