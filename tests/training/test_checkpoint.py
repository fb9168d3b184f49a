"""Checkpoints: exact, asynchronous, reshardable; kills, damage and foreign folders."""

import contextlib
import json
import os
import resource
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

from deepseek_jax.checkpoints import inventory
from deepseek_jax.checkpoints.arrays import load_params
from deepseek_jax.checkpoints.files import MisfitError, check_model, offering_older
from deepseek_jax.config import OptimizerConfig
from deepseek_jax.training import checkpoint
from deepseek_jax.training.checkpoint import Checkpointer, CheckpointError
from deepseek_jax.training.ema import abstract_average
from deepseek_jax.training.finite import NonFiniteError
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
    state = TrainState.create(params, adamw(OptimizerConfig()).init(params), jnp.zeros((2, 4)))
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
    assert meta == {**META, "format": 2, "step": 20} and isinstance(meta["tokens"], int)
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
    assert checkpointer.steps() == [10, 20]  # reading removes nothing
    checkpointer.discard_newer(10)
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
    with pytest.raises(ValueError, match=r"/20.* Before it came step 10: step=10") as caught:
        checkpointer.restore(abstract(make_state()))
    assert caught.value.older_step == 10
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


def rewrite_meta(folder: Path, **changes) -> None:
    """As a version that writes so would have: with the right digests."""
    meta = folder / "meta" / "metadata"
    meta.write_text(json.dumps({**json.loads(meta.read_text()), **changes}))
    inventory.write(folder, ("state", "ema", "meta"))


def test_other_versions_and_missing_steps(saved):
    rewrite_meta(saved / "20", format=9)
    with pytest.raises(ValueError, match=r"format 9; this version reads \[1, 2\]"):
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
    with pytest.raises(ValueError, match=r"metadata has tokens=1.5, which should be an integer >= 0"):
        checkpointer.save(1, make_state(), make_ema(make_state()), {**META, "tokens": 1.5})
    checkpointer.close()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": -1}, "tokens=-1, which should be an integer >= 0"),
        ({"tokens": True}, "tokens=True"),
        ({"tokens": "14"}, "tokens='14'"),
        ({"data": []}, r"data=\[\], which should be a dict"),
        ({"config": {"model": 3}}, "config.model=3, which should be a dict"),
        ({"step": 21}, "step=21 in a folder named 20"),
        ({"validation_loss": "low"}, "validation_loss='low', which should be a finite number"),
        ({"validation_loss": float("nan")}, "validation_loss=nan"),
        ({"format": True}, "format True"),
    ],
)
def test_metadata_that_cannot_be_is_named(saved, changes, message):
    rewrite_meta(saved / "20", **changes)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_params(saved)
    assert caught.value.older_step == 10


@pytest.mark.parametrize("seed", range(2))
def test_a_flipped_bit_anywhere_is_found_or_harms_nothing(saved, seed):
    """One bit in every file of a checkpoint, file by file, each with its digest found before anything is used."""
    step, want, found = saved / "20", make_state(20), set()
    files = sorted(file for file in step.rglob("*") if file.is_file())
    rng = np.random.default_rng(seed)
    checkpointer = reopen(saved)
    for file in files:
        good = file.read_bytes()
        bad = bytearray(good)
        bit = int(rng.integers(8 * len(good)))
        bad[bit // 8] ^= 1 << bit % 8
        file.write_bytes(bad)
        try:
            step_read, state, ema, meta = checkpointer.restore(abstract(want), model=MODEL)
        except CheckpointError as error:
            assert error.older_step == 10 and "/20 is damaged" in str(error)
            found.add(file.relative_to(step).as_posix())
        else:  # orbax's own notes beside state, ema and meta: not read
            assert (step_read, meta) == (20, {**META, "format": 2, "step": 20})
            assert_same((state, ema), (want, make_ema(want)))
        file.write_bytes(good)
    assert {f.relative_to(step).as_posix() for f in files} - found == {
        "_CHECKPOINT_METADATA",
        "commit_success.txt",
    }
    assert_same(checkpointer.restore(abstract(want)).state, want)
    checkpointer.close()


def test_parameters_are_loaded_only_from_whole_files(saved):
    data = max((saved / "20" / "state").rglob("d/*"), key=lambda f: f.stat().st_size)
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 16
    data.write_bytes(content)
    with pytest.raises(
        CheckpointError, match=r"other contents than when it was written .SHA-256.. Before it"
    ):
        load_params(saved)
    average = next((saved / "10" / "ema").rglob("d/*"))
    average.write_bytes(b"")
    load_params(saved, step=10)  # does not read it
    with pytest.raises(CheckpointError, match=r"ema/.* has 0 of \d+ bytes. No older"):
        load_params(saved, step=10, ema=True)


def test_an_older_step_is_named_and_not_read(saved):
    for file in (saved / "10").rglob("*"):
        if file.is_file():
            file.unlink()
    (saved / "20" / "files.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"files.json has changed.* Before it came step 10: step=10"):
        load_params(saved)


def test_the_format_before_can_be_read(tmp_path):
    """It had a random key in its state and a list of sizes without digests."""
    state = make_state(5)
    fields = {name: getattr(state, name) for name in state.__dataclass_fields__}
    with contextlib.closing(Checkpointer(tmp_path)) as checkpointer:
        checkpointer.save(5, fields | {"rng": jnp.zeros(2, jnp.uint32)}, make_ema(state), META)
    rewrite_meta(tmp_path / "5", format=1)
    sizes = {name: file.size for name, file in inventory.read(tmp_path / "5").items()}
    (tmp_path / "5" / "files.json").write_text(json.dumps(sizes))
    with contextlib.closing(reopen(tmp_path)) as checkpointer:
        assert_same(checkpointer.restore(abstract(state)).state, state)
    rewrite_meta(tmp_path / "5", format=2)
    with contextlib.closing(reopen(tmp_path)) as checkpointer:
        with pytest.raises(CheckpointError, match=r"rng is uint32\[2\], expected absent"):
            checkpointer.restore(abstract(state))
        (tmp_path / "5" / "files.json").write_text(json.dumps(sizes))
        with pytest.raises(CheckpointError, match=r"/5 is damaged: its list of files has no digests"):
            checkpointer.restore(abstract(state))


# --- what is good, and what stays ---------------------------------------------------------------------------


def poisoned(state: TrainState, where: str) -> TrainState:
    if where == "params":
        embed = state.params["embed"].at[3, 1].set(jnp.nan)
        return state.replace(params=state.params | {"embed": embed})
    if where == "balance_bias":
        return state.replace(balance_bias=state.balance_bias.at[1, 1].set(jnp.inf))
    moment = getattr(state.opt_state, where)
    layers = {"wq_a": moment["layers"]["wq_a"].at[0, 1, 2].set(-jnp.inf)}
    return state.replace(opt_state=state.opt_state._replace(**{where: moment | {"layers": layers}}))


@pytest.mark.parametrize(
    ("where", "name"),
    [
        ("params", "params.embed"),
        ("mu", "opt_state.mu.layers.wq_a"),
        ("nu", "opt_state.nu.layers.wq_a"),
        ("balance_bias", "balance_bias"),
    ],
)
def test_a_state_with_nan_or_infinity_is_no_checkpoint(saved, monkeypatch, where, name):
    with contextlib.closing(reopen(saved)) as checkpointer:
        bad = poisoned(make_state(30), where)
        message = rf"step 30 is not saved: NaN or infinity in {name}; the last good checkpoint is step 20"
        with pytest.raises(NonFiniteError, match=message):
            checkpointer.save(30, bad, make_ema(bad), META)
        assert checkpointer.steps() == [10, 20]
        with monkeypatch.context() as patch:  # as versions before did
            patch.setattr(checkpoint, "not_finite", lambda _: [])
            checkpointer.save(30, bad, make_ema(make_state(30)), META)
            checkpointer.wait()
        with pytest.raises(
            CheckpointError, match=rf"/30 is no good: NaN or infinity in {name}. Before it came step 20"
        ):
            checkpointer.restore(abstract(bad))


def test_an_average_with_nan_is_refused(saved):
    """An `EMA` has none, so that nobody looks when it is saved."""
    state, average = make_state(30), make_ema(make_state(30))
    average["params"]["embed"][2, 3] = np.nan
    with contextlib.closing(reopen(saved)) as checkpointer:
        checkpointer.save(30, state, average, META)
        checkpointer.wait()
        with pytest.raises(
            CheckpointError, match=r"/30 is no good: NaN or infinity in ema.params.embed. Before"
        ):
            checkpointer.restore(abstract(state))


def test_every_so_many_steps_and_the_best_stay_besides_the_newest(tmp_path):
    losses = {10: 3.0, 20: 1.0, 30: 2.0, 40: None, 50: 2.5, 60: 2.4, 70: None}
    for steps in ([10, 20, 30], [40, 50], [60, 70]):  # a new process each: the best are found again
        with contextlib.closing(Checkpointer(tmp_path, keep=2, keep_every=25, keep_best=1)) as checkpointer:
            for step in steps:
                meta = {**META, "validation_loss": losses[step]}
                checkpointer.save(step, {"w": jnp.ones(3)}, {"params": np.ones(3)}, meta)
    assert checkpointer.steps() == [20, 50, 60, 70]  # the best; a multiple of 25; the two newest


def test_a_full_disk_is_one_os_error(saved):
    """The limit on the size of files is as real as a full disk, and this process can lift it again."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    state = {"w": jnp.asarray(np.random.default_rng(0).standard_normal((256, 1024)))}
    with contextlib.closing(reopen(saved)) as checkpointer:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, before[1]))
        try:
            with pytest.raises(
                OSError, match=r"of step 30 could not be written to .*; the last whole one is step 20"
            ):
                checkpointer.save(30, state, {"params": np.ones(3)}, META)
                checkpointer.wait()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert checkpointer.steps() == [10, 20]
    with contextlib.closing(reopen(saved)) as checkpointer:
        assert checkpointer.save(30, state, {"params": np.ones(3)}, META)


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


def test_what_does_not_fit_is_no_damage(saved):
    """The step before would not fit either: it is not offered."""
    with pytest.raises(MisfitError, match="belongs to another model") as caught:
        offering_older(20, [10, 20], lambda step: check_model(saved / "20", {"model": {"a": 1}}, {"a": 2}))
    assert caught.value.older_step is None and "step 10" not in str(caught.value)
