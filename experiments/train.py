"""Train a model: `python -m experiments.train --config=configs/tiny.py [--config.train.steps=...]`.

Resumes by itself from the newest checkpoint in `train.out_dir`. SIGTERM and Ctrl-C save and exit. At the end it
prints the validation loss beside a unigram model's, shows how the model goes on with held-out documents, writes
`report.png` and warns of what went wrong. `--profile_steps=10:15` profiles these steps.

Several processes: `python -m experiments.launch --processes=2 -- python -m experiments.train ...` on one machine, a
job of SLURM, Kubernetes or Open MPI (configs/launch), or the same command on every host with
`--config.distributed.coordinator=HOST:PORT --config.distributed.processes=N --config.distributed.process=I`.
"""

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from absl import flags

from deepseek_jax import now
from deepseek_jax.config import Config
from deepseek_jax.parallel.pipeline.pipeline import described
from deepseek_jax.parallel.processes import joining
from deepseek_jax.parallel.processes.together import is_first, whole_copy
from experiments import command_line, config_flag, dry_run
from experiments.devices import devices_of_run
from experiments.screen import SCREEN

DEFAULT_CONFIG = "configs/tiny.py"
_FROM_STEP = flags.DEFINE_integer("from_step", None, "Resume from this checkpoint instead of the newest.")
_DISCARD_NEWER = flags.DEFINE_bool(
    "discard_newer",
    False,
    "With --from_step: remove the newer checkpoints and the records after that step. At every start: not for a "
    "supervisor that repeats the command, as launch --restarts.",
)
_STOPPED_STATUS = flags.DEFINE_integer(
    "stopped_status", 0, "Exit status after SIGTERM or Ctrl-C, for supervisors that take 0 as a finished run."
)
_FRESH = flags.DEFINE_bool("fresh", False, "Refuse to resume: the output folder must hold no checkpoint.")
_DRY_RUN = flags.DEFINE_bool(
    "dry_run", False, "Check the config, say what the run would be (parameters, memory, steps), and end."
)
_PROFILE_STEPS = flags.DEFINE_string(
    "profile_steps", None, "FIRST:LAST: a profile of these steps is written into the run's folder."
)


class Command(NamedTuple):
    """What is different in the commands that train, of which this is one.

    default: the config's file where none is named. whole: the config's dataclass. trainer: of a config. samples: of a trainer,
    whole parameters and bias, texts by title of what the model makes of held-out ones. heading: of a title. finish: reports a
    finished run; None: as of pre-training, with the samples. step: which --dry_run traces.
    """

    default: str
    whole: type[Config]
    trainer: Callable[[Any], Any]
    samples: Callable[[Any, Any, Any], Mapping[str, str]] | None
    heading: str
    finish: Callable[..., None] | None = None
    step: Callable[..., tuple[Any, Any]] = dry_run.pre_training


def _pre_trainer(cfg: Config) -> Any:
    from deepseek_jax.training import loop

    return loop.Trainer(cfg)


def _completions(trainer, params, bias) -> Mapping[str, str]:
    from experiments.samples import samples

    with now.doing("completing held-out documents"):
        return samples(trainer.cfg, params, bias, trainer.data.tokenizer, trainer.data.validation)


PRE_TRAINING = Command(
    DEFAULT_CONFIG,
    Config,
    _pre_trainer,
    _completions,
    "held-out document, {}, from >> on the model's ",
)


def _finish(command: Command, trainer, result, weights) -> None:
    """Reports a finished run. `weights` are whole parameters and bias, or None for no samples."""
    out_dir, unigram = trainer.out_dir, trainer.unigram
    last, averaged = result.evaluation, result.ema_evaluation
    print(f"\nvalidation loss {last.loss:.3f} nats per token, {last.bits_per_byte:.3f} bits per byte")
    print(f"  averaged parameters: {averaged.loss:.3f}, {averaged.bits_per_byte:.3f}")
    print(f"  unigram model:       {unigram.nats_per_token:.3f}, {unigram.bits_per_byte:.3f}")
    if weights is not None:
        _show_samples(command, trainer, result.step, weights)
    warnings = _draw(trainer)
    for warning in warnings:
        print(f"warning: {warning}")
    print(
        f"picture: {out_dir / 'report.png'}\nmetrics: {out_dir / 'metrics.jsonl'}, {out_dir / 'tensorboard'}"
    )
    print(f"checkpoints: {out_dir / 'checkpoints'}", flush=True)


def _draw(trainer) -> list[str]:
    """Draws the picture of the run; returns warnings of what is wrong with the run."""
    from deepseek_jax.training.advice import History, advice, layer_names
    from deepseek_jax.training.metrics import METRICS_FILE, read_records
    from deepseek_jax.training.report import write_report

    cfg, out_dir, unigram = trainer.cfg, trainer.out_dir, trainer.unigram.nats_per_token
    with now.doing("drawing the picture"):
        records = read_records(out_dir / METRICS_FILE)
        warnings = [one.text for one in advice(cfg, History(records), unigram)]
        write_report(records, out_dir / "report.png", unigram, out_dir.name, warnings, layer_names(cfg))
    return warnings


def _show_samples(command: Command, trainer, step: int, weights) -> None:
    assert command.samples is not None
    texts = command.samples(trainer, *weights)
    trainer.records.samples(step, texts)
    for name, text in texts.items():
        print(f"\n--- {command.heading.format(name)}".ljust(76, "-"))
        print(text)
    print("-" * 75)


def _first_and_last(steps: str | None) -> tuple[int, int] | None:
    """Reads "10:15" as (10, 15). Raises ValueError for anything else."""
    if steps is None:
        return None
    first, _, last = steps.partition(":")
    if not (first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
        raise ValueError(f"--profile_steps={steps} should be FIRST:LAST, steps counted from 1, as 10:15")
    return int(first), int(last)


def _tell_begun(trainer, resumed: bool) -> None:
    """Prints where the run starts, and what it is."""
    cfg, schedules = trainer.cfg, trainer.schedules
    if resumed:
        print(f"resumed from step {trainer.step} in {trainer.checkpointer.directory}")
        if trainer.changes.schedule:
            print(f"  THE SCHEDULE BENDS HERE: {'; '.join(trainer.changes.schedule)}")
        if trainer.changes.other:
            print(f"  other settings than the checkpoint's: {'; '.join(trainer.changes.other)}")
    else:
        if cfg.train.init_from:
            print(f"starts from the weights of {cfg.train.init_from}")
        if trainer.differences:
            print(f"  whose config differs: {'; '.join(trainer.differences)}")
    devices = trainer.mesh.devices.flat
    print(f"{dry_run.model_line(cfg)}\ndata: {trainer.data.report.summary()}")
    print(
        f"run: {trainer.total_steps:,} steps, {schedules.total_tokens:,} tokens on {len(devices)} device(s) of "
        f"{len({d.process_index for d in devices})} process(es)"
    )
    print("".join(f"{line}\n" for line in described(cfg, trainer.mesh.shape)), end="")
    if trainer.nothing_left():
        done = f"step {trainer.step}, {trainer.tokens:,} tokens"
        print(f"nothing is left to train: {done}; for more, raise train.steps={cfg.train.steps}")
    sys.stdout.flush()


def run(
    cfg: Config,
    from_step: int | None = None,
    fresh: bool = False,
    stopped_status: int = 0,
    discard_newer: bool = False,
    profile_steps: tuple[int, int] | None = None,
    command: Command = PRE_TRAINING,
) -> int:
    """Trains; returns the process's exit status."""
    from deepseek_jax.training.loop import NonFiniteError, stop_on_signals

    # Innermost, `failing_fast` spares a process that lost the others the waiting in `close`.
    failing_fast = joining.failing_fast
    with stop_on_signals(SCREEN.stopping) as stop, contextlib.ExitStack() as stack:
        with failing_fast(command_line.complain):
            trainer = stack.enter_context(contextlib.closing(command.trainer(cfg)))
            trainer.check()
        with failing_fast(command_line.complain):
            if fresh and trainer.checkpointer.latest() is not None:
                raise ValueError(
                    f"--fresh: {trainer.checkpointer.directory} holds checkpoints; remove it first"
                )
            trainer.compile()
            resumed = trainer.resume(from_step, discard_newer)
            if cfg.train.init_from and not resumed:
                _ = trainer.state
            if is_first():
                _tell_begun(trainer, resumed)
            try:
                result = trainer.run(stop, profile_steps=profile_steps)
            except NonFiniteError as error:  # on all processes at the same step
                command_line.complain(str(error))
                return command_line.FAILURE
            except OSError as error:  # a full disk, often without a name
                raise OSError(
                    f"the run in {trainer.out_dir} ended after step {trainer.step}: {error}"
                ) from error
            if result.stopped:
                if is_first():
                    print(f"stopped at step {result.step}; the same command goes on from there", flush=True)
                return stopped_status
            held = (result.state.params, result.state.balance_bias)
            weights = whole_copy(held, trainer.mesh) if cfg.train.sample_tokens else None
            if is_first():
                (command.finish or _finish)(command, trainer, result, weights)
            return 0


def main(argv: Sequence[str], command: Command = PRE_TRAINING) -> int:
    cfg = config_flag.parse(argv, default=command.default, whole=command.whole)
    if not any(argument.lstrip("-").startswith("config=") or argument == "--config" for argument in argv):
        SCREEN.line(f"the config is {command.default}, as no --config names another")
    if _DRY_RUN.value:
        devices_of_run(cfg)
        print(dry_run.report(cfg, command.step))
        return 0
    profile_steps = _first_and_last(_PROFILE_STEPS.value)
    resuming = _FROM_STEP.value, _FRESH.value, _STOPPED_STATUS.value, _DISCARD_NEWER.value
    return joined(cfg, lambda: run(cfg, *resuming, profile_steps, command))


def joined(cfg: Config, run: Callable[[], int]) -> int:
    """Chooses this process's devices, meets the other processes, if there are any, and runs; returns the exit status."""
    join = joining.find(cfg.distributed, os.environ)
    processes = (join.processes if join else None) or 1
    devices_of_run(cfg, processes)
    if join is not None:
        try:
            joining.start(join, cfg.distributed)
        except TimeoutError as error:
            command_line.complain(str(error))
            os._exit(joining.ABANDONED)  # a thread waits for the others, and would abort the process
        SCREEN.quiet = not is_first()
    try:
        status = run()
    except ValueError as error:
        step = getattr(error, "older_step", None)
        if step is None:
            raise
        raise ValueError(f"{error} (to go on from there: --from_step={step} --discard_newer)") from error
    joining.stop()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the interpreter's own end at once
    return status


if __name__ == "__main__":
    command_line.run(main)
