"""Everything that says what a text is, against `transformers`, over a family of tokenizers."""

import itertools
import json
import shutil

import numpy as np
import pytest
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from deepseek_jax.data.cuts import LINES, WORDS
from deepseek_jax.data.encoding import encode_documents, split_text
from deepseek_jax.data.special_tokens import SPECIAL_TOKENS
from deepseek_jax.data.streaming import StreamDecoder
from deepseek_jax.data.tokenizer import Tokenizer
from tests.data.family import FAMILY, TEXTS, make

STRINGS = [
    *TEXTS,
    "",
    " ",
    "  leading and trailing  ",
    "\n\n a\r\nb\t\tc \n",
    "日本語、中文 and ひらがな 🙂👩‍👩‍👧 é \x00 ½",
    "<think>why?</think> TOOL, TOOLS aTOOL TOOL.",
    "[keys]  and [keys] <img> the <|call|>it",
    "12345678 3.14",
    "".join(map(chr, range(0x20, 0x250))),
]
CONTROL = "a<|im_end|>b <s>c</s> <｜User｜> <|eot_id|><|EOT|> <｜end▁of▁sentence｜> <|call|>"
QUESTION = {"role": "user", "content": "Where is the <think>?"}
CALL = {"type": "function", "function": {"name": "find", "arguments": {"what": "é <cat>"}}}
TOOLS = [{"type": "function", "function": {"name": "find", "parameters": {"type": "object"}}}]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("family")
    return {name: make(name, root / name) for name in FAMILY}


@pytest.fixture(scope="module", params=FAMILY)
def both(request, folders):
    """(ours, transformers', the folder)"""
    folder = folders[request.param]
    return Tokenizer.load(folder), PreTrainedTokenizerFast.from_pretrained(folder), folder


def test_ids_of_prompts_and_documents(both):
    ours, theirs, _ = both
    for text in [*STRINGS, "\n".join(STRINGS) * 3]:
        assert ours.encode_prompt(text) == theirs(text)["input_ids"]
        assert ours.encode(text, allow_special=True) == theirs(text, add_special_tokens=False)["input_ids"]
    assert ours.encode_prompt(CONTROL) == theirs(CONTROL)["input_ids"]
    # Documents know the ordinary added tokens and not the control tokens.
    for text in [text for text in STRINGS if "<|" not in text and "<img>" not in text]:
        assert ours.encode(text) == theirs(text, add_special_tokens=False)["input_ids"]
    ids = theirs.get_vocab()
    control = {ids[name] for name in (*theirs.all_special_tokens, *SPECIAL_TOKENS.values()) if name in ids}
    control |= {i for i, token in theirs.added_tokens_decoder.items() if token.special}
    assert not (control - {ids.get("<unk>")}) & set(ours.encode(CONTROL))
    assert ours._full.get_vocab() == ids
    assert {i for token, i in ours._plain.get_vocab().items() if ids.get(token) != i} <= control


HARD_TO_CUT = [
    *(
        "a",
        "1",
        "(",
        "/",
        "\u0301",
        "日",
        "<think>",
        "TOOL",
        "\x00",
        ")))",
        "'re",
        "'re",
        "é",
        "[keys]",
        "x's",
        "\x1c",
    ),
    *("a b", "a  b", "TOOL b", "a TOOL", "b <think> c", "'re a", "日 a", "a 日 b", "1 a 1", "A' b"),
]


def test_long_documents_have_the_ids_of_the_whole(both):
    """However often a document is cut, and whatever stands at the places."""
    ours, theirs, _ = both
    rng = np.random.default_rng(0)
    spaces = ["\n", " ", "  ", "\n\n", " \n", "\n ", "\r\n", "\t", " \n \n", "\u3000\n", "\x1c\n", ""]
    words = [str(rng.choice(HARD_TO_CUT)) + str(rng.choice(spaces)) for _ in range(4000)]
    documents = ["".join(words), "short", *TEXTS]
    want = [theirs(document, add_special_tokens=False)["input_ids"] for document in documents]
    for size in (1, 31, 1 << 18):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(split_text, "__defaults__", (None, size))
            got = [ids.tolist() for ids in encode_documents(documents, ours)]
            assert len(list(split_text(documents[0], ours.cuts))) > (100 if ours.cuts and size < 50 else 0)
        assert got == [[*ids, ours.eos_id] for ids in want]


def test_which_are_cut_where(folders, tokenizer):
    found = {name: Tokenizer.load(folder).cuts for name, folder in folders.items()}
    assert [name for name, cut in found.items() if cut is LINES] == [
        "bos_model",
        "qwen",
        "deepseek_v2",
        "deepseek_v3",
    ]
    assert [name for name, cut in found.items() if cut is WORDS] == [
        "chat_model",
        "metaspace_words",
        "llama_2",
    ]
    assert tokenizer.cuts is LINES


def test_documents_that_are_cut_elsewhere_change(folders):
    """The rule matters: at other places pieces have other ids."""
    for name, cut, text in (
        ("metaspace", LINES, "the cat\nthe rat"),
        ("metaspace", WORDS, TEXTS[1]),
        ("chat_model", LINES, "values\n\nclass"),
        ("sentencepiece", WORDS, "the cat"),
    ):
        tokenizer = Tokenizer.load(folders[name])
        pieces = tokenizer.encode_batch(list(split_text(text, cut, 1)))
        assert len(pieces) > 1 and [*itertools.chain(*pieces)] != tokenizer.encode(text)


def test_special_tokens(both):
    ours, theirs, _ = both
    assert ours.names == theirs.special_tokens_map
    for name in ("bos", "eos", "pad"):
        want = getattr(theirs, f"{name}_token_id")
        if want is None and f"{name}_token" in json.loads((both[2] / "tokenizer_config.json").read_text()):
            with pytest.raises(ValueError, match=f"no {name} token"):
                ours.special_id(name)
        elif want is not None:
            assert ours.special_id(name) == want
    assert ours.vocab_size == max(theirs.get_vocab().values()) + 1


def test_stops(folders):
    for name, folder in folders.items():
        ours, theirs = Tokenizer.load(folder), PreTrainedTokenizerFast.from_pretrained(folder)
        if (folder / "generation_config.json").exists():
            assert list(ours.stop_ids) == GenerationConfig.from_pretrained(folder).eos_token_id
            assert len(ours.stop_ids) == 2
        elif name == "sentencepiece":  # config.json names another
            assert ours.stop_ids == (theirs.eos_token_id, 5)
        elif name == "deepseek_v3":  # no file says anything, the vocabulary has DeepSeek's
            assert theirs.eos_token is None and ours.stop_ids == (ours.eos_id,) == (1,)
        else:
            assert ours.stop_ids == (theirs.eos_token_id,)


def test_decoding(both):
    ours, theirs, _ = both
    rng = np.random.default_rng(0)
    rows = [theirs(text)["input_ids"] for text in [*STRINGS, CONTROL]]
    rows += rng.integers(0, ours.vocab_size, (30, 20)).tolist()
    for ids in rows:
        for skip in (False, True):
            assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip)
            if _decodes_by_parts(ours, ids):
                decoder = StreamDecoder(ours, skip)
                assert "".join([*map(decoder.push, ids), decoder.flush()]) == ours.decode(ids, skip)


def _decodes_by_parts(tokenizer, ids) -> bool:
    """Not where byte tokens of whole and of broken characters meet."""
    return tokenizer.is_byte_level or "\ufffd" not in tokenizer.decode(ids)


def test_bytes_of_the_ids(both):
    """All ids of a text together stand for its bytes; where a space is put before, for that too."""
    ours = both[0]
    lengths_v = ours.byte_lengths()
    for text in TEXTS:
        ids = ours.encode(text)
        if ours._full.token_to_id("<unk>") in ids or "[keys]" in text:
            continue
        extra = lengths_v[ids].sum() - len(text.encode())
        assert 0 <= extra <= (0 if ours.is_byte_level else 1)
    assert lengths_v[ours.eos_id] == 0


def test_chat(folders):
    ours = Tokenizer.load(folders["chat_model"])
    theirs = PreTrainedTokenizerFast.from_pretrained(folders["chat_model"])
    called = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    answer = {"role": "tool", "content": "there"}
    said = {"role": "assistant", "content": "There 日本."}
    for messages in ([QUESTION], [QUESTION, called], [QUESTION, called, answer, said, QUESTION]):
        for switches in ({}, {"tools": TOOLS}, {"enable_thinking": False}, {"enable_thinking": True}):
            for add in (True, False):
                text = theirs.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=add, **switches
                )
                assert ours.chat_template.render(messages, add, **switches) == text
                ids = theirs.apply_chat_template(
                    messages, add_generation_prompt=add, return_dict=False, **switches
                )
                assert ours.encode_chat(messages, add, **switches) == ids
        masked = theirs.apply_chat_template(messages, return_assistant_tokens_mask=True, tools=TOOLS)
        ids, mask = ours.encode_turns(messages, tools=TOOLS)
        assert (ids, mask) == (masked["input_ids"], [bool(x) for x in masked["assistant_masks"]])
    assert "".join(ours.decode([i for i, m in zip(ids, mask, strict=True) if m])) == (
        '<tool_call>{"name": "find", "arguments": {"what": "é <cat>"}}</tool_call><|im_end|>There 日本.<|im_end|>'
    )


def test_a_rendered_chat_has_one_bos(folders):
    ours = Tokenizer.load(folders["bos_model"])
    theirs = PreTrainedTokenizerFast.from_pretrained(folders["bos_model"])
    ids = ours.encode_chat([QUESTION])
    assert ids == theirs.apply_chat_template([QUESTION], return_dict=False)
    assert ids.count(ours.bos_id) == 1 and ids[0] == ours.bos_id


def test_saved_whole(both, tmp_path):
    """What a run keeps loads to the same, in `transformers` too; the files are those that there were."""
    ours, theirs, folder = both
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "chat_template.jinja").write_text("of another tokenizer")
    ours.save(tmp_path)
    there = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "config.json"}
    saved = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert saved.items() >= there.items()
    assert saved.keys() - there.keys() <= {"generation_config.json"}
    again = Tokenizer.load(tmp_path)
    assert (again.fingerprint, again.stop_ids, again.names) == (ours.fingerprint, ours.stop_ids, ours.names)
    written = GenerationConfig.from_pretrained(tmp_path).eos_token_id
    assert tuple(written if isinstance(written, list) else [written]) == ours.stop_ids
    auto = AutoTokenizer.from_pretrained(tmp_path)
    assert auto.special_tokens_map == theirs.special_tokens_map and auto.chat_template == theirs.chat_template
    assert auto(STRINGS)["input_ids"] == theirs(STRINGS)["input_ids"]


def test_a_trained_one_is_saved_for_transformers(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    auto = AutoTokenizer.from_pretrained(tmp_path)
    for text in STRINGS:
        assert auto(text)["input_ids"] == tokenizer.encode_prompt(text)
    assert (auto.bos_token_id, auto.eos_token_id, auto.pad_token_id) == (0, 1, 2)
    assert auto.apply_chat_template([QUESTION], return_dict=False, add_generation_prompt=True) == (
        tokenizer.encode_chat([QUESTION])
    )
    assert GenerationConfig.from_pretrained(tmp_path).eos_token_id == 1
    assert Tokenizer.load(tmp_path).fingerprint == tokenizer.fingerprint


def test_a_template_that_is_no_jinja_stops_only_chats(folders, tmp_path):
    folder = shutil.copytree(folders["bos_model"], tmp_path / "folder")
    for template, error in (
        ("{% do_this %}", "unknown tag 'do_this'"),
        ("{% if %}", "Expected an expression"),
    ):
        (folder / "chat_template.jinja").write_text(template)
        tokenizer = Tokenizer.load(folder)
        assert tokenizer.encode_prompt("the")[0] == tokenizer.bos_id
        with pytest.raises(ValueError, match=f"chat template: .*{error}"):
            tokenizer.encode_chat([QUESTION])
        tokenizer.save(tmp_path / "saved")
        assert (tmp_path / "saved" / "chat_template.jinja").read_text() == template
    for left in ("with_config", "without"):
        (folder / "chat_template.jinja").write_bytes(b"\xff")
        tokenizer = Tokenizer.load(folder)
        tokenizer.save(tmp_path / left)
        assert (tmp_path / left / "chat_template.jinja").read_bytes() == b"\xff"
        with pytest.raises(ValueError, match=r"chat_template\.jinja is not UTF-8 text"):
            tokenizer.encode_chat([QUESTION])
        (folder / "tokenizer_config.json").unlink(missing_ok=True)
    plain = Tokenizer.load(folders["metaspace"])
    with pytest.raises(ValueError, match=r"no chat template: put a chat_template\.jinja beside it"):
        plain.encode_chat([QUESTION])


@pytest.mark.parametrize(
    ("name", "content", "error"),
    [
        ("tokenizer_config.json", "[]", "does not hold a JSON object"),
        ("tokenizer_config.json", "{", r"tokenizer_config\.json is not valid JSON"),
        ("tokenizer_config.json", '{"eos_token": 3}', "eos_token=3 is not a token"),
        ("tokenizer_config.json", '{"added_tokens_decoder": ["a"]}', "added_tokens_decoder is not an object"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"3": {}}}', r"added_tokens_decoder\.3=\{\} is not a token"),
        ("tokenizer_config.json", '{"extra_special_tokens": "a"}', "extra_special_tokens='a' is not a list"),
        ("generation_config.json", '{"eos_token_id": "a"}', r"generation_config\.json: eos_token_id='a' is neither an id"),
        ("generation_config.json", '{"eos_token_id": [1, -1]}', r"eos_token_id=\[1, -1\] is neither"),
        ("generation_config.json", '{"eos_token_id": 4294967296}', "eos_token_id=4294967296 is neither"),
        ("generation_config.json", '{"eos_token_id": true}', "eos_token_id=True is neither"),
    ],
)  # fmt: skip
def test_damaged_files_are_named(folders, tmp_path, name, content, error):
    folder = shutil.copytree(folders["chat_model"], tmp_path / "folder")
    (folder / name).write_text(content)
    with pytest.raises(ValueError, match=rf"{tmp_path}.*{error}"):
        Tokenizer.load(folder)


def test_files_are_as_readable_as_any_other(folders, tmp_path):
    """A folder that others read, as a shared export: the user's umask decides, not a temporary file's 0600."""
    Tokenizer.load(folders["chat_model"]).save(tmp_path / "saved")
    (tmp_path / "other").touch()
    modes = {path.stat().st_mode for path in (*(tmp_path / "saved").iterdir(), tmp_path / "other")}
    assert len(modes) == 1 and not list(tmp_path.rglob("*.partial"))
