"""The FP8 study's tables and picture, on made-up results; its runs are those of `experiments.train`."""

import matplotlib.image
import numpy as np
import pytest

from deepseek_jax.config import PRECISIONS
from experiments.study import fp8_measure, fp8_report
from experiments.study.errors import GEMMS, Errors
from experiments.study.fp8_measure import Curves, Mean, SameWeights


def test_standard_error_of_a_mean():
    assert fp8_measure.mean([1.0, 3.0]) == (2.0, pytest.approx(1.0))


def _curves(factor: float) -> Curves:
    """Two seeds, the second 2% above the first."""
    loss = np.linspace(6, 4, 20) * factor * np.array([[1.0], [1.02]])
    return Curves(loss, loss[:, -1])


def test_the_noise_is_the_distance_of_bf16_seeds():
    np.testing.assert_allclose(fp8_measure.noise({"bf16": _curves(1.0)}), np.full((1, 20), 2.0))


def test_tables_and_picture(tmp_path, capsys):
    curves = {preset: _curves(1 + i / 100) for i, preset in enumerate(PRECISIONS)}
    table = {"data": {preset: {g: Errors(0.02, 3e-4, 5e-6, 7e-6) for g in GEMMS} for preset in PRECISIONS}}
    sums = {"positive, promoted": [1e-4] * len(fp8_report.DEPTHS)}
    same = dict.fromkeys(PRECISIONS[1:], SameWeights(Mean(0.01, 0.002), 4.0))
    fp8_report.print_gemm_errors(table)
    fp8_report.print_accumulation(sums)
    fp8_report.print_training(curves)
    fp8_report.print_same_weights(same)
    printed = capsys.readouterr().out
    assert "| bf16 | 2.00 / 2.00 / 2.00 |" in printed and "| bf16 | 3.0e-04; 5, 7 |" in printed
    assert "| deepseek_fp8 | +1.00 ± 0.00 | +1.00 ± 0.00 | +1.00 ± 0.00 |" in printed
    assert "| two bf16 seeds, mean distance | 2.00 | 2.00 | 2.00 |" in printed
    assert "| deepseek_fp8 | +0.0100 ± 0.0020 | 4.0 |" in printed
    fp8_report.draw(table, sums, curves, same, tmp_path / "study.png", "made up")
    assert matplotlib.image.imread(tmp_path / "study.png").shape[2] == 4
