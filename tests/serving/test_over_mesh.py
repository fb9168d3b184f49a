"""The engine over a mesh of eight devices: the tokens of one. The long form is `mesh_traces.py`."""

from tests.serving.mesh_engine import alone, engine, run, tight


def test_greedy_tokens_are_those_of_one_device():
    """More requests than slots and pages, prompts in chunks that begin alike, on devices that share heads and experts."""
    requests, made = tight(), engine("heads")
    assert run(made, requests) == alone(requests)
    assert made.stats.preemptions and made.stats.cache_hits
    for scheduler in made.schedulers:
        pool = scheduler.pool
        assert (pool.held, pool.free + pool.cached) == (0, pool.pages)
