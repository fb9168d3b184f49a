"""Worker of `experiments.bench`: this project. Imports no torch.

Training runs the project's own step on the devices that `experiments.train` would use; decoding runs
`Model.generate` as `experiments.generate` does.
"""

import functools
import itertools
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.bench_worker import Measure, serve
from experiments.serving_load import Wanted, closed_loop


def start() -> dict[str, str]:
    import platform
    from importlib.metadata import version

    return {"python": platform.python_version(), "jax": version("jax")}


def setup(spec: Mapping[str, Any]) -> Measure:
    from deepseek_jax.config import Config, build

    if spec["kind"] == "peak":
        return peak(spec["size"], spec["products"])
    if spec["kind"] == "engine":
        return _loop(spec)
    cfg = build(Config, spec["config"])
    return {"train": _train, "decode": _decode, "sft": _sft}[spec["kind"]](cfg, spec)


def _train(cfg: Any, spec: Mapping[str, Any]) -> Callable[[], float]:
    from experiments.devices import devices_of_run

    devices_of_run(cfg, at_most=spec["threads"])
    import numpy as np

    shape = (cfg.train.batch_size, cfg.data.seq_len + 1)
    tokens = np.random.default_rng(0).integers(0, cfg.model.vocab_size, shape, np.int32)
    run = _steps(cfg, lambda: {"tokens": tokens})
    run(2)
    return lambda: run(spec["steps"]) / spec["steps"]


def _sft(cfg: Any, spec: Mapping[str, Any]) -> Callable[[], float]:
    """Packed conversations; seconds are per token that is no padding."""
    from experiments.devices import devices_of_run

    devices_of_run(cfg, at_most=spec["threads"])
    import numpy as np

    from deepseek_jax.data.best_fit import SamplePacker
    from deepseek_jax.data.loader import BatchStream
    from deepseek_jax.data.report import CorpusReport
    from deepseek_jax.data.sample_cache import Samples

    ids = [np.array(row["input_ids"], np.int32) for row in spec["samples"]]
    learned = [np.array(row["labels"]) >= 0 for row in spec["samples"]]
    number, starts = len(ids), np.cumsum([0, *map(len, ids)])
    samples = Samples(
        np.concatenate(ids),
        np.concatenate(learned),
        starts,
        np.array([x.sum() for x in learned]),
        np.zeros((number, 2), np.int64),
        np.zeros(number),
        ("random",),
        "",
        CorpusReport(),
    )
    stream = BatchStream([SamplePacker(samples, np.arange(number), cfg.data.seq_len, 0)], [1.0], {})
    taken = 0

    def take() -> Mapping[str, Any]:
        nonlocal taken
        batch = stream.take(cfg.train.batch_size)
        taken += int((~batch["padding"]).sum())
        return batch

    run = _steps(cfg, take)
    run(2)

    def measure() -> float:
        before = taken
        seconds = run(spec["steps"])
        return seconds / (taken - before)

    return measure


def _steps(cfg: Any, take: Callable[[], Mapping[str, Any]]) -> Callable[[int], float]:
    """Seconds of so many training steps, on batches that `take` gives."""
    import jax

    from deepseek_jax.parallel.mesh import make_mesh
    from deepseek_jax.training.feeding import Feed
    from deepseek_jax.training.schedules import Schedules
    from deepseek_jax.training.step import init_state, make_train_step

    mesh = make_mesh(cfg.mesh)
    schedules = Schedules.of_steps(cfg.optimizer, cfg.train, cfg.data.seq_len)
    step, state, taken, feed = make_train_step(cfg, mesh), init_state(cfg, mesh), 0, Feed(mesh)
    tokens = cfg.train.batch_size * cfg.data.seq_len

    def run(steps: int) -> float:
        nonlocal state, taken
        began = time.perf_counter()
        for _ in range(steps):
            state, metrics = step(state, feed.put(take()), schedules.hyper(taken, taken * tokens))
            taken += 1
        jax.block_until_ready((state, metrics))
        return time.perf_counter() - began

    return run


def peak(size: int, products: int) -> Measure:
    """A float32 matrix product on all devices at once."""
    import jax
    import jax.numpy as jnp

    operands = [jax.device_put(jnp.ones((size, size)), device) for device in jax.devices()]
    multiply = jax.jit(lambda a: a @ a)

    def run() -> float:
        began = time.perf_counter()
        jax.block_until_ready([multiply(a) for _ in range(products) for a in operands])
        return (time.perf_counter() - began) / (products * len(operands))

    run()
    return run


def _decode(cfg: Any, spec: Mapping[str, Any]) -> Callable[[], float]:
    import jax
    import numpy as np

    from deepseek_jax.inference.model import Model
    from deepseek_jax.parallel.mesh import make_mesh
    from deepseek_jax.training.step import init_state

    state = init_state(cfg, make_mesh(cfg.mesh, jax.devices()[:1]))
    shape = (spec["batch"], spec["prompt"])
    prompts = np.random.default_rng(0).integers(0, cfg.model.vocab_size, shape).tolist()
    model = Model(cfg.model, state.params, state.balance_bias)

    def run() -> float:
        began = time.perf_counter()
        out = model.generate(prompts, spec["new"])
        seconds = time.perf_counter() - began
        assert [len(row) for row in out] == [spec["new"]] * spec["batch"]
        return seconds

    run()
    return run


@functools.cache
def _engine(checkpoint: str, longest: int, rows: int) -> Any:
    import deepseek_jax
    from deepseek_jax.serving.build import build
    from deepseek_jax.serving.options import Options

    return build(deepseek_jax.load(checkpoint), Options(rows=rows, max_model_len=longest))


def _loop(spec: Mapping[str, Any]) -> Callable[[], float]:
    """A closed loop over the spec's trace; a round leaves its answers in the file `out`. No round finds prompts of another in
    the prefix cache."""
    from deepseek_jax.serving.request import Request

    engine = _engine(spec["checkpoint"], spec["longest"], spec["rows"])
    wanted = [Wanted(*request) for request in spec["trace"]]
    rounds = itertools.count()

    def step() -> Iterator[tuple[int, Sequence[int]]]:
        for update in engine.step():
            yield int(update.id), [token.id for token in update.tokens]

    def run(asked: Sequence[Wanted]) -> float:
        salt = f"{spec['out']} {next(rounds)}"

        def submit(i: int, request: Wanted) -> None:
            engine.submit(Request(str(i), request.prompt, request.max_tokens, salt=salt))

        answers, seconds = closed_loop(asked, spec["limit"], submit, step)
        Path(spec["out"]).write_text(json.dumps(answers))
        return seconds

    run([request._replace(max_tokens=8) for request in wanted])
    return lambda: run(wanted)


if __name__ == "__main__":
    serve(start, setup)
