"""What an engine does with loads and plans, over devices that only write down what they are asked; `test_over_mesh.py` moves weights.

Dims: l layer, e expert, p slot.
"""

import time
from types import SimpleNamespace

import numpy as np
import pytest

from deepseek_jax.balancing import loads
from deepseek_jax.balancing.eplb import even
from deepseek_jax.balancing.plan import Unit, loads_of_gpus
from deepseek_jax.model.platform import as_on_gpus
from deepseek_jax.serving.build import cold
from deepseek_jax.serving.engine import Engine
from deepseek_jax.serving.experts import Experts
from deepseek_jax.serving.options import Options
from deepseek_jax.serving.server.admission import Admission
from deepseek_jax.serving.server.instruments import Instruments
from tests.serving.tiny_engine import model

LAYERS, EXPERTS, UNIT = 3, 8, Unit(12, 1, 1, 4)
ZIPF_LE = np.tile(1000 // np.arange(1, EXPERTS + 1), (LAYERS, 1))


class Counts:
    """Loads on their way to the host: there at the second look."""

    def __init__(self, count_le):
        self.count_le, self.looks = count_le, 0

    def is_ready(self):
        self.looks += 1
        return self.looks > 1

    def __array__(self, dtype=None, copy=None):
        assert self.looks > 1, "the host waits"
        return self.count_le


class Devices:
    """Moves what it is told to, and counts the same in each step."""

    def __init__(self):
        self.cfg = SimpleNamespace(n_routed_experts=EXPERTS)
        self.slots = SimpleNamespace(unit=UNIT, plan=even(LAYERS, EXPERTS, UNIT), shared_routed=False)
        self.moved: list[int] = []
        self.waited = 0

    def loads(self):
        return Counts(ZIPF_LE)

    def wait(self):
        self.waited = len(self.moved)

    def move(self, layer, physical_p):
        self.moved.append(layer)
        self.slots.plan.physical_lp[layer] = physical_p


def until_planned(made):
    """The planner has its own thread."""
    end = time.monotonic() + 10
    while not made.left:
        assert time.monotonic() < end, made.planner.report()
        made.turn()
        time.sleep(0.001)


def fullest(devices):
    load_lg = loads_of_gpus(devices.slots.plan, ZIPF_LE, UNIT.gpus)
    return (load_lg.max(1) / load_lg.mean(1)).max()


def test_a_plan_is_moved_to_layer_by_layer():
    devices = Devices()
    made = Experts(devices, Options(redundant=4, replan=5))
    assert not devices.moved and fullest(devices) > 1.5
    until_planned(made)
    assert not devices.moved, "a plan that is taken moves nothing yet"
    for layer in range(LAYERS):
        made.turn()
        assert devices.moved == list(range(layer + 1))
    assert (made.moves, made.left, devices.waited) == (LAYERS, 0, 0) and fullest(devices) < 1.2
    report = made.planner.report()
    assert report.taken == 1 and not report.failures
    instruments = Instruments("tiny", Admission(1, 1))
    assert "expert" not in instruments.text()
    instruments.engine = SimpleNamespace(experts=made, schedulers=[], stats=None)
    shown = "\n".join(line for read in instruments._of_experts() for line in read.lines(()))
    assert (
        "deepseek_jax:expert_layers_moved_total{} 3" in shown
        and "deepseek_jax:expert_plans_total{} 1" in shown
    )


def test_a_planner_that_fails_stops_no_turn():
    devices = Devices()
    made = Experts(devices, Options(redundant=4, replan=1))

    def broken(*args):
        raise RuntimeError("no plan")

    made.planner._look = broken
    end = time.monotonic() + 10
    while made.planner.report().failures < 2:
        assert time.monotonic() < end
        made.turn()
        time.sleep(0.001)
    assert not devices.moved and "no plan" in made.planner.report().error


def test_loads_outlast_the_engine(tmp_path):
    """Those of one are the plan's that the next begins with."""
    path = tmp_path / "loads.json"
    options = Options(redundant=4, replan=5, expert_loads=str(path))
    devices = Devices()
    made = Experts(devices, options)
    until_planned(made)
    made.close()
    np.testing.assert_array_equal(
        np.argsort(-loads.read(path, LAYERS, EXPERTS)[0], kind="stable"), np.arange(EXPERTS)
    )
    again = Devices()
    assert Experts(again, options).moves == len(again.moved) == LAYERS and fullest(again) < 1.2
    path.write_text("{}")
    with pytest.raises(ValueError, match=r"loads.json: format"):
        Experts(Devices(), options)
    for where in (tmp_path / "none" / "loads.json", tmp_path):
        with pytest.raises(ValueError, match="no file can be written there; name one in a folder that is"):
            Experts(Devices(), Options(redundant=4, expert_loads=str(where)))


def test_devices_are_closed_whatever_becomes_of_the_loads(tmp_path):
    """Of several processes, the others wait for that."""
    folder, closed = tmp_path / "folder", []
    folder.mkdir()
    made = Engine(cold(model(), Options(rows=1)), Options(rows=1))
    made.experts = Experts(Devices(), Options(redundant=4, expert_loads=str(folder / "loads.json")))
    made.device.close = lambda: closed.append(True)
    folder.rmdir()
    with pytest.raises(FileNotFoundError):
        made.close()
    assert closed


def test_pages_leave_room_for_what_is_to_come():
    """A GPU's: 0.8 of what is free once experts lie in slots, not of what is free before."""
    gpu = SimpleNamespace(memory_stats=lambda: {"bytes_limit": 10 << 20, "bytes_in_use": 2 << 20})
    cfg, options = model().config, Options(rows=1 << 20, max_model_len=128)
    page = cfg.num_hidden_layers * 64 * (cfg.kv_lora_rank + cfg.qk_rope_head_dim) * 4
    for beside in (0, 5 << 20):
        want = int(0.8 * ((8 << 20) - beside)) // page
        with as_on_gpus():
            assert options.pages_for(cfg, cfg.num_hidden_layers, beside, gpu) == want
    with as_on_gpus(), pytest.raises(ValueError, match="memory has room for 0"):
        options.pages_for(cfg, cfg.num_hidden_layers, 9 << 20, gpu)


@pytest.mark.parametrize(
    "options, says",
    [
        ({"redundant": -1}, "redundant=-1 must be an integer >= 0"),
        ({"replan": 0}, "replan=0 must be an integer >= 1"),
        ({"redundant": 1, "replan_below": 0.0}, r"replan_below=0.0 must be a number in \(0, 1\]"),
        ({"invariant": True, "redundant": 0}, "invariant=True with redundant=0: which copy"),
        ({"invariant": True, "overlap": 4}, "invariant=True with overlap=4: halves"),
        ({"expert_loads": "x"}, "expert_loads='x' is for experts that move: give redundant"),
    ],
)
def test_options_that_cannot_be(options, says):
    with pytest.raises(ValueError, match=says):
        Options(**options)


def test_a_plan_is_moved_to_without_requests():
    """What an engine began to move, it ends; a turn, a layer."""
    options, devices = Options(rows=1, redundant=4, replan=5), Devices()
    made = Engine(cold(model(), Options(rows=1)), Options(rows=1))
    made.experts = Experts(devices, options)
    until_planned(made.experts)
    turns = 0
    while made.has_work:
        assert made.step() == []
        turns += 1
        assert len(devices.moved) == devices.waited == turns
    assert turns == LAYERS and made.stats.steps == 0


def test_redundant_experts_need_a_mesh():
    with pytest.raises(ValueError, match="redundant=2: experts are spread over the devices of a mesh"):
        cold(model(), Options(redundant=2, rows=1))
