"""TensorBoard and Weights & Biases show a run's records.

Both are `Writer`s of the same records as the metrics file. They show numbers as curves, vectors as one curve per
index, matrices [layer, expert] as a histogram of the load relative to its layer's mean, and text as it is. Numbers
that are not finite are left out.
"""

import html
import json
import sys
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np


class Writer(Protocol):
    """An object that takes the records of a run."""

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...


def tagged(kind: str, values: Mapping[str, Any]) -> Iterator[tuple[str, float | str | np.ndarray]]:
    """(tag, number, text or the loads [n] of a histogram) of everything in a record that can be shown."""
    for name, value in values.items():
        yield from _tagged(f"{kind}/{name}", np.asarray(value))


def _tagged(tag: str, array: np.ndarray) -> Iterator[tuple[str, float | str | np.ndarray]]:
    if array.dtype.kind == "U" and array.ndim == 0:
        yield tag, str(array)
    elif array.ndim == 1:
        for index, element in enumerate(array):
            yield from _tagged(f"{tag}/{index}", element)
    elif np.issubdtype(array.dtype, np.number) and array.size and np.isfinite(array).all():
        mean = np.maximum(array.mean(-1, keepdims=True), np.finfo(np.float32).tiny) if array.ndim else 1
        yield tag, (array / mean).ravel() if array.ndim else float(array)


def _tensorboard() -> Any:
    """Imports tensorboardX without PyTorch, whose import takes seconds and serves tensors that no record contains."""
    hidden = "torch" not in sys.modules
    if hidden:
        sys.modules["torch"] = None  # type: ignore[assignment]  # its import raises ImportError
    try:
        import tensorboardX
    finally:
        if hidden:
            del sys.modules["torch"]
    return tensorboardX


class TensorBoard:
    """Event files in `<directory>/tensorboard`; the config is shown as text.

    Args:
        directory: the run's.
        config: nested, JSON-serialisable.
        resume_step: None starts anew; else TensorBoard hides what was written after this step.
    """

    def __init__(self, directory: Path, config: Mapping[str, Any], resume_step: int | None = None):
        purge = None if resume_step is None else resume_step + 1
        self._board = _tensorboard().SummaryWriter(str(directory / "tensorboard"), purge_step=purge)
        self._board.add_text("config", _verbatim(json.dumps(config, indent=2)), purge or 0)

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        for tag, shown in tagged(kind, values):
            if isinstance(shown, str):
                self._board.add_text(tag, _verbatim(shown), step)
            elif isinstance(shown, float):
                self._board.add_scalar(tag, shown, step)
            else:
                self._board.add_histogram(tag, shown, step)

    def close(self) -> None:
        self._board.close()


def _verbatim(text: str) -> str:
    """Markdown that shows `text` as it is, line breaks and stars included."""
    return textwrap.indent(text, "    ", lambda _: True)


def wandb_for(project: str) -> Any:
    """The package wandb. Raises ValueError where it is not installed."""
    try:
        import wandb
    except ImportError as error:
        raise ValueError(
            f"train.wandb={project!r} needs the package wandb: pip install 'deepseek-jax[wandb]', "
            "or set train.wandb='' to go without"
        ) from error
    return wandb


class WeightsAndBiases:
    """A run at Weights & Biases, with the config. `WANDB_MODE=offline` keeps it in the run's folder.

    The id of the run is kept in `<directory>/wandb_id`, so that a resumed run goes on in the same curves. The axis is
    the record's "step", not the order of writing: steps taken again after a kill are drawn over the lost ones.

    Args:
        directory: the run's.
        config: nested, JSON-serialisable.
        project: where the run belongs.
        resume: whether this run goes on from a checkpoint.

    Raises:
        ValueError: the package is not installed.
    """

    def __init__(self, directory: Path, config: Mapping[str, Any], project: str, resume: bool = False):
        self._wandb, kept = wandb_for(project), directory / "wandb_id"
        self._run = self._wandb.init(
            project=project,
            name=directory.name,
            dir=str(directory),
            config=dict(config),
            id=kept.read_text() if resume and kept.exists() else None,
            resume="allow",
        )
        kept.write_text(self._run.id)
        self._run.define_metric("*", step_metric="step")

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        self._run.log({"step": step} | {tag: self._shown(x) for tag, x in tagged(kind, values)})

    def _shown(self, value: float | str | np.ndarray) -> Any:
        if isinstance(value, str):
            return self._wandb.Html(f"<pre>{html.escape(value)}</pre>")
        return value if isinstance(value, float) else self._wandb.Histogram(value)

    def close(self) -> None:
        self._run.finish()
