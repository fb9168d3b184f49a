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
    return (_train if spec["kind"] == "train" else _decode)(cfg, spec)


def _train(cfg: Any, spec: Mapping[str, Any]) -> Callable[[], float]:
    from experiments.devices import devices_of_run

    devices_of_run(cfg, at_most=spec["threads"])
    import jax
    import numpy as np

    from deepseek_jax.parallel.mesh import batch_sharding, make_mesh
    from deepseek_jax.training.schedules import Schedules
    from deepseek_jax.training.step import init_state, make_train_step

    mesh = make_mesh(cfg.mesh)
    shape = (cfg.train.batch_size, cfg.data.seq_len + 1)
    tokens = np.random.default_rng(0).integers(0, cfg.model.vocab_size, shape, np.int32)
    batch = {"tokens": jax.device_put(tokens, batch_sharding(mesh))}
    schedules = Schedules.of_steps(cfg.optimizer, cfg.train, cfg.data.seq_len)
    step, state, taken = make_train_step(cfg, mesh), init_state(cfg, mesh), 0

    def run(steps: int) -> float:
        nonlocal state, taken
        began = time.perf_counter()
        for _ in range(steps):
            state, metrics = step(state, batch, schedules.hyper(taken, taken * batch["tokens"].size))
            taken += 1
        jax.block_until_ready((state, metrics))
        return (time.perf_counter() - began) / steps

    run(2)
    return lambda: run(spec["steps"])


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
