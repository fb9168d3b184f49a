"""Real files of every kind, whole and broken."""

import gzip
import json
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from deepseek_jax.data import readers, unpacking
from deepseek_jax.data.readers import read_file
from deepseek_jax.data.report import CorpusReport


def read(path, text_field="text", named=False):
    report = CorpusReport()
    return [document.text for document in read_file(str(path), text_field, report, named)], report


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
    assert read(path, "id")[1].skipped == {"column 'id' is not a string": 4}  # said once, with the type
    assert read(path, "id")[1].examples == [(str(path), "column 'id' is not a string: int64")]
    assert "columns: content, id" in read(path, "text")[1].summary()
    path.write_bytes(path.read_bytes()[:-30])
    texts, report = read(path, "content")
    assert texts == [] and report.skipped == {"unreadable file": 1}


def test_parquet_whose_column_names_are_no_text(tmp_path):
    path = tmp_path / "x.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["one"], "number": [1]}), path, store_schema=False)
    path.write_bytes(path.read_bytes().replace(b"number", b"n\xc9mber"))
    texts, report = read(path)
    assert texts == [] and report.skipped == {"unreadable file": 1}


def one_column(path, column):
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), path)
    return read(path)


def test_parquet_bytes_that_are_no_text_and_dates_that_are_no_dates(tmp_path):
    path = tmp_path / "x.parquet"
    data = [b"good", b"caf\xe9", "naïve".encode()]
    for kind in (pyarrow.binary(), pyarrow.large_binary()):  # as which some writers declare strings
        texts, report = one_column(path, pyarrow.array(data, kind))
        assert texts == ["good", "naïve"] and report.skipped == {"not UTF-8": 1}
        assert report.examples[0][0] == f"{path}:1"
    # A string column is not checked by who writes it.
    texts, report = one_column(path, pyarrow.array(data, pyarrow.binary()).view(pyarrow.string()))
    assert texts == ["good", "naïve"] and report.skipped == {"not UTF-8": 1}
    dates = pyarrow.array([1 << 61, 0], pyarrow.timestamp("us"))  # one is of the year 75,041
    with pytest.raises((ValueError, OverflowError)):
        dates[0].as_py()
    texts, report = one_column(path, dates)
    assert texts == [] and report.skipped == {"column 'text' is not a string": 2}
    assert one_column(path, pyarrow.array(["a", "b", "a"]).dictionary_encode())[0] == ["a", "b", "a"]
    assert one_column(path, pyarrow.array([["a"], ["b"]]))[1].num_skipped == 2
    assert one_column(path, pyarrow.array([], pyarrow.string()))[1].skipped == {"empty": 1}


def test_json_lines_under_any_name_and_files_of_no_known_format(tmp_path):
    lines = json_lines(["one", "two"])
    for name in ("part-00000", "x.json", "x.txt", "x.json.gz"):
        path = tmp_path / name
        for start in (b"", b"\xef\xbb\xbf", b"\r\n\n"):
            pack = gzip.compress if name.endswith(".gz") else bytes
            path.write_bytes(pack(start + lines))
            assert read(path)[0] == ["one", "two"], name
    unknown = {
        "README.md": "# About these shards",
        "LICENSE": "All rights",
        "table.csv": "text,id\nhello,1\n",
        "info.json": '{\n "features": 1\n}\n',
        "one_line.json": '{"features": 1}',
        "array.json": '[{"text": "one"}]',
        "page.html": "<p>hello",
    }
    for name, content in unknown.items():
        (tmp_path / name).write_text(content)
        texts, report = read(tmp_path / name)
        assert texts == [] and report.skipped == {"not of a known format": 1}, name
        assert name in report.summary()
    # A source that spells out what it wants gets it; but JSON is no text.
    assert read(tmp_path / "table.csv", named=True)[0] == [unknown["table.csv"]]
    assert read(tmp_path / "README.md", named=True)[0] == [unknown["README.md"]]
    assert read(tmp_path / "array.json", named=True)[1].skipped == {"not of a known format": 1}
    # Text whose lines are JSON objects is no text, with the wrong field either; what only looks so is.
    (tmp_path / "x.txt").write_text('{"body": "one"}\n')
    assert read(tmp_path / "x.txt")[1].skipped == {"no field 'text'": 1}
    (tmp_path / "x.log").write_text('{"text": null}\n{"text": "one"}\n')
    assert read(tmp_path / "x.log", named=True)[0] == ["one"]
    (tmp_path / "x.py").write_text('{"text": 1}["text"]\n')
    assert read(tmp_path / "x.py")[0] == ['{"text": 1}["text"]\n']


def test_parquet_under_another_name(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"text": ["one"]}), tmp_path / "part-0")
    assert read(tmp_path / "part-0")[0] == ["one"]


def test_the_report_can_be_printed_whatever_names_and_keys_hold(tmp_path):
    path = tmp_path / "bad\udcff\nname.jsonl"
    path.write_bytes(b'{"\\ud800 \\u001b[2J": "x"}\n{"\\ud801": 1}\n')
    texts, report = read(path)
    assert texts == []
    assert report.summary().encode().decode().count("\n") == 1
    assert "\x1b" not in report.summary() and r"\ud800 \x1b[2J" in report.summary()


def long_window_frame(data, window_log):
    """A zstd frame whose header asks for a window of 2**window_log bytes, around `data` as it is."""
    block = (len(data) << 3 | 1).to_bytes(3, "little") + data
    return b"\x28\xb5\x2f\xfd" + b"\x00" + bytes([(window_log - 10) << 3]) + block


@pytest.mark.parametrize("window_log", [20, 27, 28, 31])
def test_zstd_windows_up_to_the_longest(tmp_path, window_log):
    path = tmp_path / "x.jsonl.zst"
    path.write_bytes(long_window_frame(json_lines(["one"]), window_log))
    assert read(path)[0] == ["one"]


def test_line_endings_byte_order_marks_and_nuls(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a\\r\\nb"}\r\n\r\n{"text": "last"}\r\n')
    assert read(path)[0] == ["a\r\nb", "last"]
    path = tmp_path / "x.txt"
    path.write_bytes(b"one\r\ntwo\r\n")
    assert read(path)[0] == ["one\r\ntwo\r\n"]
    path.write_bytes(b"one\0two")
    assert read(path)[1].examples == [(str(path), "not UTF-8: NUL byte at offset 3")]


def test_long_lines_are_named_and_long_texts_cut(tmp_path, monkeypatch):
    monkeypatch.setattr(unpacking, "MAX_DOCUMENT_BYTES", 1 << 20)
    monkeypatch.setattr(unpacking, "PART_BYTES", 1 << 18)
    monkeypatch.setattr(unpacking, "CHUNK_BYTES", 3000)
    big = "x" * (1 << 21)
    whole = json_lines(["first", big, "x" * 1000, big, "last", big])
    for suffix, pack in (("", bytes), (".gz", gzip.compress), (".zst", zstandard.compress)):
        path = tmp_path / f"x.jsonl{suffix}"
        path.write_bytes(pack(whole))
        texts, report = read(path)
        assert texts == ["first", "x" * 1000, "last"]
        assert report.skipped == {"longer than 1 MiB": 3} and report.examples[0][0] == f"{path}:2"
    path = tmp_path / "x.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["first", big, "last"]}), path)
    assert readers._rows_at_once(pyarrow.parquet.read_metadata(path)) == 1
    texts, report = read(path)
    assert texts == ["first", "last"] and report.skipped == {"longer than 1 MiB": 1}
    # A text is cut after a line, else between characters, and every character is in one of the parts.
    text = "\ufeff" + "line 🙂\n" * (1 << 18) + "🙂" * (1 << 19) + "\nend"
    path = tmp_path / "x.txt"
    path.write_text("\ufeff" + text)
    texts, report = read(path)
    assert "".join(texts) == text and len(texts) > 12 and report.num_skipped == 0
    assert max(len(part.encode()) for part in texts) <= 1 << 18
    assert texts[0].endswith("\n") and texts[1].startswith("line")
    path.write_text(text[: 1 << 16])
    assert read(path)[0] == [text[1 : 1 << 16]], "up to the limit it stays whole"


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst"])
def test_a_line_of_200_mb_is_read_in_bounded_memory(tmp_path, suffix):
    path = tmp_path / f"x{suffix}"
    opener = {".jsonl": open, ".gz": gzip.open, ".zst": zstandard.open}[Path(suffix).suffix or suffix]
    with opener(path, "wb") as file:
        file.write(b'{"text": "')
        for _ in range(200):
            file.write(b"x" * 1_000_000)
        file.write(b'"}\n{"text": "after it"}\n')
    tracemalloc.start()
    try:
        texts, report = read(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert texts == ["after it"] and report.skipped == {"longer than 16 MiB": 1}
    assert (
        peak < 6 * unpacking.MAX_DOCUMENT_BYTES
    )  # of the line as far as the limit, a chunk, and copies while they grow
