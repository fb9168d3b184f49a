"""A run starts from the weights of `train.init_from`: a run, one of its checkpoints, or a Hugging Face folder.

Parameters are read straight onto the mesh, each device its own slices, in float32, with fresh moments, and the balance
bias. The average of the parameters begins anew: it is that of one run.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh

from deepseek_jax import hf
from deepseek_jax.checkpoints.arrays import PyTree, array_shapes, read_onto, shapes_of
from deepseek_jax.checkpoints.changes import differing
from deepseek_jax.checkpoints.files import guarded, locate, read_meta, verify
from deepseek_jax.checks import listed, names_that_differ
from deepseek_jax.config import Config, to_dict
from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.hf.names import leaves
from deepseek_jax.training.finite import not_finite
from deepseek_jax.training.optimizer import adamw
from deepseek_jax.training.state import TrainState, state_shardings
from deepseek_jax.training.step import abstract_state

_MAX_NAMED = 8  # arrays listed in an error


class Start:
    """Where a run starts. The constructor looks at configs and shapes only.

    differences: what the source's model config says otherwise without another shape, in words.
    trained_length: tokens of the windows that a run's weights were trained on; None: not known (Hugging Face).

    Raises ValueError (CheckpointError): no checkpoint there, a damaged one, FP8 in orbax; parameters of other shapes,
    all named.
    """

    def __init__(self, cfg: Config, mesh: Mesh | AbstractMesh):
        self._cfg, self._mesh = cfg, mesh
        self._wanted = abstract_state(cfg, mesh)
        self._path = Path(cfg.train.init_from).expanduser().absolute()
        self._is_hf = (self._path / "config.json").is_file()
        self._root = self._path
        self._with_mtp = cfg.model.num_nextn_predict_layers > 0
        if self._is_hf:
            checkpoint = hf.Checkpoint(self._path, self._with_mtp)
            model = to_dict(checkpoint.cfg)
            found = {path: leaf.shape for path, leaf in leaves(checkpoint.cfg).items()}
            self._meta: Mapping[str, Any] = {}
        else:
            self._path, self._root = locate(self._path)
            verify(self._path, ("meta",))
            self._meta = read_meta(self._path)
            model = self._meta["config"].get("model", {})
            found = array_shapes(self._path / "state", "params")
        self.differences = differing(model, to_dict(cfg.model), "model.")
        ours = bool(self._meta) and "huggingface" not in self._meta  # trained here, not converted
        self.trained_length: int | None = self._meta["config"]["data"]["seq_len"] if ours else None
        self._compare(found)

    @property
    def provenance(self) -> dict[str, Any]:
        """Where the weights come from, as checkpoints keep it: the folder, with a run's step and tokens, how its model config
        differed, and where the weights of that run came from in turn."""
        known = {name: self._meta[name] for name in ("step", "tokens") if name in self._meta}
        before = {"before": self._meta["provenance"]} if self._meta.get("provenance") else {}
        return {"weights": str(self._path), **known, "differences": self.differences, **before}

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Raises ValueError if the source has another tokenizer: its ids would mean other text."""
        file = self._root / "tokenizer.json"
        if file.is_file() and Tokenizer.load(self._root).fingerprint != tokenizer.fingerprint:
            raise ValueError(
                f"train.init_from={self._cfg.train.init_from}: its tokenizer is not this run's; "
                f"set config.data.tokenizer={self._root}"
            )

    def read(self) -> TrainState:
        """The state before the first step. All processes call it.

        Raises ValueError: damaged, or with NaN or infinity.
        """
        shardings = state_shardings(self._cfg, self._mesh)
        params, host_bias = self._from_hf(shardings.params) if self._is_hf else self._from_orbax()
        bias = jax.make_array_from_callback(
            host_bias.shape, shardings.balance_bias, lambda index: host_bias[index]
        )
        if bad := not_finite({"params": params, "balance_bias": bias}):
            raise ValueError(f"{self._path} holds NaN or infinity in {', '.join(bad[:_MAX_NAMED])}")
        init = adamw(self._cfg.optimizer).init
        create = jax.jit(
            lambda params, bias: TrainState.create(params, init(params), bias),
            out_shardings=shardings,
            donate_argnums=(0, 1),
        )
        return create(params, bias)

    def _from_hf(self, shardings: PyTree) -> tuple[PyTree, np.ndarray]:
        _, params, bias = hf.load(self._path, dtype="float32", mtp=self._with_mtp, shardings=shardings)
        return params, np.asarray(bias)

    def _from_orbax(self) -> tuple[PyTree, np.ndarray]:
        verify(self._path, ("state",), together=True)
        target = {"params": self._wanted.params, "balance_bias": self._wanted.balance_bias}
        tree = guarded(self._path, lambda: read_onto(self._path / "state", target))
        return tree["params"], np.asarray(tree["balance_bias"])

    def _compare(self, found: dict[str, tuple[int, ...]]) -> None:
        if any(name.endswith(".fp8") for name in found):
            raise ValueError(
                f"{self._path} holds FP8 matrices, which are no weights to train: convert them with "
                "experiments.convert --format=bf16, or name the Hugging Face folder itself"
            )
        wanted = shapes_of(self._wanted.params)
        other = [
            f"{name} is {_shown(found.get(name))} there, {_shown(wanted.get(name))} here"
            for name in names_that_differ(found, wanted)
        ]
        if other:
            keys = "; ".join(self.differences)
            raise ValueError(
                f"train.init_from={self._cfg.train.init_from} does not fit the model: {keys}; arrays: "
                + listed(other, _MAX_NAMED)
            )


def _shown(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else str(list(shape))
