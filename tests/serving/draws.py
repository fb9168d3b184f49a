"""Draws of random combinations of all settings against their definition, by chi-square: the long form of `test_sampler.py`.

    python -m tests.serving.draws [COMBINATIONS] [DRAWS]

Each combination has a vocabulary of 16 ids and logits of its own, and is drawn by the program of GPUs (a whole batch) and by
that of CPUs (row by row). Prints the smallest of the p-values, and how they lie: of a right program, one in ten is below 0.1.
"""

import sys

import numpy as np

from deepseek_jax.serving.sampling import ALL
from tests.oracle import sampling as oracle
from tests.serving.sampled import V, any_case, draws


def main(combinations: int = 300, n: int = 20_000) -> int:
    rng, p_values = np.random.default_rng(7), []
    for i in range(combinations):
        one, logits = any_case(rng, V)._replace(num_ids=None), rng.normal(0, 2, V).astype(np.float32)
        want = oracle.distribution(logits, one)
        whole, by_row = (draws([one], logits, n, most)[0].token_b for most in (ALL, None))
        if (whole != by_row).any():
            print(
                f"combination {i}: {(whole != by_row).sum()} of {n} draws differ between the programs: {one}"
            )
            return 1
        p_values.append(oracle.p_value(np.bincount(whole, minlength=V), want))
        if p_values[-1] < 1e-6:
            print(f"combination {i}: p = {p_values[-1]:.1e}: {one}")
            return 1
    drawn = np.array([p for p in p_values if p < 1])  # 1 stands for those with one id alone
    tenths = np.histogram(drawn, bins=10, range=(0, 1))[0] / len(drawn)
    print(
        f"{combinations} combinations, {n} draws of each: smallest p {drawn.min():.1e}; shares of each tenth of the"
    )
    print(
        f"p-values {' '.join(f'{share:.2f}' for share in tenths)}; {combinations - len(drawn)} have one id alone"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
