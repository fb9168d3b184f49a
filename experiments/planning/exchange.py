"""`python -m experiments.plan exchange`: the rows and bytes that an expert exchange sends between nodes.

Routes random tokens and counts what crosses between nodes, per token and MoE layer: with one row per selected expert, one
per device (flat), and one per node (two hops). Bytes: tokens dispatched in FP8 with their scales, results combined in
BF16.
"""

import argparse
import itertools
import re
from collections.abc import Sequence

import numpy as np

from deepseek_jax.config import ModelConfig
from experiments import command_line
from experiments.study.traffic import Rows, routing_bytes, row_bytes, sample_rows

KIB = 1024


def _mesh(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not NODESxLOCAL, such as 8x8")
    return int(match[1]), int(match[2])


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = command_line.Parser(
        prog="plan exchange",
        description="The rows and bytes that an expert exchange sends between nodes.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--mesh", type=_mesh, nargs="+", default=[(8, 8), (16, 8)], help="NODESxLOCAL, several"
    )
    parser.add_argument("--experts", type=int, default=256, help="routed experts")
    parser.add_argument("--topk", type=int, default=8, help="experts per token")
    parser.add_argument("--groups", type=int, default=0, help="expert groups; 0: one per node")
    parser.add_argument(
        "--topk_groups", type=int, nargs="+", default=[8, 4], help="groups per token, several"
    )
    parser.add_argument("--hidden", type=int, default=7168, help="channels of a token")
    parser.add_argument("--tokens", type=int, default=20_000, help="tokens to sample")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    for name, low in (("hidden", 1), ("tokens", 2), ("groups", 0)):
        if getattr(args, name) < low:
            parser.error(f"--{name}={getattr(args, name)} must be at least {low}")
    return args


def _line(name: str, rows: np.ndarray, hidden: int) -> str:
    mean, error = rows.mean(), rows.std() / len(rows) ** 0.5
    fp8, bf16 = (mean * row_bytes(hidden, form) / KIB for form in ("fp8", "bf16"))
    return f"  {name:<26}{mean:>7.2f} ±{error:.3f}{fp8:>12.1f}{bf16:>12.1f}"


def _report(title: str, rows: Rows, hidden: int) -> None:
    print(title)
    print(f"  {'':<26}{'rows/token':>14}{'FP8 KiB':>12}{'BF16 KiB':>12}")
    names = (
        "a row per expert",
        "a row per device (flat)",
        "a row per node (two hops)",
        "forwarded inside nodes",
    )
    for name, counts in zip(names, rows, strict=True):
        print(_line(name, counts, hidden))
    if rows.two_hop.any():
        less = [x.mean() / rows.two_hop.mean() for x in (rows.per_expert, rows.flat)]
        print(
            f"  two hops send {less[0]:.2f}x less between nodes than a row per expert, {less[1]:.2f}x less than flat"
        )
    print(flush=True)


def main(argv: Sequence[str]) -> int:
    args = _arguments(argv)
    for (nodes, local), kept in itertools.product(args.mesh, args.topk_groups):
        model = ModelConfig(
            n_routed_experts=args.experts,
            num_experts_per_tok=args.topk,
            n_group=args.groups or nodes,
            topk_group=kept,
        )
        rows = sample_rows(model, nodes, local, args.tokens, args.seed)
        title = f"{nodes} nodes x {local} devices, {args.experts} experts, {args.topk} per token"
        _report(f"{title}, from {kept} of {model.n_group} groups", rows, args.hidden)
    print(
        f"A row of {args.hidden} channels: {row_bytes(args.hidden, 'fp8'):,} bytes in FP8 with scales, "
        f"{row_bytes(args.hidden, 'bf16'):,} in BF16. With a dispatched row travel {routing_bytes(args.topk)} bytes "
        f"of routing weights; its expert ids, as many bytes, once per plan."
    )
    return 0
