"""Rows that GPUs receive under a Zipf load: DeepSeek-V3's 256 experts, 8 per token, over 32 GPUs.

    python -m tests.balancing.zipf

A token draws 8 different experts, of weights 1, 1/2, 1/3, ... that each layer deals out anew; with groups, from the best 4 of 8 as
the router chooses them, by the sum of their two best. Each device has tokens of its own and sends them where
`Placement.physical` says. Plans are made of the counts of other tokens than they are measured on.

Two numbers count: the rows of the experts' work, (token, expert), and those that travel, a token once to each GPU.

Dims: r rank, n token of a rank, k selected expert, e expert, g GPU.
"""

import time

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.balancing.eplb import planned
from deepseek_jax.balancing.moves import count, sources
from deepseek_jax.balancing.plan import Plan, Unit, identity
from deepseek_jax.balancing.planner import look
from deepseek_jax.parallel.exchange.placement import Placement

EXPERTS, CHOSEN, GROUPS, BEST_GROUPS = 256, 8, 8, 4
GLOBAL, HIERARCHICAL = Unit(288, 1, 1, 32), Unit(288, 8, 4, 32)


def routing(rng, weight_e, ranks, tokens, grouped=False):
    """Experts of each token [r, n, k]: the largest of log weight + Gumbel noise are draws without replacement."""
    score = np.log(weight_e, dtype=np.float32) + rng.gumbel(size=(ranks, tokens, EXPERTS)).astype(np.float32)
    if grouped:
        of_group = score.reshape(ranks, tokens, GROUPS, -1)
        two = np.partition(of_group, -2)[..., -2:].sum(-1)
        good = two >= np.partition(two, -BEST_GROUPS)[..., -BEST_GROUPS, None]
        score = np.where(good[..., None], of_group, -np.inf).reshape(score.shape)
    return np.argpartition(-score, CHOSEN - 1)[..., :CHOSEN].astype(np.int32)


def counts(experts_rnk):
    return np.bincount(experts_rnk.ravel(), minlength=EXPERTS)[None]


@jax.jit
def _sent(placement, experts_rnk):
    return jax.vmap(placement.physical)(experts_rnk, jnp.arange(len(experts_rnk)))


def sent(plan: Plan, experts_rnk, layer=0, most=33):
    """Slot of each pair, of a plan with at most as many copies of an expert; rank r begins with copy r."""
    placement = Placement(jnp.asarray(plan.copies(most)[layer]), jnp.asarray(plan.logcnt[layer]))
    return np.asarray(_sent(placement, experts_rnk))


def received(plan: Plan, experts_rnk, gpus=32):
    """Rows of each GPU: of work, and that travel [2, g]."""
    gpu_rnk = sent(plan, experts_rnk) // (plan.physical_lp.shape[1] // gpus)
    to_rng = (gpu_rnk[..., None] == np.arange(gpus)).sum(2)
    return np.stack([to_rng.sum((0, 1)), (to_rng > 0).sum((0, 1))])


def fullest(rows_g):
    """Rows of the fullest GPU over the mean."""
    return rows_g.max(-1) / rows_g.mean(-1)


def measured(seed, ranks, tokens, grouped, units, exponent=1.0):
    """Fullest over mean (work, travel) of the identity and of the plan for each unit."""
    rng = np.random.default_rng(seed)
    weight_e = rng.permutation(np.arange(1.0, EXPERTS + 1) ** -exponent)
    before, now = (routing(rng, weight_e, ranks, tokens, grouped) for _ in range(2))
    plans = [identity(1, EXPERTS), *(planned(counts(before), unit) for unit in units)]
    return np.stack([fullest(received(plan, now)) for plan in plans])


def spread():
    print("fullest GPU over mean: rows of work, rows that travel; mean and worst of 10 layers")
    for tokens in (1024, 128):
        for grouped in (False, True):
            of_layers = np.stack(
                [measured(s, 32, tokens, grouped, (GLOBAL, HIERARCHICAL)) for s in range(10)]
            )
            for name, layers in zip(
                ("identity", "global", "hierarchical"), of_layers.swapaxes(0, 1), strict=True
            ):
                of = f"{tokens} tokens a GPU, {'grouped' if grouped else 'free'} routing, {name}"
                print(f"{of:55} {layers.mean(0).round(3)} {layers.max(0).round(3)}")


def drift(layers=58):
    """What a second plan moves, when each expert's weight changed by a factor of e^0.1 (one standard deviation), or not at all and
    only other tokens came."""
    rng = np.random.default_rng(0)
    weight_le = rng.permuted(np.tile(1 / np.arange(1.0, EXPERTS + 1), (layers, 1)), axis=1)
    for factor in (0.0, 0.1):
        changed_le = weight_le * np.exp(factor * rng.normal(size=weight_le.shape))
        old_le, new_le = (
            np.concatenate([counts(routing(rng, weight_e, 32, 512)) for weight_e in of_layers])
            for of_layers in (weight_le, changed_le)
        )
        for unit in (HIERARCHICAL, Unit(288, 8, 18, 144), Unit(320, 8, 40, 320)):
            old, new = planned(old_le, unit), planned(new_le, unit)
            begun = time.process_time()
            found = look(new_le.astype(float), old, unit)
            seconds = time.process_time() - begun
            unnamed = count(sources(new, old, unit.gpus, unit.nodes), unit.gpus, unit.nodes)
            print(f"{unit}, weights changed by {factor}: {seconds:.3f} s")
            print(f"  as planned {unnamed}\n  renamed    {found.moves}")
            print(f"  balance {found.before:.3f} -> {found.after:.3f}")


if __name__ == "__main__":
    spread()
    drift()
