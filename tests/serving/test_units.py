"""The engine's programs over the devices of DeepSeek's units, traced at their real dimensions. The long form, which lowers those
of all units for GPUs, is `deployment.py`."""

from experiments.planning.serving_programs import traced
from tests.programs import equations
from tests.serving.deployment import unit


def test_decoding_with_one_expert_on_each_of_320_devices():
    """Report section 3.4.2. The shared expert is a ninth routed one: a token's message has a place at each of 40 nodes, 7,168 bytes
    of FP8 with 56 scales, and weights and ids of nine experts."""
    [made] = traced(unit("decode_ep320", cache="fp8"), 64).values()
    words = (7168 + 4 * 56 + 2 * 4 * 9) // 4
    sent = {e.invars[0].aval.shape for e in equations(made.jaxpr.jaxpr) if e.primitive.name == "all_to_all"}
    assert (40, 96, words) in sent
