"""Hugging Face checkpoints in and out: round trips, FP8 bit for bit, slices over a mesh, damaged folders."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
import safetensors.torch
import torch
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from deepseek_jax import hf
from deepseek_jax.hf import fp8
from deepseek_jax.hf.names import get, leaves, unflatten
from deepseek_jax.model.params import tree_map
from deepseek_jax.model.transformer import model_params
from tests.hf.folders import WIDE, files, rewrite, same
from tests.oracle.tiny import V2, V3, weights

# transformers has no MTP modules.
PACKED = dataclasses.replace(V3, num_nextn_predict_layers=0)
E4M3, BF16 = ml_dtypes.float8_e4m3fn, ml_dtypes.bfloat16


def save(path, cfg, format="bf16", **options) -> Path:
    hf.save(path, cfg, *weights(cfg), format=format, **options)
    return path


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Checkpoints that the tests read, and copy before they damage them."""
    root = tmp_path_factory.mktemp("folders")
    return {
        "bf16": save(root / "bf16", V3, shard_bytes=20_000),
        "fp8": save(root / "fp8", WIDE, "fp8"),
        "ue8m0": save(root / "ue8m0", WIDE, "fp8", scale="ue8m0"),
    }


# --- round trips ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "cfg", [V3, V2, dataclasses.replace(V3, tie_word_embeddings=True)], ids=["v3", "v2", "tied"]
)
def test_float32_comes_back_bitwise(cfg, tmp_path):
    params, bias = weights(cfg)
    hf.save(tmp_path / "a", cfg, params, bias, format="f32", shard_bytes=20_000)
    got_cfg, got, got_bias = hf.load(tmp_path / "a")
    assert got_cfg == cfg
    jax.tree.map(same, got, params)
    same(got_bias, bias)
    hf.save(tmp_path / "b", got_cfg, got, got_bias, format="stored", shard_bytes=20_000)
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_bfloat16_comes_back_bitwise_and_is_the_rounded_original(folders, tmp_path):
    cfg, params, bias = hf.load(folders["bf16"])
    assert cfg == dataclasses.replace(V3, dtype="bfloat16")
    original, original_bias = weights(V3)
    jax.tree.map(lambda got, want: same(got, want.astype(BF16)), params, original)
    same(bias, original_bias)
    hf.save(tmp_path / "again", cfg, params, bias, shard_bytes=20_000)
    assert files(tmp_path / "again") == files(folders["bf16"])
    assert len(files(folders["bf16"])) > 3


def test_dtype_on_request(folders):
    cfg, params, _ = hf.load(folders["bf16"], dtype="float32")
    assert cfg.dtype == "float32"
    assert {x.dtype for x in jax.tree.leaves(params)} == {np.dtype(np.float32)}
    with pytest.raises(ValueError, match="dtype='float16'"):
        hf.load(folders["bf16"], dtype="float16")


def test_files_are_what_the_safetensors_library_writes(folders, tmp_path):
    for file in sorted(folders["fp8"].glob("*.safetensors")):
        with safetensors.safe_open(file, "pt") as f:
            tensors, metadata = {k: f.get_tensor(k) for k in f.keys()}, f.metadata()  # noqa: SIM118
        safetensors.torch.save_file(tensors, tmp_path / file.name, metadata)
        assert (tmp_path / file.name).read_bytes() == file.read_bytes()


def test_mtp_modules_carry_their_copies(folders):
    with safetensors.safe_open(next(folders["fp8"].glob("*.safetensors")), "pt") as f:
        names = set(f.keys())
        layer = f"model.layers.{WIDE.num_hidden_layers}."
        for name in ("enorm", "hnorm", "eh_proj", "shared_head.norm", "shared_head.head", "embed_tokens"):
            assert f"{layer}{name}.weight" in names
        assert torch.equal(
            f.get_tensor(f"{layer}embed_tokens.weight"), f.get_tensor("model.embed_tokens.weight")
        )
        assert torch.equal(f.get_tensor(f"{layer}shared_head.head.weight"), f.get_tensor("lm_head.weight"))


def test_promised_mtp_modules_that_are_not_there(tmp_path):
    """transformers writes num_nextn_predict_layers without the modules."""
    cfg = dataclasses.replace(V3, num_nextn_predict_layers=0)
    save(tmp_path / "a", cfg, "f32")
    config = json.loads((tmp_path / "a/config.json").read_text())
    (tmp_path / "a/config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 1}))
    got, params, _ = hf.load(tmp_path / "a")
    assert got == cfg and "mtp" not in params


# --- FP8 --------------------------------------------------------------------------------------------------


def by_loops(q, scale, dtype):
    """Dequantisation, one entry at a time."""
    out = np.empty(q.shape, dtype)
    for o in range(q.shape[0]):
        for i in range(q.shape[1]):
            out[o, i] = dtype(np.float32(q[o, i]) * scale[o // 128, i // 128])
    return out


@pytest.mark.parametrize("shape", [(128, 128), (1, 1), (130, 257), (256, 3)])
@pytest.mark.parametrize("scale", ["fp32", "ue8m0"])
def test_quantised_blocks(shape, scale):
    rng = np.random.default_rng(0)
    w = (rng.standard_normal(shape) * np.exp(3 * rng.standard_normal(shape))).astype(np.float32)
    scales = fp8.block_scales(w, scale)
    q = fp8.quantise(w, scales)
    assert scales.shape == (-(-shape[0] // 128), -(-shape[1] // 128)) and q.dtype == E4M3
    for r in range(scales.shape[0]):
        for c in range(scales.shape[1]):
            amax = np.abs(w[r * 128 : (r + 1) * 128, c * 128 : (c + 1) * 128]).max()
            exact = np.float32(max(amax, 1e-4)) / np.float32(448)
            assert scales[r, c] == (
                exact if scale == "fp32" else np.exp2(np.ceil(np.log2(np.float64(exact))))
            )
    if shape[0] * shape[1] < 40_000:
        same(fp8.dequantise(q, scales, np.dtype(BF16)), by_loops(q, scales, BF16))
    error = np.abs(fp8.dequantise(q, scales, np.dtype(np.float32)) - w)
    per_entry = np.repeat(np.repeat(scales, 128, 0), 128, 1)[: shape[0], : shape[1]]
    # Half a unit in the last of 3 mantissa bits, or half the smallest subnormal step.
    assert (error <= np.maximum(np.abs(w) * 2**-4, per_entry * 2**-10) * (1 + 1e-6)).all()


def test_a_block_of_zeros_and_exact_powers_of_two():
    zeros = np.zeros((2, 2), np.float32)
    assert fp8.block_scales(zeros)[0, 0] == np.float32(2.2321428616578487e-07)
    assert fp8.block_scales(zeros, "ue8m0")[0, 0] == 2.0**-22
    assert fp8.block_scales(np.full((1, 1), 448 * 0.25, np.float32), "ue8m0")[0, 0] == 0.25
    above = np.nextafter(np.float32(448 * 0.25), np.float32(1e9))
    assert fp8.block_scales(np.full((1, 1), above, np.float32), "ue8m0")[0, 0] == 0.5
    with pytest.raises(ValueError, match="not finite"):
        fp8.block_scales(np.full((1, 1), np.nan, np.float32))


@pytest.mark.parametrize("which", ["fp8", "ue8m0"])
def test_fp8_checkpoint_is_dequantised_bit_for_bit(folders, which):
    """The files read by the safetensors library, dequantised by a formula of our own, against what is loaded."""
    with safetensors.safe_open(next(folders[which].glob("*.safetensors")), "pt") as f:
        raw = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118
    cfg, params, _ = hf.load(folders[which])
    ragged = 0
    for leaf in leaves(cfg).values():
        for index in leaf.indices():
            name = leaf.name(index)
            got = leaf.to_hf(np.asarray(get(params, leaf.path)[index]))
            assert got.dtype == BF16
            assert (raw[name].dtype == torch.float8_e4m3fn) == (name + "_scale_inv" in raw) == leaf.may_be_fp8
            want = raw[name].float()
            if leaf.may_be_fp8:
                scale = raw[name + "_scale_inv"]
                if which == "ue8m0":
                    assert torch.equal(torch.frexp(scale)[0], torch.full_like(scale, 0.5))
                full = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)
                want = want * full[: want.shape[0], : want.shape[1]]
                ragged += scale.numel() > 1
            assert torch.equal(torch.tensor(got.astype(np.float32)), want.bfloat16().float()), name
    assert ragged > 10
    expected = {k for k in raw if "_proj" in k and "eh_proj" not in k and not k.endswith("_scale_inv")}
    assert expected == {k for k in raw if raw[k].dtype == torch.float8_e4m3fn}
    config = json.loads((folders[which] / "config.json").read_text())
    assert config["quantization_config"].get("scale_fmt") == ("ue8m0" if which == "ue8m0" else None)


def test_fp8_kept_as_fp8(folders, tmp_path):
    cfg, kept, bias = hf.load(folders["fp8"], keep_fp8=True)
    _, params, _ = hf.load(folders["fp8"])
    leaf = leaves(cfg)["moe_layers.ffn.experts.w_down_efd"]
    both = get(kept, leaf.path)
    assert both["fp8"].dtype == E4M3 and both["fp8"].shape == (2, 12, 136, 9)
    assert both["scale"].shape == (2, 12, 2, 1)
    one = fp8.dequantise(np.asarray(both["fp8"])[1, 3], np.asarray(both["scale"])[1, 3], np.dtype(BF16))
    same(leaf.from_hf(one), get(params, leaf.path)[1, 3])
    same(kept["embed"]["w_embed_vd"], params["embed"]["w_embed_vd"])
    hf.save(tmp_path / "again", cfg, kept, bias, format="stored")
    assert files(tmp_path / "again") == files(folders["fp8"])
    hf.save(tmp_path / "wide", cfg, kept, bias, format="bf16")
    jax.tree.map(same, hf.load(tmp_path / "wide")[1], params)


# --- slices over a mesh -----------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["bf16", "fp8"])
def test_a_device_reads_its_slice(folders, which):
    """Every slice that a sharding could ask for, against the same slice of the whole leaf."""
    checkpoint = hf.Checkpoint(folders[which])
    _, params, _ = hf.load(folders[which])
    for path, leaf in checkpoint.leaves.items():
        index = tuple(n - 1 for n in leaf.stack)
        whole = np.asarray(get(params, path))[index]
        for dim, n in enumerate(leaf.piece_shape):
            piece = tuple(slice(n // 3, n) if d == dim else slice(None) for d in range(whole.ndim))
            out = np.empty(whole[piece].shape, whole.dtype)
            checkpoint.read(leaf, index, piece, out)
            same(out, whole[piece])


def test_shardings_are_followed(folders):
    """Two devices, each with its half of the hidden dim."""
    mesh = jax.make_mesh(
        (1, 2), ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2, devices=jax.devices()[:2]
    )
    rules = {"layer": "x", "embed": "y"}
    shardings = tree_map(lambda p: NamedSharding(mesh, P(*map(rules.get, p.axes))), model_params(V3))
    _, params, _ = hf.load(folders["bf16"], shardings=shardings)
    _, want, _ = hf.load(folders["bf16"])
    jax.tree.map(same, params, want)
    assert jax.tree.map(lambda x: x.sharding, params) == shardings


# --- damage -----------------------------------------------------------------------------------------------


def edit_index(path: Path, change) -> None:
    file = path / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    change(index)
    file.write_text(json.dumps(index))


EXPERT = "model.layers.2.mlp.experts.3.up_proj.weight"


def shard_of(path: Path, name: str) -> Path:
    return path / json.loads((path / "model.safetensors.index.json").read_text())["weight_map"][name]


def edit_header(path: Path, change, name: str = "") -> Path:
    """Changes the header of the shard that holds `name` (EXPERT); the data stay where they are."""
    file = shard_of(path, name or EXPERT)
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    header = change(header) or header
    new = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(len(new).to_bytes(8, "little") + new + raw[8 + length :])
    return file


def _header_entry(**change):
    def damage(path):
        edit_header(path, lambda header: header[EXPERT].update(change))

    return damage


def _missing_shard(path):
    shard_of(path, EXPERT).unlink()
    return "model-0000.*safetensors is missing; it should hold"


def _truncated(path):
    file = shard_of(path, EXPERT)
    file.write_bytes(file.read_bytes()[:-10])
    return rf"{file.name} is truncated: tensor "


def _header_cut(path):
    file = shard_of(path, EXPERT)
    file.write_bytes(file.read_bytes()[:100])
    return rf"{file.name} is truncated or not a safetensors file"


def _shape_that_wraps_around(path):
    _header_entry(shape=[1 << 61, 8, 1 << 61])(path)
    return rf"tensor {EXPERT} of dtype BF16 and shape .* has 432 bytes instead of"


def _negative_shape(path):
    _header_entry(shape=[-9, -24])(path)
    return rf"tensor {EXPERT} has shape=\[-9, -24\], which should be"


def _shape_of_strings(path):
    _header_entry(shape=["9", True])(path)
    return rf"tensor {EXPERT} has shape=\['9', True\], which should be"


def _offsets_backwards(path):
    _header_entry(data_offsets=[432, 0])(path)
    return rf"tensor {EXPERT} has data_offsets=\[432, 0\]"


def _offsets_far_away(path):
    edit_header(path, lambda header: header[EXPERT].update(data_offsets=[1 << 40, (1 << 40) + 432]))
    return r"is damaged: tensor .* begins at \d+, the one before ends at|is truncated: tensor"


def _offsets_overlap(path):
    def change(header):
        other = next(v for k, v in header.items() if k not in (EXPERT, "__metadata__") and "experts" in k)
        header[EXPERT]["data_offsets"] = other["data_offsets"]

    edit_header(path, change)
    return r"is damaged: tensor .* begins at \d+, the one before ends at"


def _entry_without_dtype(path):
    edit_header(path, lambda header: header[EXPERT].pop("dtype") and None)
    return rf"tensor {EXPERT} is described by \{{'shape'"


def _dtype_that_is_none(path):
    _header_entry(dtype=["BF16"])(path)
    return rf"tensor {EXPERT} has dtype=\['BF16'\], which should be a string"


def _entry_twice(path):
    def change(header):
        text = json.dumps(header)
        return (text[:-1] + f', "{EXPERT}": {json.dumps(header[EXPERT])}}}').encode()

    edit_header(path, change)
    return rf"is not a safetensors file: its header is not valid JSON: key '{EXPERT}' stands there twice"


def _header_nested(path):
    edit_header(path, lambda header: b'{"a":' + b"[" * 10**6)
    return r"is not a safetensors file: its header is not valid JSON: it is nested deeper"


def _header_a_list(path):
    edit_header(path, lambda header: b"[1, 2]")
    return r"is not a safetensors file: its header does not hold a JSON object"


def _header_length_beyond(path):
    file = shard_of(path, EXPERT)
    file.write_bytes((1 << 63).to_bytes(8, "little") + file.read_bytes()[8:])
    return rf"{file.name} is truncated or not a safetensors file"


def _metadata_of_numbers(path):
    edit_header(path, lambda header: header.update(__metadata__={"format": 1}))
    return r"__metadata__=\{'format': 1\} should map names to strings"


def _trailing(path):
    file = shard_of(path, EXPERT)
    file.write_bytes(file.read_bytes() + b"\0" * 8)
    return rf"{file.name} is truncated or damaged"


def _garbage(path):
    file = shard_of(path, EXPERT)
    file.write_bytes(b"\x10" + b"\0" * 7 + b"not json at all!")
    return rf"{file.name} is not a safetensors file"


def _wrong_shape(path):
    rewrite(path, lambda t: t.update({EXPERT: t[EXPERT][:, :-1].contiguous()}) if EXPERT in t else None)
    return rf"{EXPERT} has shape \[9, 23\], expected \[9, 24\]"


def _wrong_dtype(path):
    rewrite(path, lambda t: t.update({EXPERT: t[EXPERT].half()}) if EXPERT in t else None)
    return rf"safetensors: tensor {EXPERT} has dtype F16"


def _fp8_without_scale(path):
    rewrite(path, lambda t: t.update({EXPERT: t[EXPERT].to(torch.float8_e4m3fn)}) if EXPERT in t else None)
    return rf"FP8 tensor {EXPERT} has no {EXPERT}_scale_inv"


def _missing_tensor(path):
    rewrite(path, lambda t: t.pop(EXPERT, None))
    return rf"tensor {EXPERT} of shape \[9, 24\] is missing"


def _extra_tensor(path):
    rewrite(
        path,
        lambda t: (
            t.update({"model.layers.0.self_attn.k_proj.weight": torch.zeros(2)}) if EXPERT in t else None
        ),
    )
    return r"safetensors: tensor model.layers.0.self_attn.k_proj.weight does not belong"


def _index_outside(path):
    edit_index(path, lambda index: index["weight_map"].update({EXPERT: "../other.safetensors"}))
    return rf"index.json: tensor {EXPERT} points outside the folder"


def _index_absolute(path):
    edit_index(path, lambda index: index["weight_map"].update({EXPERT: "/etc/passwd"}))
    return rf"index.json: tensor {EXPERT} points outside the folder"


def _index_names_what_is_not_there(path):
    edit_index(path, lambda index: index["weight_map"].update({"model.other": shard_of(path, EXPERT).name}))
    return r"safetensors lacks tensor model.other"


def _index_forgets(path):
    edit_index(path, lambda index: index["weight_map"].pop(EXPERT))
    return rf"holds tensor {EXPERT}, which model.safetensors.index.json does not place there"


def _index_not_json(path):
    (path / "model.safetensors.index.json").write_text("{")
    return r"index.json is not valid JSON"


def _index_is_a_list(path):
    edit_index(path, lambda index: index.update(weight_map=[EXPERT]))
    return r"index.json has no weight_map, .*: it is \['model"


def _index_name_that_is_no_name(path):
    edit_index(path, lambda index: index["weight_map"].update({EXPERT: "a\0b"}))
    return rf"index.json: tensor {EXPERT} points outside the folder: 'a\\x00b'"


def _index_name_too_long(path):
    edit_index(path, lambda index: index["weight_map"].update({EXPERT: "a" * 5000}))
    return rf"index.json: tensor {EXPERT} points outside the folder: 'aaa"


def _index_number(path):
    edit_index(path, lambda index: index["weight_map"].update({EXPERT: 7}))
    return rf"index.json: tensor {EXPERT} points outside the folder: 7"


def _index_key_twice(path):
    (path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "b", "a": "c"}}')
    return r"index.json is not valid JSON: key 'a' stands there twice"


def _config_with_nan(path):
    config = (path / "config.json").read_text()
    (path / "config.json").write_text(config.replace('"rms_norm_eps": 0.001', '"rms_norm_eps": NaN'))
    return r"config.json: rms_norm_eps=nan is not a finite number"


def _config_with_many_mtp_modules(path):
    config = json.loads((path / "config.json").read_text()) | {"num_nextn_predict_layers": 10**9}
    (path / "config.json").write_text(json.dumps(config))
    return r"config.json: num_nextn_predict_layers=1000000000 must be <= 100"


def _config_without_its_mtp_modules(path):
    config = json.loads((path / "config.json").read_text()) | {"num_nextn_predict_layers": 0}
    (path / "config.json").write_text(json.dumps(config))
    return (
        r"tensor model.layers.[34].* does not belong to the model of config.json; to leave out .*: mtp=False"
    )


def _mtp_module_in_part(path):
    name = f"model.layers.{V3.num_hidden_layers}.enorm.weight"
    rewrite(path, lambda t: t.pop(name, None))
    return rf"tensor {name} of shape \[24\] is missing; to leave out the MTP modules: mtp=False"


def _bias_with_nan(path):
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    rewrite(path, lambda t: t[name].mul_(float("nan")) if name in t else None)
    return rf"tensor {name} holds values that are not finite"


def _no_weights(path):
    for file in path.glob("model*"):
        file.unlink()
    (path / "pytorch_model.bin").write_bytes(b"pickle")
    return "holds neither"


def _bad_config(path):
    (path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return r"config.json: .*model_type='llama'"


def _no_config(path):
    (path / "config.json").unlink()
    return r"config.json is missing"


def _copies_differ(path):
    name = f"model.layers.{V3.num_hidden_layers}.embed_tokens.weight"
    rewrite(path, lambda t: t[name].add_(1) if name in t else None)
    return rf"tensor {name} differs from model.embed_tokens.weight.*: mtp=False"


DAMAGE = [
    v
    for k, v in list(globals().items())
    if k.startswith("_") and callable(v) and not k.startswith("__") and v is not _header_entry
]


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda f: f.__name__.strip("_"))
def test_damage_is_named(folders, tmp_path, damage):
    path = shutil.copytree(folders["bf16"], tmp_path / "copy")
    with pytest.raises(ValueError, match=damage(path)) as error:
        hf.load(path)
    assert str(error.value).isprintable() and len(str(error.value)) < 700


def test_a_null_metadata_in_the_index(folders, tmp_path):
    path = shutil.copytree(folders["bf16"], tmp_path / "copy")
    edit_index(path, lambda index: index.update(metadata=None))
    jax.tree.map(same, hf.load(path)[1], hf.load(folders["bf16"])[1])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_scales_that_cannot_be(folders, tmp_path, value):
    path = shutil.copytree(folders["fp8"], tmp_path / "copy")
    name = f"{EXPERT}_scale_inv"
    rewrite(path, lambda t: t[name].fill_(value) if name in t else None)
    message = rf"safetensors: tensor {name} is damaged: 2 of its 2 scales are as {value}"
    for options in ({}, {"keep_fp8": True}):
        with pytest.raises(ValueError, match=message):
            hf.load(path, **options)


def test_a_stale_mtp_module_is_left_out(folders, tmp_path):
    """A fine-tune trained the embedding; the copies in the MTP modules are as they were."""
    path = shutil.copytree(folders["bf16"], tmp_path / "copy")
    _copies_differ(path)
    cfg, params, bias = hf.load(path, mtp=False)
    assert cfg == dataclasses.replace(V3, dtype="bfloat16", num_nextn_predict_layers=0)
    _, want, want_bias = hf.load(folders["bf16"])
    del want["mtp"]
    jax.tree.map(same, params, want)
    same(bias, np.asarray(want_bias)[: cfg.num_moe_layers])


# --- as transformers writes them --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def by_transformers(tmp_path_factory):
    """Folders that transformers saved: in the published format, and as it keeps the experts, packed by layer."""
    transformers = pytest.importorskip("transformers")
    root = tmp_path_factory.mktemp("by_transformers")
    hf.save(root / "ours", PACKED, *weights(PACKED), format="f32")
    model = transformers.AutoModelForCausalLM.from_pretrained(root / "ours", dtype=torch.float32)
    model.save_pretrained(root / "published")
    model.save_pretrained(root / "packed", save_original_format=False, max_shard_size="20KB")
    return root


def test_packed_experts(by_transformers):
    tensors = safetensors.torch.load_file(next(by_transformers.glob("published/*.safetensors")))
    assert EXPERT in tensors
    index = json.loads((by_transformers / "packed/model.safetensors.index.json").read_text())
    assert (
        EXPERT not in index["weight_map"] and "model.layers.2.mlp.experts.gate_up_proj" in index["weight_map"]
    )
    cfg, want, want_bias = hf.load(by_transformers / "ours")
    for which in ("published", "packed"):
        got_cfg, params, bias = hf.load(by_transformers / which)
        assert dataclasses.replace(got_cfg, initializer_range=cfg.initializer_range) == cfg
        jax.tree.map(same, params, want)
        same(bias, want_bias)


@pytest.mark.parametrize("scale", ["F32", "F8_E8M0"])
def test_packed_experts_in_fp8(tmp_path, scale):
    """Blocks of an expert's 128 x 128, packed as transformers packs them, with scales in float32 or one byte."""
    cfg = dataclasses.replace(PACKED, hidden_size=136, moe_intermediate_size=128)
    save(tmp_path / "ours", cfg, "fp8", scale="ue8m0")
    path = shutil.copytree(tmp_path / "ours", tmp_path / "packed")
    rewrite(path, lambda t: pack(t, cfg, scale))
    got, want = hf.load(path), hf.load(tmp_path / "ours")
    jax.tree.map(same, got[1:], want[1:])
    jax.tree.map(same, hf.load(path, keep_fp8=True)[1], hf.load(tmp_path / "ours", keep_fp8=True)[1])


def pack(tensors: dict, cfg, scale: str) -> None:
    for layer in range(cfg.first_k_dense_replace, cfg.num_hidden_layers):
        prefix = f"model.layers.{layer}.mlp.experts"
        for suffix in ("", "_scale_inv"):
            names = {
                kind: [f"{prefix}.{e}.{kind}_proj.weight{suffix}" for e in range(cfg.n_routed_experts)]
                for kind in ("gate", "up", "down")
            }
            if names["gate"][0] in tensors:
                parts = {kind: torch.stack([tensors.pop(n) for n in names[kind]]) for kind in names}
                tensors[f"{prefix}.gate_up_proj{suffix}"] = torch.cat([parts["gate"], parts["up"]], 1)
                tensors[f"{prefix}.down_proj{suffix}"] = parts["down"]
    if scale == "F8_E8M0":
        for name in [name for name in tensors if name.endswith("_scale_inv")]:
            tensors[name] = tensors[name].to(torch.float8_e8m0fnu)


def test_packed_experts_that_cannot_be(by_transformers, tmp_path):
    path = shutil.copytree(by_transformers / "packed", tmp_path / "copy")
    name = "model.layers.2.mlp.experts.gate_up_proj"
    edit_header(path, lambda header: header[name].update(shape=[12 * 18 * 24]), name)
    with pytest.raises(
        ValueError, match=rf"tensor {name} is F32\[5184\], expected \[expert, rows, columns\]"
    ):
        hf.load(path)
    path = shutil.copytree(by_transformers / "packed", tmp_path / "copy2")
    edit_header(path, lambda header: header[name].update(shape=[24, 9, 24]), name)
    with pytest.raises(ValueError, match=r"expected .* an even number of rows"):
        hf.load(path)


# --- saving -----------------------------------------------------------------------------------------------


def test_nothing_is_overwritten(folders):
    before = files(folders["bf16"])
    with pytest.raises(ValueError, match="exists already"):
        save(folders["bf16"], V3)
    assert files(folders["bf16"]) == before


def test_parameters_that_do_not_fit_are_named(tmp_path):
    params, bias = weights(V3)
    flat = {path: get(params, path) for path in leaves(V3)}
    wrong = unflatten(flat | {"moe_layers.ffn.gate.w_gate_de": np.zeros((2, 24, 11), np.float32)})
    with pytest.raises(ValueError, match=r"params.moe_layers.ffn.gate.w_gate_de is float32\[2, 24, 11\]"):
        hf.save(tmp_path / "a", V3, wrong, bias)
    lacking = unflatten({k: v for k, v in flat.items() if k != "head.w_head_dv"})
    with pytest.raises(ValueError, match=r"params lack head.w_head_dv"):
        hf.save(tmp_path / "a", V3, lacking, bias)
    with pytest.raises(ValueError, match="balance_bias has shape"):
        hf.save(tmp_path / "a", V3, params, bias[:1])
    with pytest.raises(ValueError, match="format='int4'"):
        hf.save(tmp_path / "a", V3, params, bias, format="int4")
    with pytest.raises(ValueError, match=r"params.embed.w_embed_vd is float16"):
        hf.save(
            tmp_path / "a",
            V3,
            unflatten(flat | {"embed.w_embed_vd": flat["embed.w_embed_vd"].astype("f2")}),
            bias,
        )
    assert not any(tmp_path.iterdir())
