"""The FP8 study's tables and picture, on made-up results; its runs are those of `experiments.train`."""

import matplotlib.image
import numpy as np
import pytest

from deepseek_jax.config import PRECISIONS
from deepseek_jax.precision.errors import GEMMS, Errors
from experiments import fp8_report
from experiments.fp8_report import OTHER_SEED


def test_smoothing_has_no_memory_of_a_start_at_zero():
    np.testing.assert_allclose(fp8_report.smoothed(np.full(30, 5.0)), 5.0)
    assert fp8_report.smoothed(np.array([1.0, 0.0]))[1] == pytest.approx(0.9 / 1.9)


def test_tables_and_picture(tmp_path, capsys):
    loss = {name: np.linspace(6, 4, 20) * (1 + i / 100) for i, name in enumerate((*PRECISIONS, OTHER_SEED))}
    table = {"data": {preset: {g: Errors(0.02, 3e-4, 5e-6, 7e-6) for g in GEMMS} for preset in PRECISIONS}}
    sums = {"positive, promoted": [1e-4] * len(fp8_report.DEPTHS)}
    same = dict.fromkeys(PRECISIONS[1:], (0.0001, 0.04))
    fp8_report.print_tables(table, sums, loss, same, {name: values[-1] for name, values in loss.items()})
    printed = capsys.readouterr().out
    assert "| bf16 | 2.00 / 2.00 / 2.00 |" in printed and "| bf16 | 3.0e-04; 5, 7 |" in printed
    assert (
        "| deepseek_fp8 | +1.00 | 1.00 | +1.00 |" in printed and "| deepseek_fp8 | +0.010 | 4.0 |" in printed
    )
    fp8_report.draw(table, sums, loss, tmp_path / "study.png", "made up")
    assert matplotlib.image.imread(tmp_path / "study.png").shape[2] == 4
