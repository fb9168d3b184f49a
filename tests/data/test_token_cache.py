import contextlib
import json
import multiprocessing
import os
import threading

import numpy as np
import pytest

from deepseek_jax import now
from deepseek_jax.data import cache, token_cache
from deepseek_jax.data.corpus import TRAIN, VALIDATION, Corpus, Reading
from deepseek_jax.data.encoding import encode_documents, split_text
from deepseek_jax.data.token_cache import encode_corpus


@pytest.fixture
def folder(texts, tmp_path):
    """The texts as shards of JSON lines."""
    (tmp_path / "corpus").mkdir()
    for i in range(3):
        lines = [json.dumps({"text": text}) + "\n" for text in texts[i::3]]
        (tmp_path / "corpus" / f"{i}.jsonl").write_text("".join(lines))
    return tmp_path / "corpus"


@pytest.fixture
def encode(folder, tokenizer, tmp_path):
    return lambda **changes: encode_corpus(
        Corpus(str(folder), **({"validation_fraction": 0.3} | changes)), tokenizer, tmp_path / "cache"
    )


@pytest.fixture
def reads(monkeypatch):
    """The files that are read, by name."""
    names, read_file = [], Corpus._read_file

    def reading(self, file, report):
        names.append(os.path.basename(file.path))
        return read_file(self, file, report)

    monkeypatch.setattr(Corpus, "_read_file", reading)
    return names


def entry_of(tmp_path):
    (entry,) = (path for path in (tmp_path / "cache").iterdir() if path.is_dir())
    return entry


def test_second_call_maps_the_first_ones_ids(folder, tokenizer, encode, reads):
    first = encode()
    reads.clear()
    again = encode()
    assert reads == []
    texts = {TRAIN: [], VALIDATION: []}
    reading = Reading()
    for split, document in Corpus(str(folder), validation_fraction=0.3).read(reading):
        texts[split].append(document.text)
    for split, side in texts.items():
        documents, before = getattr(again, split), getattr(first, split)
        assert len(documents) == len(side) and documents.ids.dtype == np.uint16
        assert isinstance(documents.ids, np.memmap) and isinstance(documents.starts, np.memmap)
        assert documents.starts.dtype == np.int64
        for i, text in enumerate(side):
            assert documents[i].tolist() == before[i].tolist() == [*tokenizer.encode(text), tokenizer.eos_id]
        np.testing.assert_array_equal(documents.counts_v, np.bincount(documents.ids, minlength=512))
    assert again.report == reading.report and again.fingerprint == reading.fingerprint(TRAIN)


def cut_short(entry):
    data = (entry / "train.ids").read_bytes()
    (entry / "train.ids").write_bytes(data[: len(data) // 2])


def flip_a_bit(entry):
    data = bytearray((entry / "train.ids").read_bytes())
    data[len(data) // 2] ^= 1
    (entry / "train.ids").write_bytes(data)


def empty_the_starts(entry):
    (entry / "validation.starts").write_bytes(b"")


def lose_the_counts(entry):
    (entry / "train.counts").unlink()


def lose_the_meta(entry):
    (entry / "meta.json").unlink()


def garble_the_meta(entry):
    (entry / "meta.json").write_text('{"files": [["a", 1]], "meta": 0}')


def lose_a_digest(entry):
    stored = json.loads((entry / "meta.json").read_text())
    stored["meta"]["digests"].pop()
    stored["files"][0][2] += 1
    (entry / "meta.json").write_text(json.dumps(stored))


@pytest.mark.parametrize(
    "damage",
    [lose_a_digest, cut_short, flip_a_bit, empty_the_starts, lose_the_counts, lose_the_meta, garble_the_meta],
)
def test_damaged_entry_is_built_again(encode, reads, tmp_path, damage):
    whole = encode().train.ids.tolist()
    damage(entry_of(tmp_path))
    assert encode().train.ids.tolist() == whole
    reads.clear()
    assert encode().train.ids.tolist() == whole and reads == []


def test_of_a_large_entry_only_the_sizes_are_looked_at(encode, monkeypatch):
    encode()
    monkeypatch.setattr(token_cache, "CHECKED_BYTES", 100)
    monkeypatch.setattr(token_cache.zlib, "crc32", None)
    assert len(encode().train) > 0


def test_touched_files_are_read_again_and_changed_ones_encoded(folder, encode, reads, tmp_path):
    first = encode()
    os.utime(folder / "1.jsonl", (1, 1))
    reads.clear()
    assert encode().train.ids.tolist() == first.train.ids.tolist() and set(reads) == {"1.jsonl"}
    reads.clear()
    encode()
    assert reads == [], "the times are remembered"
    (folder / "README").write_text("Beside the shards.")
    assert encode().fingerprint == first.fingerprint and "2.jsonl" not in reads
    with (folder / "2.jsonl").open("a") as file:
        file.write(json.dumps({"text": "one more"}) + "\n")
    changed = encode()
    assert changed.report.documents == first.report.documents + 1 and changed.report.num_skipped == 1
    (folder / "0.jsonl").unlink()
    assert encode().report.documents < changed.report.documents
    assert len([path for path in (tmp_path / "cache").iterdir() if path.is_dir()]) == 1
    assert encode(validation_fraction=0.6).fingerprint != encode().fingerprint, (
        "settings have their own entry"
    )


def test_interrupted_build_leaves_nothing(encode, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(token_cache, "encode_documents", interrupted)
    with pytest.raises(KeyboardInterrupt):
        encode()
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]
    # What a killed process leaves is swept away by the next.
    (building,) = (path.with_suffix(".building") for path in (tmp_path / "cache").iterdir())
    building.mkdir()
    (building / "half").write_text("written")
    monkeypatch.undo()
    encode()
    assert not building.exists()


def test_a_file_that_changes_while_it_is_read(folder, encode, monkeypatch):
    def slow(texts, tokenizer):
        (folder / "0.jsonl").write_text(json.dumps({"text": "changed"}))
        return encode_documents(texts, tokenizer)

    monkeypatch.setattr(token_cache, "encode_documents", slow)
    with pytest.raises(ValueError, match=r"0\.jsonl changed while the corpus was being read"):
        encode()


def test_files_that_come_while_others_are_read(folder, tokenizer, reads):
    """A cache inside the corpus is no change of it; a new shard is there at the next start."""
    corpus = Corpus(str(folder))

    def encode_here():
        return encode_corpus(Corpus(str(folder)), tokenizer, folder / "cache")

    (folder / "late.jsonl").write_text(json.dumps({"text": "late"}))
    first = encode_corpus(corpus, tokenizer, folder / "cache")
    again = encode_here()
    assert again.report.documents == first.report.documents + 1
    reads.clear()
    ids = again.train.ids.tolist()
    assert encode_here().train.ids.tolist() == ids
    assert not any(name.endswith("jsonl") for name in reads)


def test_others_wait_for_the_one_that_builds_and_say_so(encode, tmp_path):
    encode()
    entry = entry_of(tmp_path)
    hold, release, waits = threading.Event(), threading.Event(), threading.Event()
    said, found = [], []

    @contextlib.contextmanager
    def show(what):
        said.append(what)
        waits.set()
        yield

    def holder():  # opens the lock file for itself, as another process does
        with cache._alone(entry, "holding it"):
            hold.set()
            release.wait(60)

    def waiter():
        with now.shown_by(show):
            found.append(encode())

    threads = [threading.Thread(target=holder), threading.Thread(target=waiter)]
    threads[0].start()
    assert hold.wait(60)
    lose_the_meta(entry)
    threads[1].start()
    assert waits.wait(60) and not found
    assert len(said) == 1 and said[0].startswith("waiting for another process that is tokenizing ")
    release.set()
    for thread in threads:
        thread.join(60)
    assert len(found) == 1 and len(said) == 2 and said[1].startswith("tokenizing ")


def _encode_in_process(folder, tokenizer_file, cache_dir, counts):
    from deepseek_jax.data.tokenizer import Tokenizer

    corpus = Corpus(folder, validation_fraction=0.3)
    made = token_cache._make
    token_cache._make = lambda *args: counts.put(1) or made(*args)
    encode_corpus(corpus, Tokenizer.load(tokenizer_file), cache_dir)
    counts.put(0)


def test_of_several_processes_one_encodes(folder, tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer.json")
    context = multiprocessing.get_context("spawn")
    counts = context.Queue()
    arguments = (str(folder), str(tmp_path / "tokenizer.json"), tmp_path / "cache", counts)
    processes = [context.Process(target=_encode_in_process, args=arguments) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    assert sum(counts.get(timeout=10) for _ in range(4)) == 1


def test_a_folder_that_cannot_lock_is_named(encode, monkeypatch):
    def no_locks(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(cache.fcntl, "flock", no_locks)
    with pytest.raises(ValueError, match=r"cannot be locked \(Function not implemented\); give a folder"):
        encode()


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
    monkeypatch.setattr("deepseek_jax.data.encoding.BATCH_CHARS", 5000)
    assert [ids.tolist() for ids in encode_documents(texts, tokenizer)] == whole
