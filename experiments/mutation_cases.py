"""`experiments.mutations` damages these things, and compares each reading with an independent one."""

import contextlib
import copy
import dataclasses
import importlib
import json
import os
import random
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors.numpy
from absl.testing import flagsaver

import deepseek_jax
from deepseek_jax import hf
from deepseek_jax.checkpoints import inventory
from deepseek_jax.config import Config, DataConfig, from_config_dict, to_dict
from deepseek_jax.data import train_tokenizer
from deepseek_jax.hf.names import get, leaves
from deepseek_jax.model_config import YarnConfig
from deepseek_jax.training.checkpoint import Checkpointer
from experiments import command_line
from experiments.kill_conversion import MODEL as SMALLEST
from experiments.kill_conversion import random_weights
from experiments.mutators import Case, mutate_arguments, mutate_bytes, mutate_json, mutate_value

Read = Callable[[], str | None]
MODEL = dataclasses.replace(SMALLEST, vocab_size=300)
YARN = {
    "type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 8,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}


class WorkBegins(BaseException):
    """Raised in a command where its work would begin."""


def prepare(kind: str, folder: Path) -> Case:
    """Returns the cases of one kind; makes what they damage in `folder`."""
    if kind.startswith("command-"):
        return _commands(kind.removeprefix("command-"), folder)
    makers = {
        "config": _configs,
        "build": _mappings,
        "index": _indices,
        "header": _headers,
        "converted": _converted,
        "checkpoint": _checkpoints,
    }
    return makers[kind](folder)


def _linked(source: Path, target: Path) -> Path:
    """Copies a folder with hard links; replace a file of it by unlinking it first."""
    shutil.rmtree(target, ignore_errors=True)
    return shutil.copytree(source, target, copy_function=os.link)


def _replace(file: Path, content: bytes) -> None:
    file.unlink()
    file.write_bytes(content)


def _source(folder: Path, form: str, shard_bytes: int = 1 << 30) -> Path:
    """Writes a Hugging Face folder of random weights."""
    hf.save(folder / "source", MODEL, *random_weights(MODEL), format=form, shard_bytes=shard_bytes)
    return folder / "source"


def _differing(got: Any, want: Any) -> str | None:
    """Names the first array that is not bit for bit equal."""
    trees: list[Any] = [jax.tree.structure(got), jax.tree.structure(want)]
    if trees[0] != trees[1]:
        return "the parameter tree has other leaves"
    named = jax.tree_util.tree_flatten_with_path(got)[0]
    for (path, a), b in zip(named, jax.tree.leaves(want), strict=True):
        x, y = np.asarray(a), np.asarray(b)
        if x.dtype != y.dtype or x.tobytes() != y.tobytes():
            return f"array {jax.tree_util.keystr(path)} differs"
    return None


# --- config.json and the config of a run ------------------------------------------------------------------


def _configs(folder: Path) -> Case:
    source = _source(folder, "f32")
    want = hf.load(source)[1:]
    plain = json.loads((source / "config.json").read_text())
    rope = {"rope_theta": plain["rope_theta"], "rope_type": "default"}
    new = {k: v for k, v in plain.items() if k not in ("rope_theta", "rope_scaling", "torch_dtype")}
    forms = [
        plain,
        plain | {"rope_scaling": YARN},
        new | {"rope_parameters": rope, "dtype": "float32", "head_dim": MODEL.qk_rope_head_dim},
        new | {"rope_parameters": YARN | rope | {"rope_type": "yarn"}, "dtype": "bfloat16"},
        plain | {"quantization_config": FP8},
    ]

    def case(rng: random.Random) -> tuple[str, Read]:
        path = _linked(source, folder / "case")
        content, what = mutate_json(json.dumps(rng.choice(forms)).encode(), rng)
        _replace(path / "config.json", content)

        def read() -> str | None:
            cfg, *got = hf.load(path)
            return _disagreement(cfg, json.loads(content)) or _differing(tuple(got), want)

        return what, read

    return case


def _disagreement(cfg: Any, said: Mapping[str, Any]) -> str | None:
    """Names the first field of a ModelConfig that is not what config.json says."""
    for field in dataclasses.fields(cfg):
        own, value = getattr(cfg, field.name), said.get(field.name)
        if value is None or field.name in ("rope_scaling", "rope_theta", "dtype"):
            continue
        if own != value or isinstance(value, bool) != isinstance(own, bool):
            return f"{field.name} is {own!r}, the file says {value!r}"
    yarn = {} if cfg.rope_scaling is None else dataclasses.asdict(cfg.rope_scaling)
    for name in ("rope_scaling", "rope_parameters"):
        for key, value in (said.get(name) or {}).items():
            own = {"rope_theta": cfg.rope_theta, "type": "yarn", "rope_type": "yarn"} | yarn
            if value is not None and value != "default" and own.get(key, value) != value:
                return f"{name}.{key} is {own.get(key)!r}, the file says {value!r}"
            if value == "yarn" and not yarn:
                return f"{name}.{key} is dropped"
    for name in ("torch_dtype", "dtype"):
        if said.get(name) not in (None, cfg.dtype):
            return f"{name} is {cfg.dtype!r}, the file says {said[name]!r}"
    return None


def _mappings(folder: Path) -> Case:
    del folder
    yarn = YarnConfig(factor=2.0)
    model = dataclasses.replace(MODEL, rope_scaling=yarn, max_position_embeddings=512, vocab_size=4096)
    whole = to_dict(Config(model=model))

    def case(rng: random.Random) -> tuple[str, Read]:
        values = copy.deepcopy(whole)
        what = mutate_value(values, rng)
        return what, lambda: _not_within(values, to_dict(from_config_dict(values)), "")

    return case


def _not_within(given: Any, got: Any, path: str) -> str | None:
    if isinstance(given, dict) and isinstance(got, dict):
        found = (_not_within(value, got.get(key), f"{path}.{key}") for key, value in given.items())
        return next((x for x in found if x), None)
    if isinstance(given, list | tuple) and isinstance(got, list | tuple):
        given, got = list(given), list(got)
    return None if given == got else f"{path[1:]} is {got!r}, {given!r} was given"


# --- files of a Hugging Face folder -----------------------------------------------------------------------


def _indices(folder: Path) -> Case:
    source = _source(folder, "f32", shard_bytes=1500)
    want = hf.load(source)[1:]
    name = "model.safetensors.index.json"

    def case(rng: random.Random) -> tuple[str, Read]:
        path = _linked(source, folder / "case")
        content, what = mutate_json((source / name).read_bytes(), rng)
        _replace(path / name, content)
        return what, lambda: _differing(hf.load(path)[1:], want)

    return case


def _headers(folder: Path) -> Case:
    source = _source(folder, "f32", shard_bytes=1500)

    def case(rng: random.Random) -> tuple[str, Read]:
        path = _linked(source, folder / "case")
        file = rng.choice(sorted(path.glob("*.safetensors")))
        raw = file.read_bytes()
        length = int.from_bytes(raw[:8], "little")
        if rng.random() < 0.15:  # the length itself, or the whole file
            whole = rng.random() < 0.5
            changed, what = mutate_bytes(raw, rng) if whole else (rng.randbytes(8) + raw[8:], "length")
        else:
            header, what = mutate_json(raw[8 : 8 + length], rng)
            changed = len(header).to_bytes(8, "little") + header + raw[8 + length :]
        _replace(file, changed)
        return f"{what} of {file.name}", lambda: _unlike_the_library(path, *hf.load(path)[:2])

    return case


def _unlike_the_library(path: Path, cfg: Any, params: Any) -> str | None:
    """Compares every parameter with what the safetensors library reads."""
    tensors: dict[str, np.ndarray] = {}
    for file in path.glob("*.safetensors"):
        tensors |= safetensors.numpy.load_file(file)
    for leaf in leaves(cfg).values():
        array = np.asarray(get(params, leaf.path))
        for index in leaf.indices():
            name = leaf.name(index)
            if leaf.to_hf(array[index]).tobytes() != np.ascontiguousarray(tensors[name]).tobytes():
                return f"tensor {name} differs"
    return None


# --- checkpoints in orbax ---------------------------------------------------------------------------------


def _damage_step(step: Path, rng: random.Random) -> str:
    """Changes one file of a checkpoint; half of the time, of one that is read as JSON, the inventory is made to fit."""
    files = sorted(p for p in step.rglob("*") if p.is_file())
    json_files = ("files.json", "metadata", "_METADATA", ".zarray", ".zmetadata")
    described = [p for p in files if p.name in json_files]
    file = rng.choice(described if rng.random() < 0.7 else files)
    raw = file.read_bytes()
    content, what = mutate_json(raw, rng) if file in described else mutate_bytes(raw, rng)
    _replace(file, content)
    if file in described and file.name != "files.json" and rng.random() < 0.5:
        (step / "files.json").unlink()
        inventory.write(step, ("state", "ema", "meta"))
        what += ", inventory made to fit"
    return f"{what} of {file.relative_to(step)}"


def _damaged_steps(
    run: Path, step: int, folder: Path, want: Any, other: str, read_otherwise: Callable[[Path], str | None]
) -> Case:
    """Loads half of the damaged checkpoints, which must give `want` or an error, and reads the others otherwise."""

    def loaded(path: Path) -> str | None:
        model = deepseek_jax.load(path)
        return _differing((model.params, model.balance_bias), want)

    def case(rng: random.Random) -> tuple[str, Read]:
        path = _linked(run, folder / "case")
        what = _damage_step(path / "checkpoints" / str(step), rng)
        otherwise = rng.random() < 0.5
        read = read_otherwise if otherwise else loaded
        return f"{what}, {other if otherwise else 'loaded'}", lambda: read(path)

    return case


def _converted(folder: Path) -> Case:
    source = _source(folder, "fp8", shard_bytes=1500)
    hf.convert.to_orbax(source, folder / "run")
    want = hf.load(source)[1:]

    def back(path: Path) -> str | None:
        for name in ("back", "back.partial"):
            shutil.rmtree(folder / name, ignore_errors=True)
        hf.convert.to_hf(path, folder / "back")
        return _differing(hf.load(folder / "back")[1:], want)

    return _damaged_steps(folder / "run", 0, folder, want, "converted back", back)


def _checkpoints(folder: Path) -> Case:
    params, bias = random_weights(MODEL)
    config = Config(model=MODEL, data=DataConfig(vocab_size=8, seq_len=8))
    state = {"params": params, "balance_bias": bias, "step": np.int32(2)}
    ema = {"params": params, "updates": np.int32(1)}
    with contextlib.closing(Checkpointer(folder / "run" / "checkpoints")) as checkpointer:
        checkpointer.save(2, state, ema, {"config": to_dict(config), "data": {}, "tokens": 5})
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), np.asarray(x).dtype), state)

    def resumed(path: Path) -> str | None:
        with contextlib.closing(Checkpointer(path / "checkpoints")) as checkpointer:
            restored = checkpointer.restore(abstract, model=to_dict(MODEL))
            return _differing(restored.state, state) or _differing(restored.ema["params"], params)

    return _damaged_steps(folder / "run", 2, folder, (params, bias), "resumed", resumed)


# --- command lines ----------------------------------------------------------------------------------------

# Where the work of a command begins. `convert` and, on one device, `generate` do their work, which is small.
_WORK = {"train": "run", "generate": "cpu_devices", "plan": "sample_rows", "launch": "launch"}
_LINES = {
    "train": (
        "--config=configs/tiny.py --config.train.steps=7 --config.model.hidden_size=64 --from_step=3",
        "--config=configs/tiny.py --config.optimizer.peak_lr=1e-3 --fresh --config.data.segments=True",
        "--config=configs/tiny.py --config.mesh.experts=flat --config.data.validation=None --stopped_status=5",
        "--config.distributed.coordinator=127.0.0.1:99 --config.distributed.processes=1 --config.precision=bf16",
    ),
    "generate": (
        "--checkpoint=run --prompt=a --max_new_tokens=5 --temperature=0.5 --top_p=0.9 --seed=1",
        "--checkpoint=source --prompt=a --prompt=b --max_new_tokens=5 --step=0 --nomtp",
        "--checkpoint=source --prompt=a --mesh=node=2,local=4,experts=flat",
    ),
    "convert": (
        "--from=hf --to=orbax --input=source --output=out --format=bf16 --nomtp",
        "--from=orbax --to=hf --input=run --output=out --scale=ue8m0",
        "--from=hf --to=hf --input=source --output=out --format=fp8",
    ),
    "plan": (
        "exchange --experts=16 --topk=2 --tokens=32 --hidden=64",
        "memory --config=configs/tiny.py --config.mesh.local=2 --config.train.batch_size=8",
    ),
    "launch": ("--processes=2 --restarts=1 --grace=3.5 -- python -m experiments.train",),
}


def _commands(name: str, folder: Path) -> Case:
    """Damages command lines and runs the command up to where its work begins."""
    module = importlib.import_module(f"experiments.{name}")
    if name in _WORK:
        setattr(module, _WORK[name], _work_begins)
    made, here = folder / "made", folder / "here"
    made.mkdir()
    if name in ("generate", "convert"):
        train_tokenizer(["a b c"], 300).save(_source(made, "bf16") / "tokenizer.json")
        hf.convert.to_orbax(made / "source", made / "run")

    def case(rng: random.Random) -> tuple[str, Read]:
        os.chdir(_linked(made, here))
        arguments, what = mutate_arguments(rng.choice(_LINES[name]).split(), rng)
        return f"{what}: {arguments!r}"[:300], lambda: _begin(module, arguments)

    return case


def _work_begins(*args: Any, **kwargs: Any) -> Any:
    raise WorkBegins


def _begin(module: Any, arguments: list[str]) -> str | None:
    with flagsaver.flagsaver(), contextlib.suppress(WorkBegins):
        status: int | str | None
        try:
            status = command_line.status(module.main, arguments)
        except SystemExit as end:  # --help
            status = end.code
        return None if not status else f"ended with status {status} without an error"
    return None
