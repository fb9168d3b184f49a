"""The progress line of a run: loss, tokens per second, what is left."""

import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import tqdm


class Progress:
    """One line on stderr: loss, MTP loss, tokens/s, MFU, MaxVio and the time left.

    The line appears with the first finished step: until then there is nothing to say but what is being done.

    Args:
        total_steps: of the whole run.
        initial: steps taken before, in a resumed run.
        file: default stderr; if it is no terminal, a line is written twice a minute.
    """

    def __init__(self, total_steps: int, initial: int = 0, file: Any = None):
        self._file = sys.stderr if file is None else file
        self._total, self._initial, self._began = total_steps, initial, time.time()
        self._bar: tqdm.tqdm | None = None

    def update(self, step: int, values: Mapping[str, Any], seconds_left: float | None = None) -> None:
        """Shows `step` steps taken, and of `values` (a record): loss, mtp_loss, reward, tokens_per_s, mfu, max_vio."""
        left = "" if seconds_left is None else f", {tqdm.tqdm.format_interval(seconds_left)} left"
        first = self._bar is None
        bar = self._bar = self._bar or self._begin()
        bar.set_postfix_str(progress_text(values) + left, refresh=False)
        bar.update(step - bar.n)
        if first:
            bar.refresh()

    def write(self, text: str) -> None:
        """A line of its own above the bar."""
        tqdm.tqdm.write(text, file=self._file)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def _begin(self) -> tqdm.tqdm:
        bar = tqdm.tqdm(
            total=self._total,
            initial=self._initial,
            file=self._file,
            mininterval=0.2 if self._file.isatty() else 30.0,
            delay=1e-9,  # not yet: the first update shows it
            dynamic_ncols=True,
            bar_format="{percentage:3.0f}%|{bar:12}| {n_fmt}/{total_fmt} [{elapsed}]{postfix}",
        )
        bar.start_t = self._began
        return bar


def progress_text(values: Mapping[str, Any]) -> str:
    """The figures of a record as one short text; missing ones are left out. MaxVio: mean over the layers."""
    formats: dict[str, Callable[[Any], str]] = {
        "loss": lambda x: f"loss {x:.3f}",
        "mtp_loss": lambda x: f"MTP {x:.3f}",
        "reward": lambda x: f"reward {x:.3f}",
        "tokens_per_s": lambda x: f"{x:,.0f} tok/s",
        "mfu": lambda x: f"MFU {x:.1%}",
        "max_vio": lambda x: f"MaxVio {np.mean(x):.2f}" if np.size(x) else "",
    }
    texts = (show(values[name]) for name, show in formats.items() if values.get(name) is not None)
    return ", ".join(text for text in texts if text)
