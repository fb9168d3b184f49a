"""What a context extension gave: needle grids and the loss on short windows, of the models before and after.

The models: as they were, as they were but for YaRN's positions, after the phases, and after the control's. All get the same
prompts and the same windows, texts that none of them trained on.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from deepseek_jax import data, now
from deepseek_jax.checkpoints import inventory
from deepseek_jax.checkpoints.files import locate
from deepseek_jax.config import Config, ModelConfig, to_dict
from deepseek_jax.data.text_files import from_object, write_file
from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.data.validation import Validation
from deepseek_jax.evaluation.needle import Grid, Question, grid, hay_of, questions
from deepseek_jax.json_files import read_object
from deepseek_jax.parallel.processes.together import is_first
from deepseek_jax.posttraining.extend import CONTROL, PHASE, ExtendConfig, before, stages
from deepseek_jax.training.evaluation import evaluate, nats_and_labels
from deepseek_jax.training.feeding import Feed
from deepseek_jax.training.passes import make_eval_step
from deepseek_jax.training.start import Start

FILE = "needle.json"


class Arm(NamedTuple):
    """Weights, and the positions with which they are looked at."""

    weights: str
    model: ModelConfig


class Found(NamedTuple):
    """Of one arm: nats per token on short windows, and its grid (None: there is none to be made)."""

    short_loss: float
    grid: Grid | None


def arms(cfg: ExtendConfig) -> dict[str, Arm]:
    """The models to compare, by name."""
    runs = stages(cfg)
    start = next(stage for stage in runs if stage.name == f"{PHASE}_1").cfg.train.init_from
    last = {stage.name.rpartition("_")[0]: str(stage.folder) for stage in runs}
    found = {
        "untouched": Arm(start, before(cfg.model)),
        "YaRN, untrained": Arm(start, cfg.model),
        f"after {len(cfg.phases.seq_len)} phase(s)": Arm(last[PHASE], cfg.model),
    }
    if cfg.control:
        found[f"after as much at {cfg.data.seq_len}"] = Arm(last[CONTROL], cfg.model)
    return found


@dataclasses.dataclass
class Comparison:
    """Looks at one arm after the other; what was found before lies in the folder and is not looked for again."""

    cfg: ExtendConfig
    mesh: Mesh

    def __post_init__(self):
        self._run: Config = stages(self.cfg)[0].cfg
        assert self._run.data.tokenizer is not None
        self._tokenizer = Tokenizer.load(self._run.data.tokenizer)
        self._file = Path(self.cfg.train.out_dir) / FILE
        self._windows, self._questions = self._short_windows(), self._asked()

    def __iter__(self) -> Iterator[tuple[str, Found]]:
        known: dict[str, Any] = read_object(self._file) if self._file.is_file() else {}
        for name, arm in arms(self.cfg).items():
            asked = self._described(arm)
            if known.get(name, {}).get("of") != asked:
                found = self._found(name, arm)
                right = None if found.grid is None else found.grid.right.tolist()
                known[name] = {"of": asked, "short_loss": found.short_loss, "right": right}
                if is_first():
                    write_file(self._file, from_object(known))
            yield name, self._read(known[name])

    def _short_windows(self) -> Validation:
        """Of the texts trained on before, without those to learn recall from."""
        plain = dataclasses.replace(self.cfg.data, tokenizer=self._run.data.tokenizer)
        loaded = data.load(plain)
        loaded.train.close()
        return loaded.validation.subset(self.cfg.train.eval_windows)

    def _asked(self) -> list[Question]:
        if not self.cfg.needle.lengths:
            return []
        hay = hay_of(self.cfg.data, self.cfg.needle, self._tokenizer, held_out=True)
        return questions(self.cfg.needle, hay, self._tokenizer)

    def _described(self, arm: Arm) -> dict[str, Any]:
        """What decides the findings on an arm, as JSON has it."""
        folder = Path(arm.weights).expanduser()
        weights = folder if (folder / "config.json").is_file() else locate(folder)[0]
        listed = weights / ("model.safetensors.index.json" if weights is folder else inventory.FILES)
        asked = {
            "weights": str(weights),
            "files": hashlib.sha256(listed.read_bytes()).hexdigest() if listed.is_file() else None,
            "model": to_dict(arm.model),
            "needle": to_dict(self.cfg.needle),
            "windows": [len(self._windows), self.cfg.data.seq_len],
        }
        return json.loads(json.dumps(asked))  # type: ignore[no-any-return]

    def _found(self, name: str, arm: Arm) -> Found:
        run = dataclasses.replace(
            self._run,
            model=arm.model,
            data=dataclasses.replace(self._run.data, seq_len=self.cfg.data.seq_len),
            train=dataclasses.replace(self._run.train, init_from=arm.weights),
        )
        with now.doing(f"short windows and needles: {name}"):
            state = Start(run, self.mesh).read()
            held = state.params, state.balance_bias
            loss = evaluate(make_eval_step(run, self.mesh), *held, self._windows, Feed(self.mesh)).loss
            if not self._questions:
                return Found(loss, None)

            def nats(batch: dict[str, np.ndarray]) -> np.ndarray:
                data = dataclasses.replace(run.data, seq_len=batch["tokens"].shape[1] - 1)
                step = make_eval_step(dataclasses.replace(run, data=data), self.mesh)
                return nats_and_labels(step, *held, batch, Feed(self.mesh))[0]

            return Found(loss, grid(self.cfg.needle, self._questions, nats))

    def _read(self, known: dict[str, Any]) -> Found:
        right, cfg = known["right"], self.cfg.needle
        if right is None:
            return Found(known["short_loss"], None)
        return Found(known["short_loss"], Grid(cfg.lengths, cfg.depths, np.array(right), cfg.samples))
