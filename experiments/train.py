"""Train a model: `python -m experiments.train --config=configs/tiny.py [--config.train.steps=...]`.

Resumes by itself from the newest checkpoint in `train.out_dir`. SIGTERM and Ctrl-C save and exit. At the end it
prints the validation loss beside a unigram model's, writes `report.png` and shows two completions.

Several processes: `python -m experiments.launch --processes=2 -- python -m experiments.train ...` on one machine, a
job of SLURM, Kubernetes or Open MPI (configs/launch), or the same command on every host with
`--config.distributed.coordinator=HOST:PORT --config.distributed.processes=N --config.distributed.process=I`.
"""

import contextlib
import os
from collections.abc import Sequence

from absl import flags

from deepseek_jax.config import Config
from deepseek_jax.parallel import distributed
from deepseek_jax.parallel.together import is_first, whole_copy
from experiments import command_line, config_flag
from experiments.devices import one_device_per_core

_FROM_STEP = flags.DEFINE_integer("from_step", None, "Resume from this checkpoint instead of the newest.")
_DISCARD_NEWER = flags.DEFINE_bool(
    "discard_newer", False, "With --from_step: remove the newer checkpoints and the records after that step."
)
_STOPPED_STATUS = flags.DEFINE_integer(
    "stopped_status",
    0,
    "Exit status after SIGTERM or Ctrl-C, for supervisors that take 0 as the end of the run.",
)
_FRESH = flags.DEFINE_bool("fresh", False, "Refuse to resume: the output folder must hold no checkpoint.")

PLAIN_PROMPT = "def read(self, size=-1):\n    "
FIM_PROMPT = ("def __init__(self, name, value):\n        self.name = ", "\n        self.value = value\n")


def _describe(cfg: Config, trainer) -> None:
    model, data = cfg.model, trainer.data
    print(
        f"model: {model.num_params():,} parameters, {model.num_active_params():,} active per token "
        f"(without the embedding), {model.num_mtp_params():,} more in MTP modules"
    )
    print(f"data: {data.report.summary()}")
    tokens = trainer.schedules.total_tokens
    print(
        f"run: {trainer.total_steps:,} steps, {tokens:,} tokens on {trainer.mesh.size} device(s) of "
        f"{len({d.process_index for d in trainer.mesh.devices.flat})} process(es)",
        flush=True,
    )


def _complete(trainer, params, balance_bias) -> None:
    """One plain completion and one in the middle, sampled: so small a model repeats itself when greedy."""
    from deepseek_jax.data.fim import fim_prompt
    from deepseek_jax.inference.generate import generate
    from deepseek_jax.inference.sampling import Sampling

    cfg, tokenizer = trainer.cfg, trainer.data.tokenizer
    plain = tokenizer.encode(PLAIN_PROMPT)
    middle = fim_prompt(*FIM_PROMPT, tokenizer)
    out = generate(
        params,
        cfg.model,
        [plain, middle],
        min(cfg.train.sample_tokens, cfg.model.max_position_embeddings - max(len(plain), len(middle))),
        balance_bias=balance_bias,
        sampling=Sampling(temperature=0.7, top_p=0.9),
        stop_ids=[tokenizer.eos_id],
        num_ids=tokenizer.vocab_size,
    )
    print("\n--- completion " + "-" * 60)
    print(PLAIN_PROMPT + tokenizer.decode(out[0], skip_special=True))
    print("--- fill in the middle, between >> and << " + "-" * 33)
    print(f"{FIM_PROMPT[0]}>>{tokenizer.decode(out[1], skip_special=True)}<<{FIM_PROMPT[1]}")
    print("-" * 75)


def _finish(trainer, result, weights) -> None:
    """Report of a finished run; `weights`: whole parameters and bias, or None for no completions."""
    from deepseek_jax.training.report import write_report

    unigram = trainer.data.unigram(trainer.data.validation.subset(trainer.cfg.train.eval_windows))
    last, averaged = result.evaluation, result.ema_evaluation
    print(f"\nvalidation loss {last.loss:.3f} nats per token, {last.bits_per_byte:.3f} bits per byte")
    print(f"  averaged parameters: {averaged.loss:.3f}, {averaged.bits_per_byte:.3f}")
    print(f"  unigram model:       {unigram.nats_per_token:.3f}, {unigram.bits_per_byte:.3f}")
    picture = trainer.out_dir / "report.png"
    write_report(
        trainer.out_dir / "metrics.jsonl", picture, unigram.nats_per_token, f"{trainer.out_dir.name}"
    )
    if weights is not None:
        _complete(trainer, *weights)
    print(
        f"picture: {picture}\nmetrics: {trainer.out_dir / 'metrics.jsonl'}, {trainer.out_dir / 'tensorboard'}"
    )
    print(f"checkpoints: {trainer.out_dir / 'checkpoints'}", flush=True)


def _tell_resumed(trainer) -> None:
    print(f"resumed from step {trainer.step} in {trainer.checkpointer.directory}")
    if trainer.changes.schedule:
        print(f"  THE SCHEDULE BENDS HERE: {'; '.join(trainer.changes.schedule)}")
    if trainer.changes.other:
        print(f"  other settings than the checkpoint's: {'; '.join(trainer.changes.other)}")


def run(
    cfg: Config,
    from_step: int | None = None,
    fresh: bool = False,
    stopped_status: int = 0,
    discard_newer: bool = False,
) -> int:
    """Train; the process's exit status."""
    from deepseek_jax.training.loop import NonFiniteError, Trainer, stop_on_signals

    # Innermost, `failing_fast` spares a process that lost the others the waiting in `close`.
    failing_fast = distributed.failing_fast
    with stop_on_signals() as stop, contextlib.ExitStack() as stack:
        with failing_fast(command_line.complain):
            trainer = stack.enter_context(contextlib.closing(Trainer(cfg)))
        with failing_fast(command_line.complain):
            if fresh and trainer.checkpointer.latest() is not None:
                raise ValueError(
                    f"--fresh: {trainer.checkpointer.directory} holds checkpoints; remove it first"
                )
            if trainer.resume(from_step, discard_newer) and is_first():
                _tell_resumed(trainer)
            if is_first():
                _describe(cfg, trainer)
            try:
                result = trainer.run(stop)
            except NonFiniteError as error:  # on all processes at the same step
                command_line.complain(str(error))
                return 1
            if result.stopped:
                if is_first():
                    print(f"stopped at step {result.step}; the same command goes on from there", flush=True)
                return stopped_status
            weights = (result.state.params, result.state.balance_bias)
            weights = whole_copy(weights, trainer.mesh) if cfg.train.sample_tokens else None
            if is_first():
                _finish(trainer, result, weights)
            return 0


def main(argv: Sequence[str]) -> int:
    cfg = config_flag.parse(argv, default="configs/tiny.py")
    join = distributed.find(cfg.distributed, os.environ)
    processes = (join.processes if join else None) or 1
    one_device_per_core(cfg.train.batch_size // cfg.train.grad_accumulation // processes)
    if join is not None:
        try:
            distributed.start(join, cfg.distributed)
        except TimeoutError as error:
            command_line.complain(str(error))
            os._exit(distributed.ABANDONED)  # a thread waits for the others, and would abort the process
    try:
        status = run(cfg, _FROM_STEP.value, _FRESH.value, _STOPPED_STATUS.value, _DISCARD_NEWER.value)
    except ValueError as error:
        step = getattr(error, "older_step", None)
        if step is None:
            raise
        raise ValueError(f"{error} (to go on from there: --from_step={step} --discard_newer)") from error
    distributed.stop()
    return status


if __name__ == "__main__":
    command_line.run(main)
