"""Streamed conversion between Hugging Face folders and orbax: there and back bitwise, cut off and resumed."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
import safetensors.torch
import tensorstore
import tokenizers
import torch
from etils import epath
from tokenizers import models
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

import deepseek_jax
from deepseek_jax import hf
from deepseek_jax.checkpoints import inventory
from deepseek_jax.checkpoints.arrays import load_params
from deepseek_jax.config import Config, DataConfig, ModelConfig, build
from deepseek_jax.data import Tokenizer, text_files, train_tokenizer
from deepseek_jax.hf import convert, orbax
from deepseek_jax.training.checkpoint import Checkpointer
from tests.hf.folders import WIDE, files, rewrite, same
from tests.oracle.tiny import V3, weights


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """A folder as DeepSeek publishes: FP8 with MTP, files cut at odd places, config fields that we do not keep."""
    path = tmp_path_factory.mktemp("released") / "tiny-v3"
    hf.save(path, WIDE, *weights(WIDE), format="fp8")
    tensors = safetensors.torch.load_file(next(path.glob("*.safetensors")))
    for file in path.glob("*.safetensors"):
        file.unlink()
    weight_map = {}
    for i, names in enumerate(np.array_split(np.random.default_rng(0).permutation(sorted(tensors)), 3)):
        file = f"model-{i + 1:05d}-of-000003.safetensors"
        safetensors.torch.save_file({n: tensors[n] for n in names}, path / file, {"format": "pt"})
        weight_map |= dict.fromkeys(map(str, names), file)
    index = {"metadata": {"total_size": 123}, "weight_map": dict(sorted(weight_map.items()))}
    (path / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"eos_token_id": 1, "ep_size": 1}, indent=2) + "\n")
    (path / "tokenizer.json").write_text("{}")
    for name in (
        "generation_config.json",
        "tiktoken.model",
        "tokenization_x.py",
        "additional_chat_templates/rag.jinja",
    ):
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_text(name)
    return path


@pytest.fixture(scope="module")
def converted(released, tmp_path_factory):
    path = tmp_path_factory.mktemp("converted") / "run"
    convert.to_orbax(released, path)
    return path


def test_there_and_back_is_bitwise(released, converted, tmp_path):
    convert.to_hf(converted, tmp_path / "back")
    assert files(tmp_path / "back") == files(released)


def test_fp8_stays_fp8_in_orbax(released, converted):
    config, params, bias, meta = load_params(converted / "checkpoints")
    _, want, want_bias = hf.load(released, keep_fp8=True)
    jax.tree.map(same, params, want)
    same(bias, want_bias)
    expert = params["moe_layers"]["ffn"]["experts"]["w_up_edf"]
    assert expert["fp8"].dtype == ml_dtypes.float8_e4m3fn
    assert build(Config, config).model == dataclasses.replace(WIDE, dtype="bfloat16")
    assert meta["tokens"] == 0


@pytest.mark.parametrize(("format", "dtype"), [("bf16", "bfloat16"), ("f32", "float32")])
def test_dequantised_on_request(released, tmp_path, format, dtype):
    convert.to_orbax(released, tmp_path / "run", format)
    config, params, _, _ = load_params(tmp_path / "run" / "checkpoints")
    jax.tree.map(same, params, hf.load(released, dtype=dtype)[1])
    assert build(ModelConfig, config["model"]).hidden_size == WIDE.hidden_size
    assert (tmp_path / "run" / "tokenizer.json").read_text() == "{}"


def test_from_fp8_to_bfloat16_folder(released, converted, tmp_path):
    """The same bytes whether through orbax, from folder to folder, or through memory."""
    convert.to_hf(converted, tmp_path / "a", "bf16")
    convert.to_hf(released, tmp_path / "b", "bf16")
    hf.save(tmp_path / "c", *hf.load(released), format="bf16")
    shards = [{n: x for n, x in files(tmp_path / p).items() if n.startswith("model")} for p in "abc"]
    assert shards[0] == shards[1] == shards[2]
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert "quantization_config" not in config and config["eos_token_id"] == 1
    assert json.loads((tmp_path / "b" / "config.json").read_text()) == config
    jax.tree.map(same, hf.load(tmp_path / "a")[1], hf.load(released)[1])


def test_a_training_run_becomes_a_folder(tmp_path):
    """What the trainer saves: orbax's own format, with optimizer state beside the parameters."""
    params, bias = weights(V3)
    run = tmp_path / "run"
    config = dataclasses.asdict(Config(model=V3, data=DataConfig(vocab_size=64, seq_len=16)))
    checkpointer = Checkpointer(run / "checkpoints")
    state = {"params": params, "balance_bias": bias, "opt_state": {"mu": params}, "step": np.int32(7)}
    for step in (3, 7):
        average = jax.tree.map(lambda x, n=step: x * np.float32(n), params)
        checkpointer.save(step, state, {"params": average}, {"config": config, "data": {}, "tokens": 1})
        state = state | {"params": jax.tree.map(lambda x: -x, params)}
    checkpointer.close()
    params = state["params"]
    backend = tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 1, "<end>": 2}, "a"))
    backend.save(str(run / "tokenizer.json"))
    (run / "tokenizer_config.json").write_text('{"eos_token": "<end>"}')
    convert.to_hf(run, tmp_path / "hf")
    cfg, got, got_bias = hf.load(tmp_path / "hf")
    assert cfg == V3
    jax.tree.map(same, got, params)
    same(got_bias, bias)
    assert AutoTokenizer.from_pretrained(tmp_path / "hf").eos_token_id == 2
    for config in (
        AutoConfig.from_pretrained(tmp_path / "hf"),
        GenerationConfig.from_pretrained(tmp_path / "hf"),
    ):
        assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (None, 2, None)
    # an older checkpoint, its average, by folder too
    for source, options, factor in (
        (run, {"step": 3}, -1),
        (run, {"step": 3, "ema": True}, -3),
        (run / "checkpoints" / "7", {"ema": True}, -7),
    ):
        convert.to_hf(source, tmp_path / str(factor), **options)
        jax.tree.map(
            lambda x, y, n=factor: same(x, y * np.float32(n)), hf.load(tmp_path / str(factor))[1], params
        )
    for source, options, message in (
        (run, {"step": 5}, r"has no checkpoint of step 5; it has \[3, 7\]"),
        (run / "checkpoints" / "7", {"step": 3}, "is one checkpoint, and step=3 asks for another"),
        (tmp_path / "hf", {"ema": True}, "has one set of parameters: no step and no average to choose"),
        (tmp_path / "hf", {"step": 0}, "has one set of parameters"),
        (tmp_path, {}, "holds neither config.json nor checkpoints by step"),
    ):
        with pytest.raises(ValueError, match=message):
            convert.to_hf(source, tmp_path / "none", **options)
    convert.to_orbax(tmp_path / "hf", tmp_path / "published")
    with pytest.raises(ValueError, match="0 has no averaged parameters"):
        convert.to_hf(tmp_path / "published", tmp_path / "none", ema=True)


@pytest.fixture
def without_tokenizer(released, converted, tmp_path):
    """Copies of both; the files of the tokenizer there are none."""
    copies = [shutil.copytree(path, tmp_path / path.name) for path in (released, converted)]
    for path in copies:
        for name in text_files.read(path):
            (path / name).unlink()
    return copies


def test_what_stayed_in_fp8_is_dequantised_when_it_is_loaded(without_tokenizer):
    """Generation needs no flag at conversion: parameters, scores and continuations are the folder's own."""
    want, got = map(deepseek_jax.load, without_tokenizer)
    assert got.config == want.config
    jax.tree.map(same, got.params, want.params)
    same(got.balance_bias, want.balance_bias)
    prompt = [3, 1, 4, 1, 5]
    same(got.score(prompt), want.score(prompt))
    assert got.generate([prompt], 4, stop_ids=()) == want.generate([prompt], 4, stop_ids=())


def test_averaged_parameters_are_not_there(without_tokenizer):
    with pytest.raises(
        ValueError, match=r"was converted and has no averaged parameters: leave out ema \(--ema\)"
    ):
        deepseek_jax.load(without_tokenizer[1], ema=True)


def test_parameters_that_do_not_fit_the_config_are_named(without_tokenizer):
    _, copy = without_tokenizer
    meta = copy / "checkpoints/0/meta/metadata"
    text = meta.read_text()
    size = len(text)
    other = text.replace('"moe_intermediate_size": 9', '"moe_intermediate_size": 8')
    assert len(other) == size and other != text
    meta.write_text(other)
    inventory.write(copy / "checkpoints/0", ("state", "ema", "meta"))
    with pytest.raises(
        ValueError, match=r"array params.moe_layers.ffn.experts.w_\w+.fp8 is .* expected one of .* and shape"
    ):
        deepseek_jax.load(copy)


def test_scales_that_cannot_be(released, tmp_path):
    path = shutil.copytree(released, tmp_path / "copy")
    name = "model.layers.2.mlp.experts.3.up_proj.weight"
    rewrite(path, lambda t: t[f"{name}_scale_inv"].fill_(float("nan")) if f"{name}_scale_inv" in t else None)
    for direction in (convert.to_orbax, convert.to_hf):
        with pytest.raises(ValueError, match=f"tensor {name}_scale_inv is damaged"):
            direction(path, tmp_path / "out")
        shutil.rmtree(tmp_path / "out.partial")


def test_scales_of_one_byte_come_back(released, tmp_path):
    """FP8 as transformers 5 writes it with scale_fmt "ue8m0", and an index whose metadata is null."""
    path = tmp_path / "ue8m0"
    hf.save(path, WIDE, *weights(WIDE), format="fp8", scale="ue8m0")

    def one_byte(tensors):
        for name in [name for name in tensors if name.endswith("_scale_inv")]:
            tensors[name] = tensors[name].to(torch.float8_e8m0fnu)

    rewrite(path, one_byte)
    index = path / "model.safetensors.index.json"
    content = json.loads(index.read_text()) | {"metadata": None}
    content["weight_map"] = dict(sorted(content["weight_map"].items()))
    index.write_text(json.dumps(content, indent=2) + "\n")
    convert.to_orbax(path, tmp_path / "run")
    convert.to_hf(tmp_path / "run", tmp_path / "back")
    assert files(tmp_path / "back") == files(path)


def test_a_bias_in_bfloat16_comes_back(released, tmp_path):
    path = shutil.copytree(released, tmp_path / "copy")
    (path / "model.safetensors.index.json").unlink()
    tensors = {}
    for file in path.glob("*.safetensors"):
        tensors |= safetensors.torch.load_file(file)
        file.unlink()
    for name in [name for name in tensors if name.endswith("correction_bias")]:
        tensors[name] = tensors[name].bfloat16()
    safetensors.torch.save_file(tensors, path / "model.safetensors", {"format": "pt"})
    convert.to_orbax(path, tmp_path / "run")
    convert.to_hf(tmp_path / "run", tmp_path / "back")
    assert files(tmp_path / "back") == files(path)


def _edit_meta(folder, change):
    """Changes what a converted checkpoint remembers of its folder; its inventory is made to fit."""
    meta = folder / "checkpoints/0/meta/metadata"
    content = json.loads(meta.read_text())
    change(content["huggingface"])
    meta.write_text(json.dumps(content))
    inventory.write(folder / "checkpoints/0", ("state", "ema", "meta"))


FIRST, NORM = "model-00001-of-000003.safetensors", "model.norm.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda kept: kept.update(config=[1]), r"huggingface.config=\[1\], which should be a dict"),
        (
            lambda kept: kept["config"].update(rms_norm_eps=0.5),
            r"another model .* differ in \['rms_norm_eps'\]",
        ),
        (lambda kept: kept["config"].update(hidden_size="x"), "hidden_size='x' should be int"),
        (lambda kept: kept.pop("files"), "huggingface.files=None should be an object"),
        (lambda kept: kept.update(index_file=3), "huggingface.index_file=3 should be an object"),
        (
            lambda kept: kept["files"].update({"../x.safetensors": {}}),
            r"files: ../x.safetensors is described by",
        ),
        (lambda kept: kept["files"].update({"config.json": {}}), r"files: config.json is described by"),
        (lambda kept: kept["metadata"].pop(FIRST), rf"files: {FIRST} is described by .* and None"),
        (
            lambda kept: [kept["files"][f].update({NORM: "F64"}) for f in kept["files"]],
            f"{NORM} has dtype F64",
        ),
        (
            lambda kept: [kept["files"][f].update({NORM: "F8_E4M3"}) for f in kept["files"]],
            "cannot be F8_E4M3",
        ),
        (
            lambda kept: [kept["files"][f].pop(NORM, None) for f in kept["files"]],
            f"{NORM} is in none of the files",
        ),
    ],
)
def test_what_is_remembered_of_a_folder_is_checked(converted, tmp_path, change, message):
    copy = shutil.copytree(converted, tmp_path / "copy")
    _edit_meta(copy, change)
    with pytest.raises(ValueError, match=message):
        convert.to_hf(copy, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_mtp_modules_of_a_run_stay(converted, tmp_path):
    with pytest.raises(ValueError, match="MTP modules of a run cannot be left out"):
        convert.to_hf(converted, tmp_path / "out", mtp=False)


def test_without_mtp_modules(released, tmp_path):
    convert.to_orbax(released, tmp_path / "run", mtp=False)
    convert.to_hf(tmp_path / "run", tmp_path / "back")
    _, want, _ = hf.load(released, keep_fp8=True)
    cfg, got, _ = hf.load(tmp_path / "back", keep_fp8=True)
    assert cfg == dataclasses.replace(WIDE, dtype="bfloat16", num_nextn_predict_layers=0)
    del want["mtp"]
    jax.tree.map(same, got, want)
    convert.to_hf(released, tmp_path / "direct", mtp=False)
    jax.tree.map(same, hf.load(tmp_path / "direct", keep_fp8=True)[1], want)


def test_an_output_inside_its_source(released, tmp_path):
    path = shutil.copytree(released, tmp_path / "copy")
    with pytest.raises(CutError):
        convert.to_hf(path, path / "out", "bf16", progress=cut_after(0.5))
    convert.to_hf(path, path / "out", "bf16")
    assert hf.load(path / "out")[0].dtype == "bfloat16"


def test_a_folder_written_with_a_tokenizer(tmp_path):
    tokenizer = train_tokenizer([], 264)
    hf.save(tmp_path / "hf", V3, *weights(V3), tokenizer=tokenizer)
    assert Tokenizer.load(tmp_path / "hf").fingerprint == tokenizer.fingerprint
    assert AutoTokenizer.from_pretrained(tmp_path / "hf").eos_token_id == 1
    config = AutoConfig.from_pretrained(tmp_path / "hf")
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (0, 1, 2)


def test_a_chunk_that_is_not_there_is_no_zeros(converted, tmp_path):
    """Chunks swapped in an array's own description: the ones that it asks for then are not there."""
    copy = shutil.copytree(converted, tmp_path / "copy")
    file = copy / "checkpoints/0/state/params.embed.w_embed_vd/.zarray"
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | {"chunks": content["chunks"][::-1]}))
    inventory.write(copy / "checkpoints/0", ("state", "ema", "meta"))
    with pytest.raises(ValueError, match=r"array params.embed.w_embed_vd is damaged"):
        convert.to_hf(copy, tmp_path / "out")


@pytest.mark.parametrize("ocdbt", [False, True])
def test_orbax_describes_a_tree_as_we_read_it(tmp_path, ocdbt):
    """What we know of orbax's files and it may change: names and format in _METADATA, arrays below their names."""
    tree = {"a": {"b": np.arange(6, dtype=np.float32).reshape(2, 3)}, "c": np.ones(4, np.float32)}
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=ocdbt)
    handler.save(epath.Path(tmp_path / "tree"), args=ocp.args.PyTreeSave(tree))
    if ocdbt:
        handler.finalize(epath.Path(tmp_path / "tree"))
    names, zarr3 = orbax._tree_names(tmp_path / "tree" / "_METADATA")
    assert names == {"a.b", "c"}
    assert (tmp_path / "tree" / "manifest.ocdbt").exists() == ocdbt
    base = {"driver": "ocdbt", "base": f"file://{tmp_path}/tree/", "path": "a.b/"}
    files = {"driver": "file", "path": f"{tmp_path}/tree/a.b/"}
    spec = {"driver": "zarr3" if zarr3 else "zarr", "kvstore": base if ocdbt else files}
    same(tensorstore.open(spec).result().read().result(), tree["a"]["b"])


class CutError(Exception):
    pass


def cut_after(fraction):
    def progress(done, total):
        if done > fraction * total:
            raise CutError

    return progress


@pytest.mark.parametrize("direction", [convert.to_orbax, convert.to_hf])
def test_resumes_where_it_was_cut_off(released, converted, tmp_path, direction, monkeypatch):
    source = released if direction is convert.to_orbax else converted
    for fraction in (0.4, 0.7):
        with pytest.raises(CutError):
            direction(source, tmp_path / "out", progress=cut_after(fraction))
        assert not (tmp_path / "out").exists()
    pieces = []
    original = hf.Checkpoint.piece if direction is convert.to_orbax else convert.TreeSource.piece

    def counted(self, leaf, index):
        pieces.append((leaf.path, index))
        return original(self, leaf, index)

    monkeypatch.setattr(hf.Checkpoint, "piece", counted)
    monkeypatch.setattr(convert.TreeSource, "piece", counted)
    done = []
    direction(source, tmp_path / "out", progress=lambda n, total: done.append((n, total)))
    assert done[-1][0] == done[-1][1]
    everything = sum(len(list(leaf.indices())) for leaf in hf.Checkpoint(released).leaves.values())
    assert 0 < len(pieces) < 0.7 * everything
    direction(source, tmp_path / "whole")
    want, got = (
        {p.relative_to(d): p.read_bytes() for p in d.rglob("*") if p.is_file() and True}
        for d in (tmp_path / "whole", tmp_path / "out")
    )
    assert got == want
    assert not list(tmp_path.glob("*.partial"))


def test_a_partial_output_of_another_conversion_is_refused(released, tmp_path):
    with pytest.raises(CutError):
        convert.to_orbax(released, tmp_path / "out", progress=cut_after(0.5))
    with pytest.raises(ValueError, match=r"out.partial belongs to another conversion"):
        convert.to_orbax(released, tmp_path / "out", "bf16")


def test_damaged_sources_are_named_before_anything_is_written(released, converted, tmp_path):
    broken = shutil.copytree(released, tmp_path / "broken")
    (broken / "model-00002-of-000003.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model-00002-of-000003.safetensors is missing"):
        convert.to_orbax(broken, tmp_path / "out")
    lacking = shutil.copytree(converted, tmp_path / "lacking")
    shutil.rmtree(lacking / "checkpoints/0/state/params.mtp.enorm_d")
    with pytest.raises(ValueError, match=r"is damaged: state/params.mtp.enorm_d/.zarray has 0 of"):
        convert.to_hf(lacking, tmp_path / "out")
    inventory.write(lacking / "checkpoints/0", ("state", "ema", "meta"))
    with pytest.raises(ValueError, match=r"array params.mtp.enorm_d cannot be opened"):
        convert.to_hf(lacking, tmp_path / "out")
    with pytest.raises(ValueError, match="nothing does not exist"):
        convert.to_hf(tmp_path / "nothing", tmp_path / "out")
    with pytest.raises(ValueError, match="format='fp8'"):
        convert.to_orbax(released, tmp_path / "out", "fp8")
    with pytest.raises(ValueError, match="exists already"):
        convert.to_orbax(released, converted)
    with pytest.raises(ValueError, match="/ cannot be an output"):
        convert.to_orbax(released, "/")
    assert not list(tmp_path.glob("out*"))


def test_killed_at_a_file_operation(tmp_path):
    """The short form: the first and last operations of each direction, where a conversion begins and ends."""
    command = [sys.executable, "-m", "experiments.kill_conversion", "--every=97"]
    done = subprocess.run(
        command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    counts = [list(map(int, line.split()[1:4:2])) for line in done.stdout.splitlines()]
    assert len(counts) == 3 and all(kills == equal >= 10 for kills, equal in counts)


def test_command(released, tmp_path):
    command = [sys.executable, "-m", "experiments.convert", "--from=hf", "--to=orbax"]
    root = Path(__file__).parents[2]
    args = [f"--input={released}", f"--output={tmp_path / 'run'}"]
    done = subprocess.run([*command, *args], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "100%" in done.stderr
    again = subprocess.run([*command, *args], cwd=root, capture_output=True, text=True, check=False)
    assert again.returncode == 2 and "exists already" in again.stderr
    full = ["bash", "-c", 'ulimit -f 4; exec "$@"', "-", *command, args[0], f"--output={tmp_path / 'full'}"]
    done = subprocess.run(
        full, cwd=root, capture_output=True, text=True, check=False
    )  # files of at most 4 KiB
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1:] == [f"error: File too large: '{tmp_path / 'full'}'"]
    assert "Traceback" not in done.stderr
