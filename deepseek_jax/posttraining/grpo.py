"""Group Relative Policy Optimization (DeepSeek-V3 report section 5.2.2): a training run whose batches are rollouts.

    state -> rollout: prompts, G answers to each, what they are worth -> `rollouts.updates` batches -> as many steps

All else is a training run's: folder, checkpoints, average, records, mesh. A checkpoint lies between two rollouts. So a run
that was killed while it sampled, or between the updates of a rollout, makes that rollout again, and it is the same: the
weights are, and the key of each answer is made of (seed, step, place of its prompt, number of the answer). Rollouts begun ahead
(`rollouts.ahead`) are begun anew as well, with newer weights than they had.

Every process answers its share of the prompts, and scores its share of the answers. Held-out prompts are answered every
`train.eval_every` steps.
"""

import collections
import contextlib
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh

from deepseek_jax import now
from deepseek_jax.checks import require
from deepseek_jax.data.prompts import Prompt
from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.parallel.processes.together import of_each
from deepseek_jax.posttraining.asked_prompts import Asked, read_prompts
from deepseek_jax.posttraining.asking import for_rewards
from deepseek_jax.posttraining.author import Author
from deepseek_jax.posttraining.by_length import ByLength
from deepseek_jax.posttraining.engine_rollouts import EngineRollouts, Parameters
from deepseek_jax.posttraining.experience import (
    Group,
    Silence,
    abstract_rows,
    grouped,
    means,
    over_processes,
    rows_of,
    summary,
    width_for,
)
from deepseek_jax.posttraining.grpo_checks import check_checkpoint, check_held_out, check_windows
from deepseek_jax.posttraining.grpo_settings import GRPOConfig
from deepseek_jax.posttraining.judge_model import judge_of
from deepseek_jax.posttraining.logprobs import make_logprob_step
from deepseek_jax.posttraining.objective import grpo
from deepseek_jax.posttraining.ray_rollouts import RayRollouts
from deepseek_jax.posttraining.rewards import Rewards, columns_of, rewards_named
from deepseek_jax.posttraining.right_answers import HeldOut, right
from deepseek_jax.posttraining.rollouts import Rollouts, Sample, seed_of
from deepseek_jax.serving.options import Options
from deepseek_jax.training.loop import Result, Trainer
from deepseek_jax.training.records import Records
from deepseek_jax.training.schedules import StepPlan
from deepseek_jax.training.step import make_train_step

HELD_OUT = (
    1 << 32
) - 1  # in the place of a step, one word as these: seeds of held-out answers are those of no step


def make_step(cfg: GRPOConfig, mesh: Mesh | AbstractMesh, num_ids: int | None = None) -> Any:
    """`make_train_step` with the objective of GRPO. num_ids: ids from there on are never drawn; None: all are."""
    return make_train_step(cfg, mesh, grpo(cfg, cfg.loss, cfg.rollouts.temperature, num_ids))


class Begun(NamedTuple):
    """A rollout that was asked. state: of the stream before its prompts. asked: this process's, by their places in it."""

    state: Any
    asked: Mapping[int, Prompt]
    samples: Callable[[], list[Sample]]


class GRPO(Trainer):
    """A run.

    Args:
        cfg, mesh: as of `Trainer`.
        data: default: of `cfg.prompts`.
        rewards: default: those that `cfg.rewards` names.
        rollouts: who samples; default: the serving engine, on all devices of one process, or on the first of each of several.

    Raises ValueError for groups that do not divide over the processes, windows of a length that do not over the mesh, and as
    `Trainer`.
    """

    cfg: GRPOConfig

    def __init__(
        self,
        cfg: GRPOConfig,
        mesh: Mesh | None = None,
        data: Asked | None = None,
        rewards: Rewards | None = None,
        rollouts: Rollouts | None = None,
    ):
        mesh = make_mesh(cfg.mesh) if mesh is None else mesh
        check_windows(cfg, mesh)
        super().__init__(cfg, mesh, data)  # type: ignore[arg-type]
        self.step_fn = ByLength(lambda cfg, mesh: make_step(cfg, mesh, self._num_ids), cfg, mesh, at=1)
        temperature = cfg.rollouts.temperature
        self._logprobs = ByLength(
            lambda cfg, mesh: make_logprob_step(cfg, mesh, temperature, self._num_ids), cfg, mesh, at=2
        )
        if rewards is not None:
            self.rewards = rewards
        if rollouts is not None:
            self.rollouts = rollouts
        self._batches: list[Mapping[str, Any]] = []
        self._begun: collections.deque[Begun] = collections.deque()
        self._parts: list[list[Group]] = []  # the groups of each
        self._loaded, self._stopping, self._scoring = -1, False, 0.0
        self._of_rollout: dict[str, float] = {}
        self._silence = Silence()
        self.last_held_out: list[Group] = []
        require(
            not self.schedules.ramps(self.granularity),
            "the batch of a GRPO run has one size: set optimizer.batch_start=0, or optimizer.schedule",
        )
        groups, processes = cfg.train.batch_size // cfg.rollouts.samples, self.feed.share[1]
        require(
            groups % processes == 0,
            f"{groups} groups of train.batch_size={cfg.train.batch_size} do not divide over {processes} processes",
        )

    # --- what it has --------------------------------------------------------------------------------------------------

    @functools.cached_property
    def data(self) -> Asked:  # type: ignore[override]
        found = read_prompts(self.cfg)
        check_held_out(self.cfg, len(found.validation), self.feed.share[1])
        return found

    @functools.cached_property
    def _num_ids(self) -> int | None:
        """Ids of the model that the tokenizer knows, which are drawn; None: all."""
        there, model = "data" in vars(self) or self.cfg.data.tokenizer is None, self.cfg.model
        tokenizer = self.data.tokenizer if there else Tokenizer.load(str(self.cfg.data.tokenizer))
        return tokenizer.vocab_size if tokenizer.vocab_size < model.vocab_size else None

    @functools.cached_property
    def rewards(self) -> Rewards:
        cfg = self.cfg
        judges = {"judge": judge_of(cfg.judge, self._policy)} if cfg.judge.model else {}
        return rewards_named(cfg.rewards, cfg.reward, judges)

    @property
    def _policy(self) -> Author:
        """The model that is trained, for who asks it to judge."""
        return Author(self.rollouts, self.data.tokenizer, self.cfg.data.seq_len + 1, "policy")

    @functools.cached_property
    def rollouts(self) -> Rollouts:
        chosen = self.cfg.rollouts
        options = Options(
            rows=chosen.rows,
            max_model_len=self.cfg.data.seq_len + 1,
            waiting=1 << 30,
            pages=chosen.pages,
            invariant=chosen.exact,
            steady=True,
        )
        num_ids = self.data.tokenizer.vocab_size
        if chosen.replicas:
            return RayRollouts(self.cfg.model, options, num_ids, chosen.replicas)
        return EngineRollouts(self.cfg.model, self.mesh, self.cfg.mesh, options, num_ids)

    @functools.cached_property
    def reference(self) -> Any:
        """Parameters that the model should stay near to; None where nothing weighs that."""
        return _copied(self.state.params) if self.cfg.loss.beta else None

    def close(self) -> None:
        with contextlib.ExitStack() as whatever_fails:
            if "rollouts" in vars(self):
                whatever_fails.callback(self.rollouts.close)
            super().close()

    # --- checkpoints --------------------------------------------------------------------------------------------------

    def resume(self, step: int | None = None, discard_newer: bool = False) -> bool:
        """As `Run.resume`; raises ValueError as `check_checkpoint`."""
        at = self.checkpointer.latest() if step is None else step
        if at is not None and at in self.checkpointer.steps():
            check_checkpoint(self.cfg, self.checkpointer.directory, at)
        return super().resume(step, discard_newer)

    def data_state(self) -> Any:
        """What was begun and not trained on is asked again."""
        return self._begun[0].state if self._begun else super().data_state()

    def beside(self) -> Any:
        own = {"reference": self.reference} if self.cfg.loss.beta else {}
        return super().beside() | own

    def abstract_beside(self, params: Any) -> Any:
        own = {"reference": params} if self.cfg.loss.beta else {}
        return super().abstract_beside(params) | own

    def take_beside(self, restored: Any) -> None:
        super().take_beside(restored)
        if self.cfg.loss.beta:
            self.reference = restored["reference"]

    def _stops(self, wish: bool) -> bool:
        """Between two rollouts."""
        self._stopping |= super()._stops(wish)
        return self._stopping and self.step % self.cfg.rollouts.updates == 0

    def _abstract_batch(self) -> dict[str, Any]:
        return abstract_rows(self.cfg, self.mesh)

    # --- a rollout ----------------------------------------------------------------------------------------------------

    def _take(self, plan: StepPlan) -> Mapping[str, Any]:
        at = plan.step % self.cfg.rollouts.updates
        if at == 0:
            every = self.cfg.rollouts.reference_every
            if self.cfg.loss.beta and every and plan.step and plan.step % every == 0:
                self.reference = _copied(self.state.params)
            _ = self.reference
            if self.records is not None and not plan.step:  # where it begins
                self._evaluate_now(self.records)
            self._batches = self._rollout(plan.step)
        return self._exactly(at) if self.cfg.rollouts.exact else self._batches[at]

    def _exactly(self, at: int) -> Mapping[str, Any]:
        """Batch `at` of the rollout with what the sampler's programs say of it now."""
        batch, groups = self._batches[at], self._parts[at]
        if at == 0:  # as it was drawn
            return {**batch, "exact_logp": batch["sampler_logp"]}
        self._load()
        assert isinstance(self.rollouts, EngineRollouts)
        pairs = [(group.prompt.ids.tolist(), sample) for group in groups for sample in group.samples]
        found = self.rollouts.again(pairs, self.cfg.rollouts.sampling(self.data.tokenizer.stop_ids))
        exact = np.zeros((len(pairs), batch["tokens"].shape[1]), np.float32)
        for row, (prompt, _), logprobs in zip(exact, pairs, found, strict=True):
            row[len(prompt) :][: len(logprobs)] = logprobs
        return {**batch, **self.feed.put({"exact_logp": exact})}

    def _told(self) -> Mapping[str, float]:
        return self._of_rollout

    def _rollout(self, step: int) -> list[Mapping[str, Any]]:
        """The batches of a rollout with the weights as they are."""
        if self.records is not None:
            self.records.flush()  # the step before ends here: this rollout's seconds are not its own
        began, self._scoring = time.perf_counter(), 0.0
        first = now.doing("the first rollout, which compiles what samples")
        with contextlib.nullcontext() if self._batches else first:
            self._load()
            groups = self._groups(step)
        self._of_rollout |= {
            "sampling_seconds": time.perf_counter() - began - self._scoring,
            "scoring_seconds": self._scoring,
        }
        each = len(groups) // self.cfg.rollouts.updates
        parts = self._parts = [groups[at : at + each] for at in range(0, len(groups), each)]
        longest = of_each(np.array([max(group.longest for group in part) for part in parts])).max(0)
        batches: list[Mapping[str, Any]] = []
        for part, tokens in zip(parts, longest, strict=True):
            width = width_for(int(tokens), self.cfg.data.seq_len, self.cfg.rollouts.buckets)
            batches.append(self._with_logprobs(self.feed.put(rows_of(part, self.cfg.loss, width))))
        return batches

    def _with_logprobs(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The batch with the log-probabilities of its tokens before the updates, and the reference's."""
        of, bias = {"old_logp": self.state.params, "ref_logp": self.reference}, self.state.balance_bias
        found = {"old_logp": batch["sampler_logp"]} if self.cfg.old_of_sampler else {}
        for name in [name for name in of if name in self.cfg.logprobs and name not in found]:
            found[name] = self._logprobs(of[name], bias, batch).logp
        return batch | {name: found[name] for name in found if name in self.cfg.logprobs}

    def _load(self) -> None:
        if self._loaded != self.step:
            with now.doing("arranging the weights"):
                self.rollouts.load(Parameters(self.state.params, self.state.balance_bias), self.step)
            self._loaded = self.step

    def _groups(self, step: int) -> list[Group]:
        """This process's: of each batch, its share."""
        begun = self._begun_for(step)
        found = dict(zip(begun.asked, self._scored(list(begun.asked.values()), begun.samples()), strict=True))
        replaced = self._resampled(step, found)
        groups = list(found.values())
        stale = step - min(sample.version for group in groups for sample in group.samples)
        chosen = self.cfg.rollouts
        more = {"replaced": replaced} if chosen.resample else {"staleness": stale} if chosen.ahead else {}
        self._of_rollout = means(over_processes(summary(groups))) | more
        warning = self._silence(self._of_rollout, chosen.max_tokens)
        if warning and self.records is not None:
            self.records.say(warning)
        return groups

    def _begun_for(self, step: int) -> Begun:
        """The rollout of this step; those that are to be asked before their turn are begun."""
        updates = self.cfg.rollouts.updates
        while len(self._begun) <= self.cfg.rollouts.ahead:
            self._begun.append(self._begin(step + len(self._begun) * updates))
        return self._begun.popleft()

    def _begin(self, step: int) -> Begun:
        cfg, state = self.cfg, self.data.train.state()
        taken = self.data.train.take(cfg.prompts_each)
        part, parts = self.feed.share
        of_batches = np.split(np.arange(cfg.prompts_each), cfg.rollouts.updates)
        places = np.concatenate([np.split(places, parts)[part] for places in of_batches]).tolist()
        asked = {place: taken[place] for place in places}
        return Begun(state, asked, self._asking(asked, step, 0))

    def _asking(self, asked: Mapping[int, Prompt], step: int, again: int) -> Callable[[], list[Sample]]:
        """Samples of prompts by their places; the seed of each depends on nothing else that is asked."""
        cfg = self.cfg
        seeds = [seed_of(cfg.train.seed, step, again, place) for place in asked]
        sampling = cfg.rollouts.sampling(self.data.tokenizer.stop_ids)
        prompts = [prompt.ids.tolist() for prompt in asked.values()]
        given = (prompts, cfg.rollouts.samples, sampling, seeds)
        if isinstance(self.rollouts, RayRollouts):
            return self.rollouts.begin(*given)
        return functools.partial(self.rollouts.sample, *given)

    def _resampled(self, step: int, found: dict[int, Group]) -> int:
        """Replaces groups whose answers are all worth the same by those of other prompts, `rollouts.resample` times at most; how
        many, over all processes."""
        replaced = 0
        for again in range(1, self.cfg.rollouts.resample + 1):
            silent = np.zeros(self.cfg.prompts_each, bool)
            silent[[place for place in found if found[place].silent]] = True
            anywhere = np.flatnonzero(of_each(silent).any(0)).tolist()
            others = dict(zip(anywhere, self.data.train.take(len(anywhere)), strict=True))
            asked = {place: prompt for place, prompt in others.items() if place in found}
            if asked:
                samples = self._asking(asked, step, again)()
                found |= zip(asked, self._scored(list(asked.values()), samples), strict=True)
            replaced += len(anywhere)
        return replaced

    def _scored(self, prompts: Sequence[Prompt], samples: Sequence[Sample]) -> list[Group]:
        """The answers to each prompt, of which there are equally many. Raises what a reward raises."""
        texts = self.data.tokenizer.decode_batch([self._said(sample) for sample in samples])
        asked = [prompts[sample.prompt] for sample in samples]
        began = time.perf_counter()
        scores = self.rewards(
            [prompt.prompt for prompt in asked],
            for_rewards([prompt.ids.tolist() for prompt in prompts], samples, texts, self.data.tokenizer),
            [sample.tokens.tolist() for sample in samples],
            **columns_of([prompt.columns for prompt in asked]),
        )
        self._scoring += time.perf_counter() - began
        return grouped(prompts, samples, texts, scores)

    def _said(self, sample: Sample) -> list[int]:
        """Without the token that ended it."""
        tokens: list[int] = sample.tokens.tolist()
        return tokens[:-1] if tokens[-1] in self.data.tokenizer.stop_ids else tokens

    # --- held-out prompts ---------------------------------------------------------------------------------------------

    def evaluate(self, params: Any = None) -> HeldOut:  # type: ignore[override]
        """Of the present weights. All processes call it."""
        chosen = self.cfg.rollouts
        self._load()
        asked = self.data.validation[: chosen.eval_prompts]
        part, parts = self.feed.share
        mine = range(part, len(asked), parts)
        seeds = [seed_of(self.cfg.train.seed, HELD_OUT, place) for place in mine]
        sampling = chosen.evaluation(self.data.tokenizer.stop_ids)
        prompts = [asked[i] for i in mine]
        ids = [prompt.ids.tolist() for prompt in prompts]
        groups = self._scored(prompts, self.rollouts.sample(ids, chosen.eval_samples, sampling, seeds))
        self.last_held_out = groups
        return HeldOut.of(means(over_processes(summary(groups) | right(groups))), chosen.eval_samples)

    def _evaluate_now(self, records: Records) -> HeldOut:  # type: ignore[override]
        if self._evaluated is None or self._evaluated[0] != self.step:
            found = self.evaluate()
            self._evaluated = self.step, found  # type: ignore[assignment]
            text = f"held-out pass@1 {found.pass_at_1:.1%}, pass@{found.k} {found.pass_at_k:.1%}"
            records.held_out(self.step, found._asdict(), f"{text}, {found.answer_tokens:.1f} tokens")
        return self._evaluated[1]  # type: ignore[index,return-value]

    def _finish(self, records: Records) -> Result:
        evaluation = self._evaluate_now(records)
        with now.doing("saving"):
            self.checkpointer.wait()
        return Result(self.state, self.step, self.tokens, False, evaluation, None)  # type: ignore[arg-type]


def _copied(params: Any) -> Any:
    """That outlive the step which consumes these."""
    return jax.tree.map(jnp.copy, params)
