"""Memory of the portable attention, forward and backward, at growing lengths.

    python -m experiments.study.attention_memory [--tokens 4096 8192 16384] [--heads 4]

Float32 on CPU, one sequence, queries and keys of 192, values of 128. Each length runs in a process of its own: bytes of
the compiled program's temporaries, and the largest resident set of the process, compiler included.
"""

import argparse
import resource
import subprocess
import sys
import time
from collections.abc import Sequence

K, V = 192, 128


def one(tokens: int, heads: int) -> None:
    """Prints a row of the table."""
    import jax
    import numpy as np

    from pallas_kernels.mla_attention.ops import mla_attention, mla_attention_backward

    @jax.jit
    def both(q, k, v, dout):
        out, lse = mla_attention(q, k, v, implementation="xla")
        return out, mla_attention_backward(q, k, v, None, out, lse, dout, implementation="xla")

    rng = np.random.default_rng(0)
    q, k, v, dout = (
        jax.device_put(rng.standard_normal((1, heads, tokens, n), np.float32)) for n in (K, K, V, V)
    )
    program = both.lower(q, k, v, dout).compile()
    analysis = program.memory_analysis()
    assert analysis is not None
    before, began = _peak(), time.process_time()
    jax.block_until_ready(program(q, k, v, dout))
    print(
        f"{tokens:>8}{analysis.temp_size_in_bytes / 2**20:>16.1f}{analysis.output_size_in_bytes / 2**20:>12.1f}"
        f"{before / 2**20:>14.0f}{_peak() / 2**20:>14.0f}{time.process_time() - began:>10.1f}",
        flush=True,
    )


def _peak() -> int:
    """Largest resident set so far, in bytes; Linux counts KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description="Memory of the portable attention on CPU.")
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 8192, 16384])
    parser.add_argument("--heads", type=int, default=4)
    args = parser.parse_args(argv)
    if len(args.tokens) == 1:
        return one(args.tokens[0], args.heads)
    print("MiB    tokens     temporaries     results   peak before   peak after     CPU s", flush=True)
    for tokens in args.tokens:
        command = [sys.executable, "-m", "experiments.study.attention_memory"]
        subprocess.run([*command, f"--tokens={tokens}", f"--heads={args.heads}"], check=True)


if __name__ == "__main__":
    main(sys.argv[1:])
