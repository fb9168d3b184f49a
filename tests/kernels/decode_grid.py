"""FlashMLA's grid of decoding tests in full, for reference and XLA path: some minutes, so not part of the tests.

python -m pytest tests/kernels/decode_grid.py
"""

import pytest
from test_kernels_mla_decode import check_grid


@pytest.mark.parametrize("b", [1, 2, 6, 64])
@pytest.mark.parametrize("t", [1, 2, 4])
@pytest.mark.parametrize("h", [1, 3, 9, 63, 64, 126, 128])
@pytest.mark.parametrize("kind", ["f32", "bf16", "fp8"])
def test_grid(b, t, h, kind):
    check_grid(b, t, h, kind)
