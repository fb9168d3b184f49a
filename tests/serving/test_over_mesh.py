"""The engine over a mesh of eight devices: the tokens of one."""

from tests.serving.mesh_engine import alone, engine, run, trace


def test_greedy_tokens_are_those_of_one_device():
    """More requests than slots and pages, prompts in chunks that begin alike, on devices that share heads and experts."""
    requests = trace(0, 40)
    made = engine("heads")
    assert run(made, requests) == alone(requests)
    assert made.stats.preemptions and made.stats.cache_hits
    for scheduler in made.schedulers:
        pool = scheduler.pool
        assert (pool.held, pool.free + pool.cached) == (0, pool.pages)
