"""Special and added tokens as folders may declare them, drawn at random, against `transformers`."""

import json
import random
import shutil

import pytest
from transformers import PreTrainedTokenizerFast

from deepseek_jax.data.tokenizer import Tokenizer
from tests.data.family import FAMILY, TEXTS, make

POOL = [
    "<s>",
    "</s>",
    "<a>",
    "TOOL",
    "the",
    "cat",
    "<think>",
    " keys",
    "é",
    "日本",
    "<unk>",
    "\n\n",
    "THE",
    "n",
]
STRINGS = [*TEXTS, " a<a>b <b> the cat THE thecat <think> é 日本 keys\n\n\nTOOL n", "<s><s> </s><unk>"]


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    root = tmp_path_factory.mktemp("bases")
    return {name: make(name, root / name) for name in FAMILY}


def flags(rng):
    return {name: rng.random() < 0.3 for name in ("lstrip", "rstrip", "normalized", "single_word")}


def token(rng):
    content = rng.choice(POOL)
    if rng.random() < 0.6:
        return content
    return {"__type": "AddedToken", "content": content, **flags(rng)}


def config(rng):
    """A tokenizer_config.json."""
    found = {"image_token": rng.choice(POOL)} if rng.random() < 0.4 else {}
    for name in ("bos", "eos", "pad", "unk", "sep"):
        if rng.random() < 0.5:
            found[f"{name}_token"] = token(rng) if rng.random() < 0.8 else None
    more = [rng.choice(POOL), rng.choice(POOL)]
    key, value = rng.choice(
        [
            ("additional_special_tokens", more),
            ("extra_special_tokens", more),
            ("extra_special_tokens", {"call_token": more[0]}),
            ("split_special_tokens", True),
            ("model_max_length", 10**30),
        ]
    )
    return found | {key: value}


def listed(rng):
    return {"content": rng.choice(POOL), "special": rng.random() < 0.5, **flags(rng)}


def write(folder, rng):
    """The files beside tokenizer.json: a list of added tokens in the config, or the older files."""
    for name in ("special_tokens_map.json", "config.json"):
        (folder / name).unlink(missing_ok=True)
    said = config(rng)
    if rng.random() < 0.5:
        said["added_tokens_decoder"] = {str(600 + i): listed(rng) for i in range(3)}
    else:
        older = {"bos_token": {"content": rng.choice(POOL), "lstrip": False}, "cls_token": rng.choice(POOL)}
        (folder / "special_tokens_map.json").write_text(json.dumps(older))
    (folder / "tokenizer_config.json").write_text(json.dumps(said))


@pytest.mark.parametrize("seed", range(40))
def test_whatever_a_folder_declares(bases, tmp_path, seed):
    rng = random.Random(seed)
    folder = shutil.copytree(bases[rng.choice(list(bases))], tmp_path / "folder")
    write(folder, rng)
    theirs, ours = PreTrainedTokenizerFast.from_pretrained(folder), Tokenizer.load(folder)
    assert ours.names == theirs.special_tokens_map
    assert ours._full.get_vocab() == theirs.get_vocab()
    control = set(ours.control_ids) - {ours._full.token_to_id("<unk>")}
    for text in STRINGS:
        ids = theirs(text)["input_ids"]
        assert ours.encode_prompt(text) == ids
        assert ours.decode(ids, skip_special=True) == theirs.decode(ids, skip_special_tokens=True)
        assert not control & set(ours.encode(text))
