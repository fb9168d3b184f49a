"""Schedules that the pipeline's tests go through: every kind, 2 to 16 ranks, from the fewest micro-batches on, queues."""

from deepseek_jax.parallel.pipeline.schedules import SCHEDULES, Schedule

RANKS = (2, 4, 8, 16)
KINDS = [(name, ranks) for name in SCHEDULES for ranks in RANKS]
HELD_BACK = ("zero_bubble", "dualpipe", "dualpipe_v")  # whose weight gradients wait


def schedules(name: str, ranks: int) -> list[Schedule]:
    """Of one kind."""
    more = 2 if name == "dualpipe" else 1
    many = [5 * ranks] if ranks <= 4 else []
    found = [SCHEDULES[name](ranks, micro) for micro in (2 * ranks, 2 * ranks + more, *many)]
    if name in HELD_BACK:
        found += [SCHEDULES[name](ranks, 2 * ranks + 2, queue) for queue in (0, 1, 2)]
    return found
