import shutil

import numpy as np
import pytest

from deepseek_jax.data.token_cache import encode_documents, split_text, tokenize


def never():
    raise AssertionError("a whole cache entry must not read the texts again")
    yield


def test_second_call_maps_the_first_ones_ids(texts, tokenizer, tmp_path):
    first = tokenize(texts, tokenizer, tmp_path, "x")
    again = tokenize(never(), tokenizer, tmp_path, "x")
    assert len(again) == len(texts) and isinstance(again.ids, np.memmap) and again.ids.dtype == np.uint16
    for i, text in enumerate(texts):
        assert again[i].tolist() == first[i].tolist() == [*tokenizer.encode(text), tokenizer.eos_id]
    np.testing.assert_array_equal(first.counts(512), np.bincount(first.ids, minlength=512))
    assert len(list(tmp_path.iterdir())) == 1, "only the finished entry stays"


def cut_short(entry):
    data = (entry / "ids.bin").read_bytes()
    (entry / "ids.bin").write_bytes(data[: len(data) // 2])


def flip_a_bit(entry):
    data = bytearray((entry / "ids.bin").read_bytes())
    data[len(data) // 2] ^= 1
    (entry / "ids.bin").write_bytes(data)


def empty_the_starts(entry):
    (entry / "starts.npy").write_bytes(b"")


def lose_the_meta(entry):
    (entry / "meta.json").unlink()


def garble_the_meta(entry):
    (entry / "meta.json").write_text('{"dtype": "no such"}')


@pytest.mark.parametrize("damage", [cut_short, flip_a_bit, empty_the_starts, lose_the_meta, garble_the_meta])
def test_damaged_entry_is_built_again(texts, tokenizer, tmp_path, damage):
    whole = tokenize(texts, tokenizer, tmp_path, "x").ids.tolist()
    (entry,) = tmp_path.iterdir()
    damage(entry)
    assert tokenize(texts, tokenizer, tmp_path, "x").ids.tolist() == whole
    assert tokenize(never(), tokenizer, tmp_path, "x").ids.tolist() == whole


def test_interrupted_and_concurrent_builds(texts, tokenizer, tmp_path):
    def interrupted():
        yield texts[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tokenize(interrupted(), tokenizer, tmp_path, "x")
    assert list(tmp_path.iterdir()) == []

    def overtaken():  # another process finishes the entry while this one is still reading
        yield from texts
        tokenize(texts, tokenizer, tmp_path / "other", "x")
        (entry,) = (tmp_path / "other").iterdir()
        shutil.move(entry, tmp_path / entry.name)

    documents = tokenize(overtaken(), tokenizer, tmp_path, "x")
    assert len(documents) == len(texts)


def test_long_documents_encode_in_pieces_as_they_do_whole(texts, tokenizer):
    text = "\n".join(texts) + "\n\n   tail \n"
    pieces = list(split_text(text, limit=500))
    assert "".join(pieces) == text and len(pieces) > 50
    assert [i for ids in tokenizer.encode_batch(pieces) for i in ids] == tokenizer.encode(text)
    assert list(split_text("x" * 1000, limit=10)) == ["x" * 1000]
    assert list(split_text("short")) == ["short"]


def test_batches_do_not_change_the_result(texts, tokenizer, monkeypatch):
    texts = [*texts, "\n".join(texts * 10), "last"]
    assert len(list(split_text(texts[-2]))) > 1, "one document must reach over several batches"
    whole = [ids.tolist() for ids in encode_documents(texts, tokenizer)]
    assert whole == [[*tokenizer.encode(text), tokenizer.eos_id] for text in texts]
    monkeypatch.setattr("deepseek_jax.data.token_cache.BATCH_CHARS", 5000)
    assert [ids.tolist() for ids in encode_documents(texts, tokenizer)] == whole
