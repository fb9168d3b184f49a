"""A foreign tokenizer through a run: trained with, generated with, exported, loaded by `transformers`."""

import dataclasses
import io
import json
import shutil

import pytest
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

import deepseek_jax
from deepseek_jax.data.encoding import encode_documents
from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.hf import convert
from tests.data.family import CHATML, TEXTS, make
from tests.golden import run as golden

MESSAGES = [{"role": "user", "content": "Where is the <think>?"}]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(folder of the tokenizer, run folder) after one step; then the tokenizer's folder goes."""
    root = tmp_path_factory.mktemp("foreign")
    make("chat_model", root / "tokenizer")
    for name in ("train", "validation"):
        (root / f"{name}.txt").write_text(name.join(TEXTS * 10))
    shutil.copytree(root / "tokenizer", root / "kept")
    cfg = golden.golden_config(root, steps=1)
    data = {
        "tokenizer": str(root / "tokenizer"),
        "fim_rate": 0.0,
        "source": str(root / "train.txt"),
        "validation": str(root / "validation.txt"),
    }
    run = golden.trainer(dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, **data)))
    run.run(progress_file=io.StringIO())
    run.close()
    shutil.rmtree(root / "tokenizer")
    return root / "kept", root / "run"


def test_the_run_generates(trained):
    folder, run = trained
    model, want = deepseek_jax.load(run), Tokenizer.load(folder)
    assert model.stop_ids == want.stop_ids and len(want.stop_ids) == 2
    assert model.tokenizer.fingerprint == want.fingerprint
    assert isinstance(model.generate("the keys <think>", 4), str)
    ids = want.encode_chat(MESSAGES, enable_thinking=False)
    reply = model.chat(MESSAGES, 4, chat_template_kwargs={"enable_thinking": False})
    assert reply == want.decode(model.generate(ids, 4), skip_special=True)


def test_the_export_is_the_tokenizers_folder(trained, tmp_path):
    folder, run = trained
    convert.to_hf(run, tmp_path / "hf")
    for path in folder.iterdir():
        assert (tmp_path / "hf" / path.name).read_bytes() == path.read_bytes()
    theirs, auto = AutoTokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert auto.special_tokens_map == theirs.special_tokens_map and auto.chat_template == CHATML
    assert auto(TEXTS)["input_ids"] == theirs(TEXTS)["input_ids"]
    stops = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
    config = AutoConfig.from_pretrained(tmp_path / "hf")
    assert config.eos_token_id == GenerationConfig.from_pretrained(tmp_path / "hf").eos_token_id == stops
    assert config.bos_token_id is None and config.pad_token_id == theirs.pad_token_id
    ours = deepseek_jax.load(tmp_path / "hf").tokenizer
    assert ours.encode_chat(MESSAGES) == auto.apply_chat_template(
        MESSAGES, return_dict=False, add_generation_prompt=True
    )


def test_documents_of_the_run_end_with_its_eos(trained):
    theirs = AutoTokenizer.from_pretrained(trained[0])
    documents = encode_documents(TEXTS, Tokenizer.load(trained[0]))
    for ids, text in zip(documents, TEXTS, strict=True):
        assert ids.tolist() == [*theirs(text)["input_ids"], theirs.eos_token_id]
