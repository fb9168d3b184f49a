"""The training loop: stopped, resumed, killed, poisoned; a resumed run equals one that never stopped, bit for bit."""

import contextlib
import dataclasses
import gzip
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
from concurrent.futures import Future
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.training import loop
from deepseek_jax.training import run as run_module
from deepseek_jax.training.loop import NonFiniteError, Trainer, stop_on_signals
from deepseek_jax.training.metrics import METRICS_FILE, TIMINGS, read_records
from experiments import train
from experiments.kill_test import Run, Timing, differences, kill_at_random
from tests.golden import run as golden
from tests.golden.run import StopAfter


def config_in(folder, golden_run, **train):
    """The golden config with another output folder and the same data."""
    cfg = golden_run.cfg
    return dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, **{"out_dir": str(folder)} | train))


def records(out_dir):
    found = read_records(Path(out_dir) / "metrics.jsonl")
    return [{name: x for name, x in record.items() if name not in TIMINGS} for record in found]


def raw(tree):
    return [(x.dtype, x.shape, x.tobytes()) for x in map(np.asarray, jax.tree.leaves(tree))]


_shared: list[Trainer] = []


def trainer(cfg):
    """A new trainer on one device. All of them run the same program: it is traced once."""
    new = golden.trainer(cfg)
    _shared.append(new)
    new.step_fn, new.eval_fn = _shared[0].step_fn, _shared[0].eval_fn
    return new


def run_on(cfg, steps=1000, from_step=None):
    """Resume, run at most `steps` steps; (result, average)."""
    run = trainer(cfg)
    run.resume(from_step, discard_newer=True)
    try:
        return run.run(StopAfter(steps), io.StringIO()), run.ema.state()
    finally:
        run.close()


def assert_same_run(cfg, result, ema, golden_run):
    assert raw(result.state) == raw(golden_run.result.state)
    assert raw(ema) == raw(golden_run.ema)
    assert result[1:] == golden_run.result[1:]
    assert records(cfg.train.out_dir) == records(golden_run.cfg.train.out_dir)


def test_a_resumed_run_makes_no_first_state(golden_run, monkeypatch):
    """It would lie beside the restored one."""
    monkeypatch.setattr(run_module, "init_state", lambda *_: pytest.fail("a first state"))
    with contextlib.closing(trainer(golden_run.cfg)) as run:
        assert run.resume() and run.step == 20
        assert raw(run.state) == raw(golden_run.result.state) and raw(run.ema.state()) == raw(golden_run.ema)


def test_an_undisturbed_run(golden_run):
    cfg, result = golden_run.cfg, golden_run.result
    assert (result.step, result.tokens, result.stopped) == (20, 20 * 4 * 32, False)
    assert result.evaluation.loss < 5.6 and 0 < result.evaluation.bits_per_byte < 8
    found = records(cfg.train.out_dir)
    train = [record for record in found if record["kind"] == "train"]
    assert [record["step"] for record in train] == list(range(1, 21))
    assert [record["step"] for record in found if record["kind"] == "eval"] == [10, 20]
    model = cfg.model
    for record in train:
        counts = np.array(record["expert_counts"])
        assert counts.shape == model.balance_bias_shape
        # The MTP module's last position has no token to read ahead.
        assert counts.sum(1).tolist() == [4 * n * model.num_experts_per_tok for n in (32, 31)]
        np.testing.assert_allclose(record["max_vio"], counts.max(1) / counts.mean(1) - 1, rtol=1e-6)
    assert train[0]["lr"] == 0.0 and train[-1]["tokens"] == result.tokens
    steps = sorted(int(p.name) for p in (Path(cfg.train.out_dir) / "checkpoints").iterdir())
    assert steps == [10, 15, 20]  # every 5, of which train.keep=3 stay
    assert (Path(cfg.train.out_dir) / "tokenizer.json").exists()
    # Steps are timed from the one before, unless a checkpoint, an evaluation or the compilation of the average lies
    # between; a CPU has no MFU.
    timed = [r for r in read_records(Path(cfg.train.out_dir) / METRICS_FILE) if r["kind"] == "train"]
    for name in ("tokens_per_s", "step_seconds", "data_seconds"):
        assert [r["step"] for r in timed if name not in r] == [1, 2, 6, 11, 16]
        assert all(r[name] >= 0 for r in timed if name in r)
    assert not any("mfu" in r for r in timed)


def test_profile_of_steps(golden_run, tmp_path):
    """The trace holds the steps' program, and one line says where it lies."""
    shown = io.StringIO()
    with contextlib.closing(trainer(config_in(tmp_path, golden_run))) as run:
        run.run(StopAfter(4), shown, profile_steps=(2, 3))
    [line] = [line for line in shown.getvalue().splitlines() if line.startswith("profile of steps 2 to 3: ")]
    path = Path(line.split(": ")[1].split(" (open it at https://ui.perfetto.dev)")[0])
    assert path.is_relative_to(tmp_path / "profile")
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    names = [event.get("name", "") for event in events]
    assert sum(name.endswith(" _one_step") for name in names) == 2 and "PjitFunction(step)" in names


def test_the_command_ends_with_samples_advice_and_a_picture(golden_run, tmp_path, capsys, monkeypatch):
    """A finished run, started again: what is said at the end, and what of it is recorded."""
    monkeypatch.setattr(loop, "Trainer", trainer)  # on one device, like the run
    shutil.copytree(golden_run.cfg.train.out_dir, tmp_path / "run")
    assert train.run(config_in(tmp_path / "run", golden_run)) == 0
    printed = capsys.readouterr().out
    assert (
        "--- held-out document, continuation_1, " in printed and "--- held-out document, middle, " in printed
    )
    assert "warning: validation loss " in printed and "is no better than a unigram model's" in printed
    assert f"picture: {tmp_path / 'run' / 'report.png'}" in printed
    assert (tmp_path / "run" / "report.png").stat().st_size > 50_000
    [record] = [r for r in records(tmp_path / "run") if r["kind"] == "samples"]
    assert record["step"] == 20 and record["continuation_1"] in printed and record["middle"] in printed


def test_steps_to_profile_on_the_command_line():
    assert train._first_and_last("10:15") == (10, 15) and train._first_and_last(None) is None
    for wrong in ("7", "5:3", "0:2", "a:b", "1:2:3", "-1:2", ""):
        with pytest.raises(ValueError, match=f"--profile_steps={wrong} should be FIRST:LAST, .*as 10:15"):
            train._first_and_last(wrong)


def test_profile_of_steps_that_are_not_taken(golden_run, tmp_path):
    shown = io.StringIO()
    with contextlib.closing(trainer(config_in(tmp_path, golden_run))) as run:
        run.run(StopAfter(1), shown, profile_steps=(2, 3))
    assert "no profile: steps 2 to 3 were not among those taken" in shown.getvalue()
    assert not (tmp_path / "profile").exists()


def test_stopped_and_resumed_twice_is_bitwise_the_same(golden_run, tmp_path):
    cfg = config_in(tmp_path, golden_run)
    first, _ = run_on(cfg, steps=7)  # between two checkpoints, mid-epoch
    assert (first.step, first.stopped, first.evaluation) == (7, True, None)
    second, _ = run_on(cfg, steps=4)
    assert (second.step, second.stopped) == (11, True)
    result, ema = run_on(cfg)
    assert_same_run(cfg, result, ema, golden_run)
    # Once more: the run is over; it evaluates again and records nothing twice.
    again, ema = run_on(cfg)
    assert_same_run(cfg, again, ema, golden_run)


def test_resumed_from_an_older_checkpoint(golden_run, tmp_path):
    cfg = config_in(tmp_path, golden_run)
    run_on(cfg, steps=12)
    with contextlib.closing(trainer(cfg)) as run:
        with pytest.raises(
            ValueError, match=r"from step 5 would remove the newer checkpoints \[10, 12\] .*--disc"
        ):
            run.resume(5)
        assert run.step == 0 and run.checkpointer.steps() == [5, 10, 12]
        assert run.resume(12) and run.step == 12  # nothing to remove
    assert records(tmp_path)[-1]["step"] == 12
    result, ema = run_on(cfg, from_step=5)
    assert_same_run(cfg, result, ema, golden_run)


def test_what_differs_from_the_checkpoint_is_said(golden_run, tmp_path):
    cfg = config_in(tmp_path, golden_run)
    run_on(cfg, steps=3)
    longer = dataclasses.replace(
        config_in(tmp_path, golden_run, steps=40, keep=9),
        optimizer=dataclasses.replace(cfg.optimizer, peak_lr=0.5),
    )
    for changed, schedule, other in (
        (cfg, [], []),
        (
            longer,
            ["optimizer.peak_lr was 0.003, is 0.5", "train.steps was 20, is 40"],
            ["train.keep was 3, is 9"],
        ),
    ):
        with contextlib.closing(trainer(changed)) as run:
            assert run.resume() and run.changes == (schedule, other)


def test_the_best_checkpoint_stays_and_is_found_again(golden_run, tmp_path, monkeypatch):
    """Validation losses as they would be: falling, then rising again."""
    losses = {2: 3.0, 4: 1.0, 6: 2.0, 8: 2.5, 10: 2.6}
    evaluate = lambda run, _: loop.Evaluation(losses[run.step], 1.0)  # noqa: E731
    monkeypatch.setattr(Trainer, "evaluate", evaluate)
    cfg = config_in(tmp_path, golden_run, checkpoint_every=2, keep=1, keep_best=1, eval_every=4)
    run_on(cfg, steps=7)  # stopped: the seventh is not evaluated
    run_on(cfg, steps=3)
    assert sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir()) == [4, 10]
    evaluated = [(r["step"], r["loss"]) for r in records(tmp_path) if r["kind"] == "eval"]
    assert evaluated == list(losses.items())


def test_stopped_before_the_first_step(golden_run, tmp_path):
    result, _ = run_on(config_in(tmp_path, golden_run), steps=0)
    assert (result.step, result.stopped) == (0, True)
    assert (tmp_path / "checkpoints" / "0").is_dir()


def test_stopped_while_the_step_is_compiled(golden_run, tmp_path):
    """Without waiting for the compiler; the same run goes on from its first parameters."""
    stop, run = threading.Event(), trainer(config_in(tmp_path, golden_run))
    run._program._compiled = Future()  # which never ends
    threading.Timer(0.5, stop.set).start()
    with contextlib.closing(run):
        result = run.run(stop, io.StringIO())
    assert (result.step, result.stopped) == (0, True)


def test_too_many_bad_steps_end_the_run_and_keep_the_checkpoint(golden_run, tmp_path):
    cfg = config_in(tmp_path, golden_run, max_bad_steps=2)
    run_on(cfg, steps=6)
    run = trainer(cfg)
    run.resume()
    before = raw(run.state.opt_state)
    scale = run.state.params["final_norm"]["scale_d"]
    run.state = run.state.replace(
        params=run.state.params | {"final_norm": {"scale_d": jnp.full_like(scale, np.nan)}}
    )
    with pytest.raises(
        NonFiniteError, match=r"step 8: loss=nan, .*2 steps in a row .*max_bad_steps=2.*step 6"
    ):
        run.run(progress_file=io.StringIO())
    assert raw(run.state.opt_state) == before
    assert run.checkpointer.latest() == 6
    run.close()
    bad = [record for record in records(tmp_path) if record["step"] > 6]
    assert [(record["loss"], record["skipped"]) for record in bad] == [(None, 1), (None, 2)]
    # What is kept is good: the run goes on from it.
    result, ema = run_on(cfg)
    assert_same_run(cfg, result, ema, golden_run)


def test_a_state_that_is_not_finite_is_never_the_checkpoint(golden_run, tmp_path):
    """Whether or not a loss shows the NaN in an embedding: at the next checkpoint, the run ends."""
    cfg = config_in(tmp_path, golden_run, max_bad_steps=100, checkpoint_every=4, ema_every=1)
    run_on(cfg, steps=4)
    run = trainer(cfg)
    run.resume()
    before = raw(run.ema.state())
    w_vd = run.state.params["embed"]["w_embed_vd"].at[383].set(jnp.nan)
    run.state = run.state.replace(params=run.state.params | {"embed": {"w_embed_vd": w_vd}})
    with pytest.raises(
        NonFiniteError,
        match=r"step 8 is not saved: NaN or infinity in params.embed.w_embed_vd; .* is step 4 in",
    ):
        run.run(progress_file=io.StringIO())
    assert raw(run.ema.state()) == before
    run.close()
    assert run.checkpointer.steps() == [4]
    assert [r["step"] for r in records(tmp_path) if r["kind"] == "train"] == list(range(1, 9))
    result, _ = run_on(cfg)
    assert np.isfinite(result.ema_evaluation.loss)


def test_a_single_bad_step_does_not_end_the_run(golden_run, tmp_path):
    cfg = config_in(tmp_path, golden_run, max_bad_steps=2, steps=20)
    run = trainer(cfg)
    good = run.state.params
    poisoned = good | {"final_norm": {"scale_d": jnp.full_like(good["final_norm"]["scale_d"], np.inf)}}
    run.state = run.state.replace(params=poisoned)
    text = io.StringIO()
    healthy = jax.tree.map(jnp.copy, good)

    class Heal(threading.Event):
        """The parameters are good again from the second step on."""

        def is_set(self):
            if run.step == 1:
                run.state = run.state.replace(params=healthy)
            return run.step == 4

    run.run(Heal(), text)
    run.close()
    assert [record["skipped"] for record in records(tmp_path) if record["kind"] == "train"] == [1, 1, 1, 1]
    assert "step 1 skipped: loss=nan" in text.getvalue() and "(1 in a row)" in text.getvalue()


def test_other_data_is_refused(golden_run, tmp_path):
    cfg = config_in(tmp_path, golden_run)
    run_on(cfg, steps=1)
    other = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, seed=99))
    run = trainer(other)
    with pytest.raises(ValueError, match=f"belongs to other data: seed was {cfg.data.seed}, is now 99"):
        run.resume()
    run.close()


def test_tokenizer_that_does_not_fit_the_model(golden_run, tmp_path):
    cfg = config_in(tmp_path, golden_run)
    small = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, vocab_size=300))
    message = r"the tokenizer has 384 ids, model\.vocab_size is 300: raise it"
    with contextlib.closing(golden.trainer(small)) as run:
        with pytest.raises(ValueError, match=message):
            run.check()
        with pytest.raises(ValueError, match=message):
            _ = run.data


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": {"batch_size": 3}}, r"train\.batch_size=3 must be a multiple of 2"),
        ({"data": {"tokenizer": "/nonexistent"}}, "no tokenizer at /nonexistent"),
        ({"data": {"tokenizer": None, "vocab_size": 263}}, r"data\.vocab_size=263 must be at least 264"),
        ({"data": {"vocab_size": 383}}, r"the tokenizer has 384 ids, data\.vocab_size is 383: raise it"),
        (
            {"mesh": {"pipe": 2, "schedule": "dualpipe"}, "train": {"batch_size": 2}},
            "dualpipe: 2 micro-batches",
        ),
        ({"mesh": {"overlap": True}}, "mesh.overlap=True, but no tokens travel"),
        (
            {"mesh": {"local": 2, "overlap": True}, "train": {"batch_size": 2}},
            "1 sequences does not divide into 2",
        ),
        ({"mesh": {"tensor": 2}, "data": {"seq_len": 31}}, "31"),
        ({"train": {"wandb": "x"}}, "needs the package wandb"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_read(tmp_path, monkeypatch, changes, message):
    monkeypatch.setattr(loop.data_lib, "load", lambda *_: pytest.fail("data were read"))
    monkeypatch.setitem(sys.modules, "wandb", None)
    cfg = golden.golden_config(tmp_path)
    sections = {name: dataclasses.replace(getattr(cfg, name), **values) for name, values in changes.items()}
    cfg = dataclasses.replace(cfg, **sections)
    with pytest.raises(ValueError, match=message):
        mesh = make_mesh(cfg.mesh, jax.devices()[:2])
        with contextlib.closing(Trainer(cfg, mesh)) as run:
            run.check()
    assert not list((tmp_path / "cache").glob("*"))


def test_the_checked_program_is_the_one_that_runs(golden_run, tmp_path, caplog):
    """What `check` traced and `compile` compiled is not compiled again by the first step."""
    run = golden.trainer(config_in(tmp_path, golden_run))
    with caplog.at_level("WARNING"), jax.log_compiles(), contextlib.closing(run):
        run.check()
        run.compile()
        run.run(StopAfter(2), io.StringIO())
    said = [record.getMessage() for record in caplog.records]
    assert run.step == 2 and sum(text.startswith("Compiling jit(step)") for text in said) == 1
    assert not any("XLA compilation of jit(step)" in text for text in said)  # in this thread


def test_signals_set_the_event_and_handlers_are_restored():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    for number in (signal.SIGTERM, signal.SIGINT):
        with stop_on_signals() as stop:
            assert not stop.is_set()
            os.kill(os.getpid(), number)
            assert stop.wait(5)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


DEAF = """
import signal, sys, threading, time
sys.modules["deepseek_jax"] = type(sys)("deepseek_jax")  # without what it imports: JAX takes seconds
sys.modules["deepseek_jax"].__path__ = ["deepseek_jax"]
from deepseek_jax.training.stopping import stop_on_signals
threading.Thread(target=time.sleep, args=(60,)).start()  # a writer that nothing stops
with stop_on_signals() as stop:
    print("ready", flush=True)
    stop.wait()
    print("stopping", flush=True)
    time.sleep(60)
"""


def test_a_second_ctrl_c_ends_the_process_whatever_its_threads_do():
    process = subprocess.Popen(
        [sys.executable, "-c", DEAF], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    for said in ("ready", "stopping"):
        assert process.stdout.readline() == said + "\n"
        process.send_signal(signal.SIGINT)
    printed = process.communicate(timeout=5)[1]
    assert process.returncode == 130 and "error: interrupted again: ended without saving" in printed


def test_two_runs_do_not_share_a_folder_and_a_run_notices_that_its_folder_is_gone(golden_run, tmp_path):
    cfg = config_in(tmp_path / "run", golden_run, checkpoint_every=3)
    run = trainer(cfg)
    with pytest.raises(ValueError, match=rf"run is in use by process {os.getpid()} on .* since \d{{4}}-"):
        golden.trainer(cfg)
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(OSError, match=r"run.lock is gone: the run's folder was removed or replaced"):
        run.run(progress_file=io.StringIO())
    assert run.step == 3
    run.close()
    small = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, vocab_size=300))
    for _ in range(2):  # one that failed holds no lock
        with (
            contextlib.closing(golden.trainer(small)) as failing,
            pytest.raises(ValueError, match="the tokenizer has 384 ids"),
        ):
            _ = failing.data
    (tmp_path / "file").write_text("")
    for path, error in (("file", FileExistsError), ("file/below", NotADirectoryError)):
        with pytest.raises(error):
            golden.trainer(config_in(tmp_path / path, golden_run))


# --- processes of their own -------------------------------------------------------------------------------

STEPS = 120
ARGUMENTS = (
    "--config=tests/golden/config.py",
    f"--config.train.steps={STEPS}",
    "--config.train.checkpoint_every=10",
    # One MoE layer, nothing completed: each of the five processes traces all there is. The other parts of a model
    # are in the tests above.
    "--config.model.num_hidden_layers=1",
    "--config.model.first_k_dense_replace=0",
    "--config.model.num_nextn_predict_layers=0",
    "--config.train.sample_tokens=0",
)


@pytest.mark.timeout(600)  # five processes
def test_killed_twice_and_terminated_is_bitwise_the_same(tmp_path):
    """The short form of `python -m experiments.kill_test`, and SIGTERM: it saves and exits with status 0."""
    want, run = Run(tmp_path / "undisturbed", ARGUMENTS), Run(tmp_path / "disturbed", ARGUMENTS)
    want.finish()
    assert want.step() == want.checkpoint() == STEPS

    rng = random.Random(1)
    moments = [kill_at_random(run, Timing(0.0, 0.3), rng, while_training=True) for _ in range(2)]
    assert None not in moments, "the kills came too late"
    process = run.start()
    run.wait_for_step(process)
    process.send_signal(signal.SIGTERM)
    printed = run.finish(process)  # raises if the status is not 0
    stopped = run.checkpoint()
    assert f"stopped at step {stopped}; the same command goes on from there" in printed
    assert 0 < stopped < STEPS
    process = run.start()
    run.wait_for_step(process)
    for _ in range(2):  # which may arrive as one, and the run is short
        process.send_signal(signal.SIGINT)
    printed = process.communicate(timeout=10)[0]
    assert process.returncode in (0, 130) and "Traceback" not in printed, printed
    assert f"resumed from step {run.checkpoint()} in" in run.finish()
    assert differences(run, want) == []
    assert_a_full_disk_ends_the_run(Run(tmp_path / "full", ARGUMENTS))


def assert_a_full_disk_ends_the_run(run):
    """Files of at most 40 KiB, so that no checkpoint can be written: one line, status 1; nothing half-written counts."""
    limited = ("bash", "-c", 'ulimit -f 40 && exec "$@"', "bash", *run.command)
    done = subprocess.run(limited, env=run.environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    line = done.stderr.splitlines()[-1]
    assert re.match(r"error: the run in .*/full ended after step \d+: .*File too large", line), line
    assert run.checkpoints() == []


def test_a_ramp_runs_in_one_program(golden_run, tmp_path):
    """From two sequences to four, in micro-batches of two, over half of the tokens."""
    cfg = golden.golden_config(tmp_path, steps=6, grad_accumulation=2, checkpoint_every=6)
    optimizer = dataclasses.replace(cfg.optimizer, batch_start=2, batch_ramp_tokens=7.4e12)
    data = dataclasses.replace(cfg.data, cache_dir=golden_run.cfg.data.cache_dir)
    run = golden.trainer(dataclasses.replace(cfg, optimizer=optimizer, data=data))
    try:
        result = run.run(progress_file=io.StringIO())
    finally:
        run.close()
    sizes = [r["batch_size"] for r in records(cfg.train.out_dir) if r["kind"] == "train"]
    assert sizes == sorted(sizes) and set(sizes) == {2, 4} and len(sizes) == 6
    assert result.tokens == 32 * sum(sizes) and run.step_fn._cache_size() == 1


def test_a_run_at_its_end_says_so(golden_run, tmp_path):
    run = trainer(config_in(tmp_path, golden_run))
    with contextlib.closing(run):
        assert not run.nothing_left()
        run.step, run.tokens = 15, 15 * 4 * 32
        assert not run.nothing_left()
        run.tokens = 20 * 4 * 32  # as with a larger batch before
        assert run.nothing_left()


def test_a_file_in_the_place_of_the_folder_is_named_by_its_key(golden_run, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"train\.out_dir: File exists"):
        golden.trainer(config_in(tmp_path, golden_run, out_dir=str(tmp_path / "file")))
