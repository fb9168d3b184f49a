"""A GRPO run: stopped, interrupted in a rollout, resumed: the same, bit for bit; what its records say."""

import contextlib
import dataclasses
import io
import re

import jax
import numpy as np
import pytest

from configs import v3_grpo
from deepseek_jax.config import from_config_dict
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.posttraining.by_length import ByLength
from deepseek_jax.posttraining.experience import Group, Silence, ends, means, width_for
from deepseek_jax.posttraining.grpo import GRPO
from deepseek_jax.posttraining.grpo_config import preset
from deepseek_jax.posttraining.grpo_report import write_grpo_report
from deepseek_jax.posttraining.grpo_settings import GRPOConfig
from deepseek_jax.posttraining.rewards import Rewards, Weighted
from deepseek_jax.posttraining.right_answers import right
from deepseek_jax.training.metrics import TIMINGS, read_records
from deepseek_jax.training.schedules import Schedules
from tests.golden.run import StopAfter
from tests.posttraining import grpo_cases
from tests.posttraining.grpo_cases import config, trainer


def raw(tree):
    return [(x.dtype, x.shape, x.tobytes()) for x in map(np.asarray, jax.tree.leaves(tree))]


def records(run):
    found = read_records(run.out_dir / "metrics.jsonl")
    return [{name: x for name, x in record.items() if name not in TIMINGS} for record in found]


_shared = []


def run_on(cfg, steps=1000, rewards=None):
    """Resumes, runs at most `steps` steps; (run, result, its last state and what a checkpoint keeps beside it). Programs are
    traced once."""
    run = trainer(cfg)
    if rewards is not None:
        run.rewards = rewards
    _shared.append(run)
    run.step_fn, run._logprobs = _shared[0].step_fn, _shared[0]._logprobs
    with contextlib.closing(run):
        run.resume()
        result = run.run(StopAfter(steps), io.StringIO())
        return run, result, raw((result.state, run.beside()))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("grpo")
    run, result, arrays = run_on(config(folder))
    return folder, run, result, arrays


def in_another_folder(folder, tmp_path, **changes):
    cfg = config(folder, **changes)
    return dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, out_dir=str(tmp_path / "run")))


def test_what_the_records_say(undisturbed):
    _, run, result, _ = undisturbed
    found = records(run)
    train = [r for r in found if r["kind"] == "train"]
    assert [r["step"] for r in train] == [1, 2, 3, 4] and not result.stopped
    assert [r["step"] for r in found if r["kind"] == "eval"] == [0, 2, 4]
    for record in train:
        assert 1 <= record["answer_tokens"] <= 12 and 0 <= record["silent_groups"] <= 1
        assert record["reward"] == pytest.approx(record["reward_tests.posttraining.grpo_cases:even"])
        assert record["entropy"] > 0
    # Of the rollout's weights, the first of its two updates: the trainer's log-probabilities are the sampler's.
    for record in train[::2]:
        assert record["sampler_gap"] <= record["sampler_gap_max"] < 1e-4
        assert record["ratio_distance"] < 1e-4 and record["clip_share"] == 0
    # The second has moved; the reference is replaced by the model of step 2 there, so that the KL of step 3 is that of no step.
    assert train[1]["ratio_distance"] > 1e-3 and train[1]["kl"] > 1e-6
    assert train[0]["kl"] < 1e-9 and train[2]["kl"] < 1e-9


def test_the_page_is_drawn(undisturbed, tmp_path):
    _, run, *_ = undisturbed
    texts = ends(run.last_held_out, 1)
    (best, *_), (worst, *_) = texts["best_1"].splitlines(), texts["worst_1"].splitlines()
    assert "= ?" in best and "= ?" in worst and "(reward " in texts["worst_1"]
    found = [*read_records(run.out_dir / "metrics.jsonl"), {"kind": "samples", "step": 4, **texts}]
    write_grpo_report(found, tmp_path / "page.png", "tiny")
    assert (tmp_path / "page.png").stat().st_size > 50_000


def test_stopped_between_the_updates_of_a_rollout_and_resumed(undisturbed, tmp_path):
    """It stops where the rollout ends, and goes on from there."""
    folder, whole, _, arrays = undisturbed
    cfg = in_another_folder(folder, tmp_path)
    run, result, _ = run_on(cfg, steps=1)
    assert (result.step, result.stopped) == (2, True)
    run, _, again = run_on(cfg)
    assert again == arrays and records(run) == records(whole)


def test_interrupted_in_a_rollout_it_is_made_again(undisturbed, tmp_path):
    """As by SIGKILL: nothing of the rollout is kept. (In processes: `experiments.kill_test --command=grpo`.)"""
    folder, whole, _, arrays = undisturbed
    cfg, calls = in_another_folder(folder, tmp_path), []

    def killed(**given):
        calls.append(len(given["prompts"]))
        if len(calls) == 4:  # those of the evaluation, of the first rollout, and again of both
            raise KeyboardInterrupt
        return grpo_cases.even(**given)

    with pytest.raises(KeyboardInterrupt):
        run_on(cfg, rewards=Rewards([Weighted("tests.posttraining.grpo_cases:even", 1.0, killed)]))
    run, _, again = run_on(cfg)
    assert again == arrays and records(run) == records(whole)


def test_a_step_is_written_down_before_the_next_rollout(undisturbed, tmp_path):
    """So the seconds of a rollout count in those of its own step."""
    seen = []

    def looks(**given):
        seen.append(
            [r["step"] for r in read_records(tmp_path / "run" / "metrics.jsonl") if r["kind"] == "train"]
        )
        return grpo_cases.even(**given)

    cfg = in_another_folder(undisturbed[0], tmp_path, train={"checkpoint_every": 4, "eval_every": 4})
    run_on(cfg, rewards=Rewards([Weighted("looks", 1.0, looks)]))
    assert seen == [[], [], [1, 2], [1, 2, 3, 4]]  # of both rollouts, between two evaluations


def test_no_program_is_compiled_again(undisturbed, tmp_path, caplog):
    """A rollout with other weights runs the programs of the first."""
    folder, *_ = undisturbed
    with caplog.at_level("WARNING"), jax.log_compiles():
        run_on(in_another_folder(folder, tmp_path))
    said = [r.getMessage() for r in caplog.records if r.getMessage().startswith("Compiling jit(")]
    engines = [
        text for text in said if re.match(r"Compiling jit\(_?(decode|prefill|admit|arranged|step)\)", text)
    ]
    assert engines and len(engines) == len(set(engines)), engines


def test_silent_groups_are_replaced_no_more_often_than_allowed(undisturbed, tmp_path):
    """Of rewards that are all the same, every group is, each time; of others, those that were."""
    folder, *_ = undisturbed
    run = trainer(in_another_folder(folder, tmp_path, rollouts={"resample": 2}))
    with contextlib.closing(run):
        run.rewards = Rewards([Weighted("same", 1.0, lambda prompts, **_: [0.5] * len(prompts))])
        run._load()
        assert all(group.silent for group in run._groups(0)) and run._of_rollout["replaced"] == 2 * 4
        assert run.data.train.state()["taken"] == [3 * 4]
        run.rewards = Rewards(
            [
                Weighted(
                    "differs",
                    1.0,
                    lambda completion_ids, **_: [float(hash(tuple(x)) % 99) for x in completion_ids],
                )
            ]
        )
        once = run._groups(4)
        assert run._of_rollout["replaced"] <= 1 and sum(group.silent for group in once) <= 1


@pytest.mark.parametrize(
    ("tokens", "buckets", "width"),
    [(1, 3, 17), (17, 3, 17), (18, 3, 33), (34, 3, 65), (65, 3, 65), (5, 1, 65)],
)
def test_a_batch_is_as_wide_as_the_smallest_window_that_it_fits_into(tokens, buckets, width):
    assert width_for(tokens, 64, buckets) == width


def test_a_window_shorter_than_the_longest_answer_has_a_program():
    """Of DeepSeek-V3's, answers of up to 32,768 tokens, a batch of short ones."""
    cfg = from_config_dict(v3_grpo.get_config(), GRPOConfig)
    width = width_for(9000, cfg.data.seq_len, cfg.rollouts.buckets)
    of_length = ByLength(lambda cfg, mesh: lambda batch: cfg, cfg, None, at=0)
    made = of_length({"tokens": np.zeros((1, width))})
    assert made.data.seq_len == width - 1 == 9216 < cfg.rollouts.max_tokens
    assert cfg.data.seq_len == 36864 and (made.loss, made.rollouts) == (cfg.loss, cfg.rollouts)


def test_windows_that_do_not_divide_are_refused_before_a_short_batch_comes(undisturbed, tmp_path):
    cfg = in_another_folder(undisturbed[0], tmp_path, rollouts={"buckets": 3}, mesh={"tensor": 2})
    cfg = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, seq_len=44))
    with pytest.raises(
        ValueError, match=r"windows of \[11, 22, 44\] tokens .* do not all divide over tensor=2"
    ):
        GRPO(cfg, make_mesh(cfg.mesh, jax.devices()[:2]))


def test_a_checkpoint_inside_of_a_rollout_is_not_gone_on_from(undisturbed):
    """Where rollouts are for another number of updates now."""
    other = {"steps": 6, "checkpoint_every": 3, "eval_every": 3}
    run = trainer(config(undisturbed[0], train=other, rollouts={"updates": 3, "reference_every": 3}))
    with (
        contextlib.closing(run),
        pytest.raises(ValueError, match=r"step 4 in .* no multiple of rollouts\.updates=3"),
    ):
        run.resume()


def test_the_kl_divergence_is_not_left_out_on_the_way(undisturbed):
    run = trainer(config(undisturbed[0], loss={"beta": 0.0}))
    with (
        contextlib.closing(run),
        pytest.raises(ValueError, match=r"loss\.beta=0\.0, and at step 4 it was 0\.001"),
    ):
        run.resume()


def test_each_process_has_a_held_out_prompt(undisturbed, tmp_path):
    run = trainer(in_another_folder(undisturbed[0], tmp_path))
    run.feed.share = (0, 3)
    with contextlib.closing(run), pytest.raises(ValueError, match="2 held-out prompts for 3 processes"):
        _ = run.data


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"train": {"batch_size": 3}},
            "train.batch_size=3 answers must be whole groups of rollouts.samples=2",
        ),
        (
            {"train": {"checkpoint_every": 3}},
            "train.checkpoint_every=3 must be a multiple of rollouts.updates=2",
        ),
        ({"rollouts": {"samples": 1}}, "rollouts.samples=1: an answer is compared with the others"),
        (
            {"rollouts": {"max_tokens": 60}},
            "rollouts.max_tokens=60 leaves no room for a prompt in data.seq_len=48",
        ),
        (
            {"rollouts": {"exact": True}},
            "rollouts.exact with updates=2: the later ones' values are routed by the weights as they are then",
        ),
        (
            {"rollouts": {"replicas": 1, "ahead": 1}, "loss": {"off_policy_delta": 0.0}},
            "rollouts.ahead=1: answers are of older weights, and nothing in the loss heeds it",
        ),
        ({"rewards": ("answr",)}, "did you mean 'answer'"),
    ],
)
def test_what_is_refused(undisturbed, changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        config(undisturbed[0], **changes)


def test_the_shipped_config_has_the_values_of_deepseek_r1():
    cfg = from_config_dict(v3_grpo.get_config(), GRPOConfig)
    rollouts, schedules = cfg.rollouts, Schedules.of_steps(cfg.optimizer, cfg.train, cfg.data.seq_len)
    assert (rollouts.samples, rollouts.temperature, rollouts.max_tokens) == (16, 1.0, 32768)
    assert (cfg.train.batch_size // rollouts.samples, cfg.train.batch_size) == (32, 512)
    assert (cfg.prompts_each * rollouts.samples, rollouts.updates, rollouts.reference_every) == (
        8192,
        16,
        400,
    )
    assert (cfg.loss.beta, cfg.loss.clip_low, cfg.loss.clip_high) == (0.001, 10.0, 10.0)
    # The rest is DeepSeek-V3.2's.
    assert dataclasses.replace(cfg.loss, clip_low=0.2, clip_high=0.2) == preset("v32")
    assert rollouts.keep_mask and rollouts.keep_routes
    assert {schedules.lr(step, 0) for step in (0, 800, 1696)} == {3e-6}


def test_prompts_that_the_first_reward_leaves_out_count_as_neither_right_nor_wrong():
    parts = ([1, 1, 0, 0], [np.nan] * 4, [0, 0, 0, 1])
    groups = [Group(None, [None] * 4, [""] * 4, np.zeros(4), {"answer": np.array(part)}) for part in parts]
    assert means(right(groups)) == {"pass_at_1": pytest.approx(3 / 8), "pass_at_k": 1.0}
    assert means(right(groups[1:2])) == {}


def test_rollouts_that_teach_nothing_are_said_once():
    noticed = Silence()
    quiet = {"silent_groups": 1.0, "reward": 0.0, "cut_off": 0.9}
    said = [noticed({**quiet, "silent_groups": share}, 32) for share in (1, 1, 0.5, 1, 1, 1, 1, 1)]
    assert [text is not None for text in said] == [False] * 5 + [True, False, False]
    assert "0 in the mean, and 90% of them were cut off at rollouts.max_tokens=32" in str(said[5])


def test_a_task_that_there_is_not_is_named_before_anything_runs(tmp_path):
    with pytest.raises(ValueError, match=r"'adition' is not one of .* did you mean 'addition'"):
        config(tmp_path, prompts={"sources": ("tasks:adition/1",)})
