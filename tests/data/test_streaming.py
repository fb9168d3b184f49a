"""Streaming: what is certain comes out at once, what may still become a character waits."""

import codecs

import numpy as np
import pytest

from deepseek_jax.data.streaming import StreamDecoder
from deepseek_jax.data.tokenizer import Tokenizer
from tests.data.family import make

BROKEN = {  # bytes -> what must be out after each of them
    "whole": (b"\xe6\x97\xa5", ["", "", "日"]),
    "no character begins so": (b"a\xffb", ["a", "a\ufffd", "a\ufffdb"]),
    "cut short": (b"\xe6\x97a", ["", "", "\ufffda"]),
    "one after the other": (b"\xe6\xe6\x97\xa5", ["", "\ufffd", "\ufffd", "\ufffd日"]),
    "continuations alone": (b"\x80\x80", ["\ufffd", "\ufffd\ufffd"]),
    "overlong": (b"\xc0\xaf", ["\ufffd", "\ufffd\ufffd"]),
    "a surrogate": (b"\xed\xa0\x80", ["", "\ufffd\ufffd", "\ufffd\ufffd\ufffd"]),
    "U+FFFD itself": (b"\xef\xbf\xbd", ["", "", "\ufffd"]),
}


@pytest.fixture(scope="module")
def metaspace(tmp_path_factory):
    return Tokenizer.load(make("metaspace", tmp_path_factory.mktemp("metaspace") / "folder"))


def byte_ids(tokenizer) -> dict[int, int]:
    ids = {tokenizer.token_bytes(i): i for i in reversed(range(tokenizer.vocab_size))}
    return {byte: ids[bytes([byte])] for byte in range(256)}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_bytes_flow(tokenizer, metaspace, case):
    raw, want = BROKEN[case]
    for each in (tokenizer, metaspace):
        ids, decoder, text = byte_ids(each), StreamDecoder(each), ""
        if not each.is_byte_level and case == "cut short":  # one for each byte, as its decoder writes
            want = ["", "", "\ufffd\ufffda"]
        for byte, expected in zip(raw, want, strict=True):
            text += decoder.push(ids[byte])
            assert text == expected
        assert decoder.flush() == ""


def test_a_stream_is_the_text_of_all_ids(tokenizer):
    rng = np.random.default_rng(1)
    for _ in range(200):
        ids = rng.integers(0, tokenizer.vocab_size, 30).tolist()
        for skip in (False, True):
            decoder = StreamDecoder(tokenizer, skip)
            parts = [decoder.push(i) for i in ids]
            text = "".join(parts)
            kept = [i for i in ids if not (skip and tokenizer.is_special(i))]
            certain = codecs.getincrementaldecoder("utf-8")("replace").decode(
                b"".join(tokenizer.token_bytes(i) for i in kept)
            )
            assert text == certain
            assert text + decoder.flush() == tokenizer.decode(ids, skip)


def test_spaces_of_metaspace(metaspace):
    text = "the cat  that killed\n the rat: 日本 é <think> x"
    ids = metaspace.encode(text)
    decoder = StreamDecoder(metaspace)
    parts = [decoder.push(i) for i in ids]
    assert "".join(parts) == metaspace.decode(ids) == text
    assert not any("\ufffd" in part for part in parts) and decoder.flush() == ""
    held = StreamDecoder(metaspace)
    for byte in "日".encode()[:2]:
        assert held.push(byte_ids(metaspace)[byte]) == ""
    assert held.flush() == "\ufffd\ufffd"


def test_a_text_that_goes_on(metaspace, tokenizer):
    """A word that does not begin the text keeps its space; byte-level ids have theirs anyway."""
    for each in (metaspace, tokenizer):
        ids = each.encode("the cat that killed 日本")
        for cut in range(1, len(ids)):
            before, after = ids[:cut], ids[cut:]
            decoder = StreamDecoder(each, before=before)
            streamed = "".join([*map(decoder.push, after), decoder.flush()])
            assert each.text_after(before, after) == streamed
            if "\ufffd" not in each.decode(before):
                assert each.decode(before) + streamed == each.decode(ids)
    bos = [metaspace.bos_id]
    assert metaspace.text_after(bos, metaspace.encode("the"), skip_special=True) == "the"
