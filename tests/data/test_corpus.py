"""Real files of every kind, whole and broken."""

import gzip
import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from deepseek_jax.data.corpus import TRAIN, VALIDATION, Corpus, find_files
from deepseek_jax.data.readers import CorpusReport, read_file


def read(path, text_field="text"):
    report = CorpusReport()
    return [document.text for document in read_file(str(path), text_field, report)], report


def json_lines(texts, field="text"):
    return "".join(json.dumps({field: text}) + "\n" for text in texts).encode()


def random_words(n, seed=0):
    """Text that does not compress away, so that cutting an archive cuts text."""
    return " ".join(map(str, np.random.default_rng(seed).integers(0, 1 << 30, n)))


def test_text_keeps_every_character_and_drops_the_byte_order_mark(tmp_path):
    text = "  naïve\r\n\t日本語 🙂\n\n"
    (tmp_path / "a.md").write_bytes(b"\xef\xbb\xbf" + text.encode())
    texts, report = read(tmp_path / "a.md")
    assert texts == [text]
    assert (report.files, report.documents, report.num_bytes) == (1, 1, len(text.encode()))
    assert report.num_skipped == 0


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"", "empty"),
        (b" \n\t\n", "empty"),
        ("café".encode("latin-1"), "not UTF-8"),
        ("plain".encode("utf-16-le"), "not UTF-8"),
        ("plain".encode("utf-16"), "not UTF-8"),
    ],
)
def test_bad_text_is_named_and_skipped(tmp_path, content, kind):
    (tmp_path / "bad.txt").write_bytes(content)
    texts, report = read(tmp_path / "bad.txt")
    assert texts == []
    assert report.skipped == {kind: 1}
    assert report.examples[0][0] == str(tmp_path / "bad.txt")
    assert "bad.txt" in report.summary() and kind in report.summary()


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_json_lines_with_bad_lines_between_good_ones(tmp_path, suffix):
    lines = [
        b'{"body": "first", "id": 1}',
        b'{"body": "cut off',
        b"",
        b'{"text": "other field"}',
        b'{"body": 5}',
        b'["body"]',
        b'{"body": "caf\xe9"}',
        b'{"body": "\\ud800"}',
        b'{"body": "  "}',
        b"[" * 100_000,
        b'{"body": "last\\n\\u00e9"}',
    ]
    pack = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}[suffix]
    path = tmp_path / f"x.jsonl{suffix}"
    path.write_bytes(pack(b"\n".join(lines)))
    texts, report = read(path, "body")
    assert texts == ["first", "last\né"]
    assert report.skipped == {
        "not JSON": 2,
        "no field 'body'": 1,
        "field 'body' is not a string": 1,
        "not a JSON object": 1,
        "not UTF-8": 1,
        "lone surrogate, not valid Unicode text": 1,
        "empty": 1,
    }
    assert [name for name, _ in report.examples] == [f"{path}:{n}" for n in (2, 4, 5, 6, 7, 8, 9, 10)]
    assert "fields: text" in report.summary()


@pytest.mark.parametrize(("suffix", "pack"), [(".gz", gzip.compress), (".zst", zstandard.compress)])
def test_truncated_archive_gives_its_whole_lines_and_is_named(tmp_path, suffix, pack):
    texts = [random_words(10_000, seed) for seed in range(20)]
    whole = pack(json_lines(texts))
    path = tmp_path / f"x.jsonl{suffix}"
    path.write_bytes(whole[: len(whole) * 2 // 3])
    found, report = read(path)
    assert 0 < len(found) < len(texts)
    assert found == texts[: len(found)]
    assert report.skipped == {"damaged or truncated archive": 1}
    # A text cut short is no document at all.
    path = tmp_path / f"x.txt{suffix}"
    path.write_bytes(pack(random_words(20_000).encode())[:-20])
    found, report = read(path)
    assert found == [] and report.skipped == {"damaged or truncated archive": 1}
    # Nor is something that only carries the name of an archive.
    path.write_bytes(b"plain text, not an archive")
    assert read(path)[1].skipped == {"damaged or truncated archive": 1}


def test_zst_of_several_frames_and_of_none(tmp_path):
    path = tmp_path / "x.jsonl.zst"
    path.write_bytes(zstandard.compress(json_lines(["one"])) + zstandard.compress(json_lines(["two"])))
    assert read(path)[0] == ["one", "two"]
    path.write_bytes(b"")
    assert read(path)[1].skipped == {"empty": 1}


def test_parquet(tmp_path):
    path = tmp_path / "x.parquet"
    table = pyarrow.table({"content": ["one", None, "", "four"], "id": [1, 2, 3, 4]})
    pyarrow.parquet.write_table(table, path)
    texts, report = read(path, "content")
    assert texts == ["one", "four"]
    assert report.skipped == {"column 'content' is not a string": 1, "empty": 1}
    assert read(path, "id")[1].skipped == {"column 'id' is not a string": 4}
    assert "columns: content, id" in read(path, "text")[1].summary()
    path.write_bytes(path.read_bytes()[:-30])
    texts, report = read(path, "content")
    assert texts == [] and report.skipped == {"unreadable file": 1}


def test_one_bad_file_does_not_stop_the_others(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe\xfd")
    (tmp_path / "empty.py").write_bytes(b"")
    for i in range(6):
        (tmp_path / "sub" / f"{i}.txt").write_text(f"document number {i}")
    corpus = Corpus(str(tmp_path), validation_fraction=0.3)
    train, held_out = ({d.text for d in corpus.documents(split)} for split in (TRAIN, VALIDATION))
    assert train and held_out and not train & held_out
    assert train | held_out == {f"document number {i}" for i in range(6)}
    assert (corpus.report.files, corpus.report.documents, corpus.report.num_skipped) == (8, 6, 2)


def test_nothing_readable_names_the_glob_and_the_reasons(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"")
    (tmp_path / "b.txt").write_bytes(b"\xff")
    with pytest.raises(
        ValueError, match=r"nothing readable in .*\*\.txt.*2 files.*a\.txt: empty; .*b\.txt: not UTF-8"
    ):
        Corpus(str(tmp_path / "*.txt"))
    with pytest.raises(ValueError, match=r"no file matches .*\*\.md"):
        Corpus(str(tmp_path / "*.md"))
    with pytest.raises(ValueError, match="validation_fraction must lie inside"):
        Corpus(str(tmp_path / "*.txt"), validation_fraction=1.0)


def test_split_follows_the_text_not_the_name(tmp_path):
    def split(folder, names):
        folder.mkdir()
        for name, text in names:
            (folder / name).write_text(text)
        corpus = Corpus(str(folder), validation_fraction=0.3)
        return [{d.text for d in corpus.documents(s)} for s in (TRAIN, VALIDATION)]

    texts = [f"text {i}" for i in range(30)]
    one = split(tmp_path / "one", [(f"a{i}.txt", t) for i, t in enumerate(texts)])
    other = split(
        tmp_path / "other", [(f"z{90 - i}.txt", t) for i, t in enumerate(texts)] + [("copy.txt", "text 3")]
    )
    assert one == other
    assert 3 <= len(one[1]) <= 15


def test_fingerprint_knows_content_not_place(tmp_path):
    for place in ("one", "other"):
        (tmp_path / place).mkdir()
        for i in range(5):
            (tmp_path / place / f"{i}.txt").write_text(f"text {i}")
    one, other = Corpus(str(tmp_path / "one")), Corpus(str(tmp_path / "other" / "*.txt"))
    assert [one.fingerprint(s) for s in (TRAIN, VALIDATION)] == [
        other.fingerprint(s) for s in (TRAIN, VALIDATION)
    ]
    assert one.fingerprint(TRAIN) != one.fingerprint(VALIDATION)
    (tmp_path / "other" / "0.txt").write_text("text zero")
    changed = Corpus(str(tmp_path / "other"))
    assert one.fingerprint(TRAIN) + one.fingerprint(VALIDATION) != (
        changed.fingerprint(TRAIN) + changed.fingerprint(VALIDATION)
    )
    with pytest.raises(ValueError, match="changed while the corpus was being read"):
        [list(other.documents(s)) for s in (TRAIN, VALIDATION)]


def test_validation_glob_is_kept_out_of_training(tmp_path):
    for name in ("a", "b", "val"):
        (tmp_path / f"{name}.txt").write_text(f"text {name}")
    corpus = Corpus(str(tmp_path / "*.txt"), validation=str(tmp_path / "val*"))
    assert [d.text for d in corpus.documents(TRAIN)] == ["text a", "text b"]
    assert [d.text for d in corpus.documents(VALIDATION)] == ["text val"]
    with pytest.raises(ValueError, match="the validation glob takes every file"):
        Corpus(str(tmp_path / "*.txt"), validation=str(tmp_path))


def test_lone_document_is_cut_at_a_line(tmp_path):
    text = "".join(f"line {i}\n" for i in range(100))
    (tmp_path / "input.txt").write_text(text)
    corpus = Corpus(str(tmp_path / "input.txt"), validation_fraction=0.1)
    (head,), (tail,) = (list(corpus.documents(split)) for split in (TRAIN, VALIDATION))
    assert head.text + tail.text == text
    assert tail.text.startswith("line") and 0.05 < len(tail.text) / len(text) < 0.15
    (tmp_path / "input.txt").write_text("x")
    with pytest.raises(ValueError, match="one document of"):
        Corpus(str(tmp_path / "input.txt"))


def test_standard_library_splits_by_file():
    corpus = Corpus()
    files = find_files("stdlib")
    assert corpus.report.files == len(files)
    assert not any(part in path for path in files for part in ("/site-packages/", "/test/", "/tests/"))
    assert any(path.endswith("/argparse.py") for path in files)
    assert corpus.report.num_bytes > 5_000_000
    train, held_out = ({d.name for d in corpus.documents(split)} for split in (TRAIN, VALIDATION))
    assert not train & held_out
    assert 0.02 < len(held_out) / len(train | held_out) < 0.09
    assert Corpus().fingerprint(TRAIN) == corpus.fingerprint(TRAIN)
