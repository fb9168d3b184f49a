"""The tiny run from beginning to end: golden curve, and what resumed runs are compared with."""

import io
from typing import Any, NamedTuple

import pytest

from deepseek_jax.config import Config
from tests.golden.run import golden_config, trainer


class GoldenRun(NamedTuple):
    cfg: Config
    result: Any
    ema: Any


@pytest.fixture(scope="session")
def golden_run(tmp_path_factory) -> GoldenRun:
    cfg = golden_config(tmp_path_factory.mktemp("golden"))
    run = trainer(cfg)
    result = run.run(progress_file=io.StringIO())
    ema = run.ema.state()
    run.close()
    return GoldenRun(cfg, result, ema)
