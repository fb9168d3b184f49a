"""The engine over a mesh of eight devices: the tokens of one. The long forms are `mesh_traces.py` and `expert_moves.py`."""

import dataclasses

from tests.serving import routed
from tests.serving.expert_moves import REDUNDANT, run_moving
from tests.serving.mesh_engine import CFG, alone, engine, model, tight


def test_greedy_tokens_are_those_of_one_device_while_experts_move():
    """More requests than slots and pages, prompts in chunks that begin alike, on devices that share heads and experts; in every
    turn a layer's experts go anywhere, copies among them. Each token that is computed counts once for each of its experts."""
    requests, made = tight(), engine("heads", redundant=REDUNDANT)
    out, loads_le = run_moving(made, requests, 12)
    assert out == alone(requests)
    assert made.stats.preemptions and made.stats.cache_hits
    for scheduler in made.schedulers:
        pool = scheduler.pool
        assert (pool.held, pool.free + pool.cached) == (0, pool.pages)
    tokens, again = divmod(int(loads_le[0].sum()), CFG.num_experts_per_tok)
    new = sum(len(r.prompt) - 1 + len(out[r.id]) for r in requests) - made.stats.cache_hits
    assert new <= tokens < 2 * new and not again and not loads_le[1].any()
    # The experts of every token, on whichever device, by the model's numbers, wherever they lie.
    params, bias = model()
    hits = made.stats.cache_hits
    asking = [dataclasses.replace(r, id=f"r{r.id}", max_tokens=3, routes=True) for r in requests]
    routed.assert_same(routed.run(made, asking), params, CFG, bias)
    assert made.stats.cache_hits > hits
