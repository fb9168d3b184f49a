"""`deepseek_jax.load(path) -> Model`: a Hugging Face folder, or the output folder of a training run."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from deepseek_jax import hf, now
from deepseek_jax.balancing.plan import Plan
from deepseek_jax.checkpoints.arrays import load_params
from deepseek_jax.checks import path_of, require, shown
from deepseek_jax.config import MeshConfig, ModelConfig, build
from deepseek_jax.data import text_files
from deepseek_jax.data.special_tokens import stop_ids
from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.hf.config import quantization
from deepseek_jax.inference.model import Model
from deepseek_jax.json_files import read_object
from deepseek_jax.model.transformer import model_params
from deepseek_jax.model.weights import multiplied_as_stored
from deepseek_jax.parallel.prepared import declared_in, parameter_shardings
from deepseek_jax.parallel.slots import InSlots, plan_over
from deepseek_jax.precision import preset


def load(
    path: str | Path,
    *,
    step: int | None = None,
    ema: bool = False,
    dtype: str | None = None,
    mtp: bool = True,
    keep_fp8: bool = False,
    shardings: Any = None,
    mesh: MeshConfig | None = None,
    slots: InSlots | None = None,
) -> Model:
    """A Hugging Face folder (config.json and safetensors) or the output folder of a training run.

    Args:
        step, ema: which checkpoint of a training run, and whether its averaged parameters.
        dtype, mtp, shardings: of the parameters of a Hugging Face checkpoint, see `deepseek_jax.hf.load`.
        keep_fp8: multiply its FP8 weights as they are instead of dequantising them, activations quantised with scales of
            the kind that its config.json names (`scale_fmt`).
        mesh: generate over these devices, which hold the experts among them (`serving/over_mesh.py`); None: on one.
        slots: over a mesh, experts lie in slots, so many more of them than the model has, and move as loads change
            (`parallel/slots.py`); None: in their order. Such a model generates, and does not score.

    Raises:
        ValueError: neither of the two, an argument of another type, or a damaged checkpoint; names the file. Or a mesh
            that does not fit.
    """
    for name, value, kind, words in (
        ("step", step, int | None, "a number of steps, or None"),
        ("mesh", mesh, MeshConfig | None, "a MeshConfig, or None"),
    ):
        require(isinstance(value, kind), f"{name}={shown(value)} should be {words}")
    if mesh is not None and shardings is not None:
        raise ValueError("a mesh brings its own shardings: give one of mesh and shardings")
    if keep_fp8 and shardings is not None:
        raise ValueError("keep_fp8 has shardings of its own: leave out keep_fp8 or shardings, or give a mesh")

    require(
        slots is None or mesh is not None,
        f"{slots}: experts are spread over the devices of a mesh, and move among them: give a mesh, or leave "
        "slots out",
    )

    def over_mesh(cfg: ModelConfig) -> Any:
        if mesh is None:
            return shardings
        return parameter_shardings(cfg, mesh, slots is not None, slots is not None and slots.shared_routed)

    def plan_of(cfg: ModelConfig) -> Plan | None:
        return None if mesh is None or slots is None else plan_over(cfg, mesh, slots)

    folder = path_of(path, "path")
    require(
        folder.exists(),
        f"{folder} does not exist: give the folder of a run or of Hugging Face; nothing is downloaded",
    )
    require(folder.is_dir(), f"{folder} is a file: give the folder that it lies in")
    with now.doing(f"loading {path}"):
        if (folder / "config.json").is_file():
            config = read_object(folder / "config.json")
            text = _text_side(folder, config)
            kinds: dict[str, Any] = {"shardings": over_mesh, "plan": plan_of}
            cfg, params, router_bias = hf.load(folder, dtype, mtp=mtp, keep_fp8=keep_fp8, **kinds)
            plan = plan_of(cfg)
            params = _as_stored(folder, config, _declared(cfg, plan), params) if keep_fp8 else params
            return Model(cfg, params, router_bias, *text, mesh, plan)
        if (folder / "checkpoints").is_dir():
            if keep_fp8:
                raise ValueError(
                    f"{folder} is a training run, whose weights are not in FP8: leave out keep_fp8"
                )
            saved, params, bias, meta = load_params(
                folder / "checkpoints", step, ema, lambda item: hf.load_tree(item, over_mesh, plan_of)
            )
            text = _text_side(folder, meta.get("huggingface", {}).get("config", {}))
            cfg = build(ModelConfig, saved.get("model", {}), "model.")  # whatever trained it
            return Model(cfg, params, jnp.asarray(bias), *text, mesh, plan_of(cfg))
    raise ValueError(f"{folder} holds neither config.json (Hugging Face) nor checkpoints/ (a training run)")


def _declared(cfg: ModelConfig, plan: Plan | None) -> Any:
    """The parameters as they were read."""
    if plan is None:
        return model_params(cfg)
    return declared_in(cfg, plan.physical_lp.shape[1], plan.experts > cfg.n_routed_experts)


def _as_stored(folder: Path, config: Mapping[str, Any], declared: Any, params: Any) -> Any:
    """Weights that are multiplied in FP8, activations with the kind of scales that the checkpoint's own have."""
    if not any("fp8" in jax.tree_util.keystr(p) for p, _ in jax.tree.leaves_with_path(params)):
        raise ValueError(f"{folder} has no weights in FP8: leave out keep_fp8")
    policy = preset("deepseek_fp8_ue8m0" if quantization(config) == "ue8m0" else "deepseek_fp8")
    assert policy is not None
    return multiplied_as_stored(params, declared, policy)


def _text_side(folder: Path, config: Mapping[str, Any]) -> tuple[Tokenizer | None, tuple[int, ...]]:
    """(tokenizer, ids that end a generation) of a folder; `config` is the model's config.json."""
    if (folder / text_files.TOKENIZER).is_file():
        tokenizer = Tokenizer.load(folder, config)
        return tokenizer, tokenizer.stop_ids
    return None, stop_ids(text_files.read(folder), config, None)
