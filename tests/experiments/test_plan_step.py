"""What a run is predicted to need and take: against published figures, by hand, and as it has to change with its inputs."""

import dataclasses
import importlib
import math

import pytest

from deepseek_jax.config import from_config_dict
from experiments import plan
from experiments.command_line import status
from experiments.planning import footprint, links, measured, search, times, work
from experiments.planning.hardware import GIB, H100, H200, H800, Link
from experiments.planning.prediction import gpu_hours, predict
from experiments.planning.run import run_of
from experiments.study.memory import state_memory
from tests.tiny_run import tiny


def changed(cfg, precision=None, **sections):
    values = {name: dataclasses.replace(getattr(cfg, name), **keys) for name, keys in sections.items()}
    return dataclasses.replace(cfg, **values, **({"precision": precision} if precision else {}))


def shipped(name, **sections):
    return changed(from_config_dict(importlib.import_module(f"configs.{name}").get_config()), **sections)


V3 = shipped("v3_671b", mesh={"schedule": "dualpipe"}, train={"remat": "deepseek"})  # as it was measured
AS_MEASURED = ["--config.mesh.schedule=dualpipe", "--config.train.remat=deepseek"]


@pytest.fixture(scope="module")
def v3():
    return predict(run_of(V3, 2048, H800))


@pytest.fixture(scope="module")
def lite():
    return run_of(shipped("v2_lite_16b"), 8, H100)


# --- published figures ----------------------------------------------------------------------------------------------


def test_costs_close():
    """ISCA paper, table 4: 62,914,560 tokens in 19.926 s on 2,048 GPUs are 180,176 GPU-hours per trillion; 250.45 GFLOP per
    token, which it rounds to 250, then are 38.94% of the BF16 peak."""
    tokens = 15360 * 4096
    assert tokens == 62_914_560 and round(gpu_hours(19.926, tokens, 2048)) == 180_176
    flops = V3.model.flops_per_token(4096)
    assert round(flops / 1e9, 2) == 250.45
    assert flops * tokens / (19.926 * 2048 * 989e12) == pytest.approx(0.3894, rel=0.003)
    assert sum(measured.SECONDS.values()) == pytest.approx(19.90)


def test_what_follows_from_a_step(v3):
    assert v3.gpu_hours == pytest.approx(180_176 * v3.step / 19.926, rel=1e-5)
    assert v3.tokens_per_day == pytest.approx(272.80e9 * 19.926 / v3.step, rel=1e-4)
    assert v3.mfu == pytest.approx(0.3894 * 19.926 / v3.step, rel=0.003)


def test_rates_are_those_of_the_sources():
    """Of the profile: products and core over their milliseconds, and passes as all that is left of attention and MLP."""
    run = run_of(V3, 2048, H800)
    attention, mlp = work.attention(run, True), work.moe_mlp(run)
    linear = sum(w.flops for w in attention.forward if w.precision == "fp8")
    assert linear == pytest.approx(
        2 * 4096 * (187_107_328 - 1536 - 512)
    ) and linear / 1.67e-3 == pytest.approx(H800.linear["fp8"].fprop, rel=0.001)
    [core] = [w.flops for w in attention.forward if w.kind == "core.forward"]
    assert core / 1.24e-3 == pytest.approx(H800.core_forward, rel=0.005)
    assert 2.5 * core / 3.78e-3 == pytest.approx(H800.core_backward, rel=0.005)
    passes = sum(w.bytes for w in (*attention.forward, *mlp.forward) if w.kind == "pass")
    left = 4.36 - 1.67 - 1.24 + 4.60 - 2.90 - 0.40
    assert passes / (left / 1e3) == pytest.approx(H800.passes, rel=0.005)


def test_flops_of_the_phases_are_the_models():
    """Six per parameter, without what is computed again; routed rows without padding."""
    run = run_of(changed(V3, precision="bf16", train={"remat": "none"}), 2048, H800)
    attention, mlp = work.attention(run, True), work.moe_mlp(run)
    products = [w for passes in (attention, mlp) for part in passes for w in part if "core" not in w.kind]
    matmul = 187_107_328 - 1536 - 512 + 9 * 44_040_192 + 1_835_008
    assert sum(w.flops for w in products) == 6 * matmul * 4096


def test_a_pair_is_within_a_tenth_of_the_profile():
    run = run_of(V3, 2048, H800)
    assert 1e3 * measured.pair_seconds(run) == pytest.approx(129.0, rel=0.1)
    predicted = measured.predicted_phases(run)
    arithmetic = {name: ms for name, ms in measured.PHASES.items() if name.startswith(("attention", "MLP"))}
    for name, ms in arithmetic.items():
        assert predicted[name] == pytest.approx(ms, rel=0.15), name


def test_the_measured_step(v3):
    """Not fitted: the parts of table 4 add up to a step within a fifth of what was measured."""
    parts = measured.parts(v3)
    assert sum(p.measured for p in parts) == pytest.approx(19.90)
    assert sum(p.predicted for p in parts) == pytest.approx(19.926, rel=0.2)
    ops = {p.name: p.ops for p in parts}
    assert ops["F"] + ops["F&B"] == pytest.approx(120) == ops["B"] + ops["F&B"]


@pytest.mark.parametrize(
    "change", [{"mesh": {"data": 1}}, {"train": {"grad_accumulation": 60}}, {"data": {"seq_len": 2048}}]
)
def test_only_the_measured_run_is_beside_it(change):
    assert measured.applies(run_of(V3, 2048, H800)) and not measured.applies(run_of(V3, 2048, H100))
    run = run_of(changed(V3, **change), 1024 if "mesh" in change else 2048, H800)
    assert not measured.applies(run)


# --- parts and wholes -----------------------------------------------------------------------------------------------


def test_parts_add_up(v3):
    assert sum(v3.parts.values()) == pytest.approx(v3.step)
    assert sum(v3.memory.values()) == v3.bytes
    rank_seconds = sum(v3.ran.parts.values()) + v3.ran.bubble + v3.ran.waiting
    assert rank_seconds == pytest.approx(v3.ran.seconds)
    assert v3.ran.bubble > 0 and v3.ran.waiting >= 0


def test_state_is_twelve_bytes_per_parameter():
    """Master 4, moments 2 + 2, gradient 4, on one device; whatever divides over many is divided."""
    cfg = shipped(
        "v2_lite_16b", mesh={"local": 1, "zero": False, "overlap": False}, train={"grad_accumulation": 4608}
    )
    memory = predict(run_of(cfg, 1, H100)).memory
    n = 15_706_484_224
    assert memory["master weights"] + memory["moments"] == 8 * n
    assert memory["gradients"] == 8 * n  # of a micro-batch, and their sum
    # gate and up, joined in BF16: of 26 layers with 64 experts, and 2 shared ones, and of the dense layer
    assert memory["compute copy"] == 2 * 2 * 2048 * (26 * 66 * 1408 + 10944)


def test_what_parameters_take_is_that_of_the_state(v3):
    found = state_memory(V3, v3.run.mesh)
    for name, key in (("master weights", "master"), ("compute copy", "compute"), ("moments", "moments")):
        assert v3.memory[name] == sum(getattr(m, key) for m in found.values())
    counts = links.counts(v3.run)
    whole = counts.linear + counts.tables + counts.float32 + counts.experts + counts.norms
    assert 4 * whole == sum(m.accumulated for m in found.values())


def test_bytes_between_nodes_by_hand(v3):
    """3.48 rows per token cross, of 7,168 bytes, 56 scales, 8 weights and 8 ids; combined in BF16."""
    run = v3.run
    between, inside = links.rows_per_token(run)
    assert between == pytest.approx(3.48, abs=0.06) and inside == pytest.approx(6.55, abs=0.06)
    assert links.trip(run, "dispatch") == {
        "nic": pytest.approx(4096 * between * (7168 + 4 * 56 + 64)),
        "nvlink": pytest.approx(4096 * inside * (7168 + 4 * 56 + 64)),
    }
    assert links.trip(run, "combine", True)["nic"] == pytest.approx(4096 * between * 14336)
    assert links.hop(run) == {"nic": 4096 * 7168 * 2, "nvlink": 0}


def test_one_node_sends_nothing_outside(lite):
    assert links.trip(lite, "dispatch")["nic"] == 0 < links.trip(lite, "dispatch")["nvlink"]
    assert all(sent["nic"] == 0 for sent in links.of_step(lite).values())


def test_rows_of_a_flat_exchange():
    """8 nodes of 8: 6.55 of a token's rows cross, and what stays in its node besides goes over NVLink."""
    run = run_of(changed(V3, mesh={"experts": "flat"}), 2048, H800)
    between, inside = links.rows_per_token(run)
    missed = math.comb(252, 8) / math.comb(256, 8)
    assert between == pytest.approx(6.55, abs=0.06)
    assert between + inside == pytest.approx(63 * (1 - missed), rel=0.03)  # without a limit of groups


def test_activations_of_a_layer_by_hand():
    """DeepSeek's recomputation in FP8, per token of a MoE layer: the stream twice, latents, output in E5M6 and log-sum-exp;
    affinities, indices, tokens as received and SwiGLU inputs in buffers of 10 pairs per token, the shared expert's."""
    run = run_of(V3, 2048, H800)
    attention = 2 * 7168 + 2 * (1536 + 576) + 1.5 * 128 * 128 + 4 * 128
    fp8 = 1 + 4 / 128
    mlp = 2 * 7168 + 4 * 256 + 96 + 10 * 7168 * fp8 + 11 * 2 * 2048 * fp8
    four = run.stages[5]
    assert len(four.moe) == 4 and footprint.kept(run, four) == pytest.approx(4096 * 4 * (attention + mlp))
    assert run.table().rings.saved == 17  # PP + 1


@pytest.mark.parametrize("precision", ["bf16", "deepseek_fp8"])
def test_recomputation_costs_time_and_saves_memory(precision):
    runs = [
        run_of(changed(V3, precision=precision, train={"remat": remat}), 2048, H800)
        for remat in ("none", "deepseek", "full")
    ]
    kept = [footprint.kept(run, run.stages[5]) for run in runs]
    seconds = [times.backward_seconds([times.layer(run, True)], True, False) for run in runs]
    assert kept[0] > kept[1] > kept[2] and seconds[0] < seconds[1] < seconds[2]


@pytest.mark.parametrize("schedule", ["gpipe", "one_f_one_b", "zero_bubble", "dualpipe", "dualpipe_v"])
def test_every_schedule_of_training_has_a_prediction(schedule):
    """A rank's ops take as long whatever the order; what they wait, and hold, is the schedule's."""
    run = run_of(
        changed(
            V3,
            mesh={"pipe": 8, "data": 4, "schedule": schedule, "overlap": False, "weight_queue": 1},
            train={"grad_accumulation": 60},
        ),
        2048,
        H800,
    )
    ran = times.micro_batches(run)
    costs = times.stage_costs(run)
    whole = run.micros * (costs["F"].sum() + costs["B"].sum()) / 8
    assert sum(ran.parts.values()) == pytest.approx(whole, rel=1e-6)
    assert ran.bubble >= 0 and ran.seconds >= ran.free >= times.least_seconds(run) - 1e-6
    in_flight = {"gpipe": 60, "one_f_one_b": 8, "zero_bubble": 8, "dualpipe": 9, "dualpipe_v": 17}
    slots = run.table().rings.saved
    assert slots == in_flight[schedule]
    memory = footprint.footprint(run)["activations in flight"]
    assert memory == slots * max(footprint.kept(run, stage) for stage in run.stages)


def test_many_micro_batches_are_a_straight_line(monkeypatch):
    """Of what a schedule takes, and the same where none is left out."""
    run = run_of(
        changed(V3, mesh={"pipe": 4, "data": 8}, train={"grad_accumulation": 60, "batch_size": 30720}),
        2048,
        H800,
    )
    by_line = times.micro_batches(run)
    assert run.table().schedule.num_micro == 32
    monkeypatch.setattr(times, "MOST_PER_RANK", 1000)
    whole = times.micro_batches(run)
    assert by_line.seconds == pytest.approx(whole.seconds, rel=1e-9)
    assert by_line.free == pytest.approx(whole.free, rel=1e-9)
    assert by_line.parts == pytest.approx(whole.parts) and by_line.ops == pytest.approx(whole.ops)


# --- lanes ----------------------------------------------------------------------------------------------------------


def test_lanes_by_hand():
    tasks = [
        times.Task("a", "compute", 2.0),
        times.Task("x", "exchange", 3.0, ("a",)),
        times.Task("b", "compute", 1.0),
        times.Task("c", "compute", 1.0, ("x",)),
    ]
    assert times.span(tasks) == 6.0 and times.span(tasks, overlap=False) == 7.0


def layer(compute, exchange):
    each = times.Times(compute, compute, compute)
    return times.Layer(each, each, *(exchange,) * 4)


def test_a_pair_hides_its_exchanges_behind_arithmetic():
    """Arithmetic of 6 per layer; exchanges of 0.5 are hidden, but the first one and the last. In four segments, each hides
    one trip: those of 4 take over from work of 1, 2, 1 and 2."""
    layers = [layer(1.0, 0.5)] * 3
    assert times.forward_seconds(layers) == 3 * 3.0
    assert times.backward_seconds(layers, True, False) == 3 * 5.0
    assert 18.0 <= times.pair_seconds(layers, layers) <= 19.0
    assert times.segments_seconds(layers, layers) == 18.0
    slow = [layer(1.0, 4.0)] * 3
    assert 3 * 16.0 <= times.pair_seconds(slow, slow) <= times.segments_seconds(slow, slow) + 6.0
    assert times.segments_seconds(slow, slow) == 3 * 16.0
    dense = [layer(1.0, 0.0)]
    assert times.segments_seconds([*dense, *layers], layers) == 18.0 + 2.0
    again = [x._replace(again=True) for x in slow]  # attention and experts once more, beside a fifth trip
    assert times.segments_seconds(slow, again) == 3 * (16.0 + 4.0)
    assert times.segments_seconds(layers, [x._replace(again=True) for x in layers]) == 18.0 + 3 * 2.0


def test_two_halves_hide_as_a_pair_does():
    forward, backward = times.halves_seconds([layer(0.5, 0.25)] * 3)
    assert 6.0 <= forward <= 6.5 and 12.0 <= backward <= 12.5


# --- as inputs change -----------------------------------------------------------------------------------------------


def faster(hardware, nic=1.0, nvlink=1.0):
    return dataclasses.replace(
        hardware,
        nic=Link(*(nic * x for x in hardware.nic)),
        nvlink=Link(*(nvlink * x for x in hardware.nvlink)),
    )


def test_faster_links_are_never_slower(v3):
    for link in ("nic", "nvlink"):
        steps = [predict(run_of(V3, 2048, faster(H800, **{link: f}))).step for f in (0.25, 4.0)]
        assert steps[0] > v3.step > steps[1]


def test_more_devices_never_need_more_memory():
    sizes = []
    for data in (1, 2, 4):
        cfg = shipped(
            "v2_lite_16b", mesh={"data": data}, train={"grad_accumulation": 72, "batch_size": 4608 * data}
        )
        sizes.append(predict(run_of(cfg, 8 * data, H100)).bytes)
    assert sizes[0] > sizes[1] > sizes[2]


def test_a_faster_memory_helps(lite):
    on_h200 = run_of(lite.cfg, 8, H200)
    assert predict(on_h200).step < predict(lite).step


# --- search -----------------------------------------------------------------------------------------------------------


def test_search_finds_what_brute_force_finds(monkeypatch):
    """Of all runs of a small model on 4 GPUs, where memory is there for half of them."""
    cfg = tiny(
        model={"num_hidden_layers": 4, "dtype": "bfloat16"},
        mesh={"pipe": 1, "zero": True, "overlap": False, "receive": 4.0},
        train={"batch_size": 8, "grad_accumulation": 1},
    )
    monkeypatch.setattr(search, "REMAT", ("none", "deepseek"))
    small = dataclasses.replace(H100, memory=0, reserved=0)
    everything = [predict(run) for run in search.candidates(cfg, 4, small) if divides(run)]
    middle = sorted(p.bytes for p in everything)[len(everything) // 2]
    found = search.search(cfg, 4, dataclasses.replace(small, memory=int(middle)))
    fits = sorted(p.step for p in everything if p.bytes <= middle)
    assert len(everything) == found.tried > 20 and {p.run.pipe for p in everything} == {1, 2, 4}
    assert [p.step for p in found.fit] == pytest.approx(fits[:10])
    assert all(p.bytes > middle for p in found.large) and found.large


def divides(run):
    try:
        state_memory(run.cfg, run.mesh)
    except ValueError:
        return False
    return True


# --- the commands -----------------------------------------------------------------------------------------------------


def test_the_step_command(capsys, v3):
    assert plan.main(["step", "--config=configs/v3_671b.py", *AS_MEASURED, "--price=3"]) == 0
    out = capsys.readouterr().out
    assert "2048 h800: pipe=16 x data=2 x node=8 x local=8" in out and "250.45 GFLOP per token" in out
    assert f"${3 * v3.gpu_hours:,.0f} per trillion tokens" in out
    line = next(line for line in out.splitlines() if line.strip().startswith("step, s"))
    assert line.split()[2:4] == ["19.926", f"{sum(p.predicted for p in measured.parts(v3)):.3f}"]
    [total] = [line for line in out.splitlines() if line.strip().startswith("all ")][:1]
    assert float(total.split()[-1]) == pytest.approx(v3.bytes / GIB, abs=0.01)


def test_the_search_command(capsys):
    small = ["--config.train.batch_size=16", "--devices=8", "--hardware=h100"]
    assert (
        plan.main(["search", "--config=tests/golden/config.py", "--config.model.dtype=bfloat16", *small]) == 0
    )
    out = capsys.readouterr().out
    assert "8 h100 divide; the fastest that fit:" in out and "the first: --config.mesh.pipe=" in out


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        ("step", ["--hardware=h20"], "value should be one of <h100|h200|h800>"),
        ("step", ["--price=-1"], "price"),
        (
            "step",
            ["--config.mesh.local=16", "--config.train.grad_accumulation=60"],
            "mesh local=16 x tensor=1 is one node's, and a node has 8 h800",
        ),
        (
            "step",
            ["--config.mesh.pipe=3", "--config.mesh.schedule=dualpipe"],
            "dualpipe: 3 stages, must be even",
        ),
        (
            "step",
            ["--config.train.grad_accumulation=15", "--config.mesh.schedule=dualpipe"],
            "mesh.pipe=16 with 15 micro-batches",
        ),
        ("step", ["--config.train.grad_accumulation=7"], "must be divisible by grad_accumulation=7"),
        ("step", ["--config.mesh.data=7"], "train.batch_size=15360 must be a multiple of"),
        (
            "step",
            ["--config.mesh.pipe=1", "--config.mesh.schedule=auto"],
            "mesh.overlap=True halves a micro-batch",
        ),
        ("step", ["--devices=100"], "needs 2048 devices and 100 are at hand"),
        ("step", ["--compile"], "--compile: the compiler knows H100s, not --hardware=h800"),
        ("step", ["--config=nope.py"], "No such file or directory: 'nope.py'"),
        ("search", ["--devices=0"], "devices"),
        (
            "search",
            ["--devices=7", "--config.train.batch_size=15", "--config.train.grad_accumulation=1"],
            "no mesh of 7 devices divides",
        ),
        ("search", ["more"], "unexpected arguments ['more']"),
    ],
)
def test_mistakes(command, arguments, message, capsys):
    assert status(plan.main, [command, *arguments]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and message in err and err.count("\n") == 1
