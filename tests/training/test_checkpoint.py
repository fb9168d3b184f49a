"""Checkpoints: exact, asynchronous, reshardable; kills, damage and foreign folders."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.config import OptimizerConfig
from deepseek_jax.training.checkpoint import Checkpointer, CheckpointError, load_params
from deepseek_jax.training.ema import abstract_average
from deepseek_jax.training.optimizer import adamw
from deepseek_jax.training.state import TrainState

MODEL = {"hidden_size": 8, "rope_scaling": None, "dtype": "float32"}
META = {
    "config": {"model": MODEL, "precision": "bf16"},
    "data": {"epoch": 1, "position": 7},
    "tokens": 14 * 10**12,
}


def make_state(seed: int = 0, hidden: int = 8) -> TrainState:
    rng = np.random.default_rng(seed)
    params = {
        "layers": {"wq_a": jnp.asarray(rng.standard_normal((2, hidden, 4)), jnp.float32)},
        "embed": jnp.asarray(rng.standard_normal((16, hidden)), jnp.float32),
    }
    state = TrainState.create(
        params, adamw(OptimizerConfig()).init(params), jnp.zeros((2, 4)), jax.random.key(seed)
    )
    noise = lambda x: x + jnp.asarray(rng.standard_normal(x.shape), x.dtype)  # noqa: E731
    opt_state = state.opt_state._replace(mu=jax.tree.map(noise, state.opt_state.mu))
    return state.replace(opt_state=opt_state, balance_bias=noise(state.balance_bias), step=jnp.int32(seed))


def make_ema(state: TrainState):
    return {"params": jax.tree.map(lambda x: np.asarray(x) * 0.5, state.params), "updates": np.int32(3)}


def abstract(state: TrainState):
    return jax.eval_shape(lambda: state)


def assert_same(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.dtype == e.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(e))


@pytest.fixture
def saved(tmp_path):
    """A directory with whole checkpoints of steps 10 and 20."""
    with_steps(tmp_path, 10, 20)
    return tmp_path


def with_steps(directory: Path, *steps: int) -> None:
    checkpointer = Checkpointer(directory, keep=3)
    for step in steps:
        state = make_state(step)
        checkpointer.save(step, state, make_ema(state), META)
    checkpointer.close()


def reopen(directory: Path) -> Checkpointer:
    return Checkpointer(directory, keep=3)


def test_everything_comes_back_exactly(saved):
    checkpointer = reopen(saved)
    step, state, ema, meta = checkpointer.restore(abstract(make_state()), model=MODEL)
    assert step == checkpointer.latest() == 20
    assert_same(state, make_state(20))
    assert_same(ema, make_ema(make_state(20)))
    assert all(isinstance(x, np.ndarray) for x in jax.tree.leaves(ema))
    assert meta == {**META, "format": 1, "step": 20} and isinstance(meta["tokens"], int)
    checkpointer.close()


def test_keeps_the_newest(tmp_path):
    checkpointer = Checkpointer(tmp_path, keep=2)
    for step in (1, 2, 3, 4):
        assert checkpointer.save(step, make_state(step), make_ema(make_state(step)), META)
    checkpointer.wait()
    assert checkpointer.steps() == [3, 4]
    assert not checkpointer.save(4, make_state(4), make_ema(make_state(4)), META)  # SIGTERM just after a save
    checkpointer.close()


def test_state_may_be_donated_right_after_save(tmp_path):
    overwrite = jax.jit(lambda t: jax.tree.map(lambda x: x * -2.0, t), donate_argnums=0)
    checkpointer = Checkpointer(tmp_path)
    for step in range(1, 4):
        state = {"w": jnp.full((1024, 1024), float(step)), "v": jnp.full((4, 4), float(step))}
        checkpointer.save(step, state, {"params": np.zeros(1)}, META)
        jax.block_until_ready(overwrite(state))
    checkpointer.wait()
    for step in (3, 2, 1):
        got = checkpointer.restore(
            jax.eval_shape(lambda: {"w": jnp.ones((1024, 1024)), "v": jnp.ones((4, 4))}), step
        )
        assert_same(got.state["w"], jnp.full((1024, 1024), float(step)))
    checkpointer.close()


def test_an_older_step_can_be_chosen_and_the_run_goes_on_from_it(saved):
    checkpointer = reopen(saved)
    with pytest.raises(ValueError, match="holds step 20, newer than step 15"):
        checkpointer.save(15, make_state(15), make_ema(make_state(15)), META)
    assert_same(checkpointer.restore(abstract(make_state()), step=10).state, make_state(10))
    checkpointer.save(15, make_state(15), make_ema(make_state(15)), META)
    checkpointer.wait()
    assert checkpointer.steps() == [10, 15]
    checkpointer.close()


def test_load_params_reads_no_optimizer_state(saved):
    shutil.rmtree(
        saved / "20" / "ema"
    )  # a run may still be deleting or writing elsewhere: step 10 is untouched
    config, params, bias, meta = load_params(saved, step=10)
    want = make_state(10)
    assert config == META["config"] and meta["tokens"] == META["tokens"]
    assert_same(params, jax.tree.map(np.asarray, want.params))
    assert_same(bias, np.asarray(want.balance_bias))
    assert isinstance(params["embed"], np.ndarray)
    assert_same(load_params(saved, step=10, ema=True)[1], make_ema(want)["params"])


@pytest.mark.parametrize(
    "damage",
    [
        lambda p: shutil.rmtree(p / "state"),
        lambda p: shutil.rmtree(p / "ema"),
        lambda p: (p / "meta" / "metadata").write_text('{"config": {"mod'),
        lambda p: (p / "meta" / "metadata").write_text("{}"),
        lambda p: (p / "state" / "manifest.ocdbt").write_bytes(b""),
        lambda p: (p / "state" / "_METADATA").unlink(),
        lambda p: [os.truncate(f, f.stat().st_size // 2) for f in (p / "state").rglob("d/*")],
        lambda p: [f.unlink() for f in (p / "state").rglob("d/*")],
        lambda p: [os.truncate(f, f.stat().st_size // 2) for f in (p / "ema").rglob("d/*")],
    ],
    ids=[
        "no state",
        "no ema",
        "half metadata",
        "empty metadata",
        "no manifest",
        "no tree",
        "half data",
        "no data",
        "half ema",
    ],
)
def test_damage_is_named_and_the_older_step_offered(saved, damage):
    damage(saved / "20")
    checkpointer = reopen(saved)
    with pytest.raises(ValueError, match=r"/20.* Step 10 is whole: restore with step=10") as caught:
        checkpointer.restore(abstract(make_state()))
    assert caught.value.whole_step == 10
    assert_same(checkpointer.restore(abstract(make_state()), step=10).state, make_state(10))
    checkpointer.close()


def test_damage_without_an_older_checkpoint(tmp_path):
    with_steps(tmp_path, 10)
    (tmp_path / "10" / "state" / "manifest.ocdbt").unlink()
    with pytest.raises(CheckpointError, match=r"/10 is damaged: .*No older checkpoint"):
        load_params(tmp_path)


def test_foreign_folders(tmp_path):
    with pytest.raises(ValueError, match="missing does not exist"):
        load_params(tmp_path / "missing")
    (tmp_path / "model.safetensors").write_text("")
    with pytest.raises(ValueError, match="holds no checkpoint"):
        load_params(tmp_path)
    (tmp_path / "7").mkdir()
    with pytest.raises(ValueError, match=r"/7 is not a whole checkpoint of this project: it lacks \['state'"):
        load_params(tmp_path)


def test_other_versions_and_missing_steps(saved):
    meta = saved / "20" / "meta" / "metadata"
    meta.write_text(json.dumps({**json.loads(meta.read_text()), "format": 9}))
    with pytest.raises(ValueError, match="format 9; this version reads 1"):
        load_params(saved)
    with pytest.raises(ValueError, match=r"no checkpoint of step 15; it has \[10, 20\]"):
        load_params(saved, step=15)


def test_another_model_is_refused_by_key(saved):
    checkpointer = reopen(saved)
    with pytest.raises(ValueError, match=r"another model: model.dtype is 'float32' there, 'bfloat16' here"):
        checkpointer.restore(abstract(make_state()), model={**MODEL, "dtype": "bfloat16"})
    with pytest.raises(ValueError, match=r"params.embed is float32\[16, 8\], expected float32\[16, 6\]"):
        checkpointer.restore(abstract(make_state(hidden=6)))
    with pytest.raises(ValueError, match=r"params.embed is float32\[16, 8\], expected float32\[16, 6\]"):
        checkpointer.restore(abstract(make_state()), ema=abstract_average(make_state(hidden=6).params))
    checkpointer.close()


def test_metadata_must_be_complete(tmp_path):
    checkpointer = Checkpointer(tmp_path)
    with pytest.raises(ValueError, match=r"lacks \['data', 'tokens'\]"):
        checkpointer.save(1, make_state(), make_ema(make_state()), {"config": {}})
    checkpointer.close()


RESHARD = """
import sys, jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from deepseek_jax.training.checkpoint import Checkpointer
sharding = NamedSharding(Mesh(np.array(jax.devices()).reshape(4), ("data",)), PartitionSpec("data"))
like = {"w": jax.ShapeDtypeStruct((8, 6), jnp.float32, sharding=sharding)}
checkpointer = Checkpointer(sys.argv[1])
_, state, ema, meta = checkpointer.restore(like)
assert state["w"].sharding == sharding and len(state["w"].addressable_shards) == 4
np.testing.assert_array_equal(state["w"], np.arange(48).reshape(8, 6))
checkpointer.save(2, {"w": state["w"] * 2}, ema, meta)
checkpointer.close()
"""


def test_restores_onto_other_shardings(tmp_path):
    """One device -> four devices (another process) -> one device."""
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(1, {"w": jnp.arange(48.0).reshape(8, 6)}, {"params": np.zeros(1)}, META)
    checkpointer.close()
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    subprocess.run([sys.executable, "-c", RESHARD, str(tmp_path)], check=True, env=env)
    checkpointer = reopen(tmp_path)
    step, state, _, meta = checkpointer.restore({"w": jax.ShapeDtypeStruct((8, 6), jnp.float32)})
    assert step == 2 and meta["tokens"] == META["tokens"]
    assert len(state["w"].sharding.device_set) == 1
    np.testing.assert_array_equal(state["w"], 2 * np.arange(48).reshape(8, 6))
    checkpointer.close()


WRITER = """
import sys, numpy as np, jax.numpy as jnp
from deepseek_jax.training.checkpoint import Checkpointer
checkpointer = Checkpointer(sys.argv[1], keep=2)
step = (checkpointer.latest() or 0) + 1
while True:
    state = {"w": jnp.full((1024, 512), float(step)), "step": jnp.int32(step)}
    checkpointer.save(step, state, {"params": np.full((512,), step, np.float32)}, META)
    print(step, flush=True)
    step += 1
"""


def test_sigkill_during_async_saves_leaves_a_whole_latest_checkpoint(tmp_path):
    """A process that does nothing but save is killed at several moments; what is there afterwards is exact."""
    script = WRITER.replace("META", repr(META))
    like = {"w": jax.ShapeDtypeStruct((1024, 512), jnp.float32), "step": jax.ShapeDtypeStruct((), jnp.int32)}
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    last = 0
    for delay in (0.0, 0.02):
        process = subprocess.Popen(
            [sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True, env=env
        )
        announced = [int(process.stdout.readline()) for _ in range(3)]
        time.sleep(delay)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
        checkpointer = Checkpointer(tmp_path, keep=2)
        step, state, ema, _ = checkpointer.restore(like)
        # the third save had begun, so the second was complete
        assert step >= announced[1] > last
        assert int(state["step"]) == step
        np.testing.assert_array_equal(state["w"], float(step))
        np.testing.assert_array_equal(ema["params"], float(step))
        assert not list(tmp_path.glob("*tmp*"))
        checkpointer.close()
        last = step
