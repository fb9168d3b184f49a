"""Computes on paper what a mesh and a model will cost, before any machine is asked.

    python -m experiments.plan cluster --out=day.png                 # a day of DeepSeek's serving cluster: `planning/cluster/`
    python -m experiments.plan exchange                              # DeepSeek-V3: rows and bytes between nodes
    python -m experiments.plan exchange --mesh 4x8 --topk_groups 2   # 4 nodes of 8 devices, tokens of 2 groups
    python -m experiments.plan memory --config=configs/v3_671b.py                       # bytes on each device
    python -m experiments.plan memory --config=configs/v2_lite_16b.py --devices=64
    python -m experiments.plan overlap                               # what is hidden: `planning/overlap.py`
    python -m experiments.plan waits                                 # for what a host waits: `planning/waits.py`
    python -m experiments.plan step --config=configs/v2_lite_16b.py --hardware=h100      # seconds, bytes, MFU, price
    python -m experiments.plan search --config=configs/v3_671b.py --devices=256 --hardware=h200     # the fastest that fit
    python -m experiments.plan serve --config=configs/serve_decode_ep144.py --hardware=h800     # a unit that serves
    python -m experiments.plan schedule --stages 8 --micro 20 --out dualpipe.png    # pipelines: `planning/schedule.py`

`exchange` routes random tokens and counts what crosses between nodes (`planning/exchange.py`).

`memory` adds up what training keeps of a config on each device of its mesh: master weights, moments, gradients and
the compute copy, of dense parameters and of experts; and the buffers of one exchange of tokens.

`step` predicts what a run needs and takes on H800, H100 or H200: memory part by part, bytes per link, seconds of phases and of a
step, MFU, tokens per day, price (`planning/step.py`); `search` ranks meshes by it (`planning/search.py`). `serve` does so of a unit
of devices that serves: requests that fit, seconds of a step, tokens per second (`planning/serve.py`).
"""

import argparse
from collections.abc import Sequence

from experiments import command_line
from experiments.planning import exchange, memory, overlap, schedule, search, serve, step, waits
from experiments.planning.cluster import command as cluster

PLANS = {
    "cluster": cluster.main,
    "exchange": exchange.main,
    "memory": memory.main,
    "overlap": overlap.main,
    "schedule": schedule.main,
    "search": search.main,
    "serve": serve.main,
    "step": step.main,
    "waits": waits.main,
}


def main(argv: Sequence[str]) -> int:
    parser = command_line.Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, usage="plan PLAN ..."
    )
    parser.add_argument("plan", choices=PLANS, help="--help after it tells its options")
    return PLANS[parser.parse_args(argv[:1]).plan](argv[1:])


if __name__ == "__main__":
    command_line.run(main)
