"""Folders of files as a corpus: what is found, how it splits, what it leaves behind."""

import contextlib
import json
import os
import tempfile
from pathlib import Path

import pytest

from deepseek_jax.data.corpus import TRAIN, VALIDATION, Corpus, Reading
from deepseek_jax.data.files import find_files
from deepseek_jax.data.report import CorpusReport


def splits(corpus):
    """The texts of both sides, and what the reading found."""
    reading = Reading()
    texts = {TRAIN: [], VALIDATION: []}
    for split, document in corpus.read(reading):
        texts[split].append(document.text)
    return texts[TRAIN], texts[VALIDATION], reading


def fingerprints(corpus):
    reading = splits(corpus)[2]
    return [reading.fingerprint(split) for split in (TRAIN, VALIDATION)]


def test_one_bad_file_does_not_stop_the_others(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe\xfd")
    (tmp_path / "empty.py").write_bytes(b"")
    for i in range(6):
        (tmp_path / "sub" / f"{i}.txt").write_text(f"document number {i}")
    train, held_out, reading = splits(Corpus(str(tmp_path), validation_fraction=0.3))
    assert train and held_out
    assert sorted(train + held_out) == [f"document number {i}" for i in range(6)]
    report = reading.report
    assert (report.files, report.documents, report.num_skipped) == (8, 6, 2)
    assert CorpusReport.from_json(json.loads(json.dumps(report.to_json()))) == report


def test_nothing_readable_names_the_glob_and_the_reasons(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"")
    (tmp_path / "b.txt").write_bytes(b"\xff")
    for fraction in (0.05, None):
        with pytest.raises(
            ValueError, match=r"nothing readable in .*\*\.txt.*2 files.*a\.txt: empty; .*b\.txt: not UTF-8"
        ):
            splits(Corpus(str(tmp_path / "*.txt"), validation_fraction=fraction))
    with pytest.raises(ValueError, match=r"no file matches .*\*\.md"):
        Corpus(str(tmp_path / "*.md"))
    with pytest.raises(ValueError, match="validation_fraction must lie inside"):
        Corpus(str(tmp_path / "*.txt"), validation_fraction=1.0)


def test_split_follows_the_text_not_the_name(tmp_path):
    def split(folder, names):
        folder.mkdir()
        for name, text in names:
            (folder / name).write_text(text)
        return [set(side) for side in splits(Corpus(str(folder), validation_fraction=0.3))[:2]]

    texts = [f"text {i}" for i in range(30)]
    one = split(tmp_path / "one", [(f"a{i}.txt", t) for i, t in enumerate(texts)])
    other = split(
        tmp_path / "other", [(f"z{90 - i}.txt", t) for i, t in enumerate(texts)] + [("copy.txt", "text 3")]
    )
    assert one == other
    assert 3 <= len(one[1]) <= 15


@pytest.mark.parametrize("fraction", [1e-9, 1 - 1e-9])
def test_where_a_side_would_be_empty_the_nearest_document_moves_over(tmp_path, fraction):
    for i in range(5):
        (tmp_path / f"{i}.txt").write_text(f"text {i}")
    (tmp_path / "again.txt").write_text("text 3")
    train, held_out, _ = splits(Corpus(str(tmp_path), validation_fraction=fraction))
    small = held_out if fraction < 0.5 else train
    assert len(set(small)) == 1 and not set(train) & set(held_out) and len(train + held_out) == 6
    for i in (0, 1, 2, 4):
        (tmp_path / f"{i}.txt").unlink()
    with pytest.raises(ValueError, match="holds one text 2 times"):
        splits(Corpus(str(tmp_path)))


def test_fingerprint_knows_content_not_place(tmp_path):
    for place in ("one", "other"):
        (tmp_path / place).mkdir()
        for i in range(5):
            (tmp_path / place / f"{i}.txt").write_text(f"text {i}")
    one, other = (
        fingerprints(Corpus(source)) for source in (str(tmp_path / "one"), str(tmp_path / "other" / "*.txt"))
    )
    assert one == other and one[0] != one[1]
    (tmp_path / "other" / "0.txt").write_text("text zero")
    assert fingerprints(Corpus(str(tmp_path / "other"))) != one


def test_only_files_that_differ_are_compared(tmp_path, monkeypatch):
    for i in range(5):
        (tmp_path / f"{i}.txt").write_text(f"text {i}")
    (tmp_path / "README").write_text("about")
    corpus = Corpus(str(tmp_path))
    reading = splits(corpus)[2]
    assert reading.files[-1] is None and None not in reading.files[:-1]
    opened = []
    read_file = Corpus._read_file
    monkeypatch.setattr(
        Corpus, "_read_file", lambda self, f, r: opened.append(f.path[-5:]) or read_file(self, f, r)
    )

    def still():
        opened.clear()
        return Corpus(str(tmp_path)).digests_if_same(corpus.files, reading.files)

    assert still() == reading.files and opened == []
    os.utime(tmp_path / "1.txt", (1, 1))
    assert still() and opened == ["1.txt"]
    (tmp_path / "README").write_text("about something else")
    (tmp_path / "2.txt").rename(tmp_path / "20.txt")
    assert still() and opened == ["1.txt", "0.txt", "EADME"]
    (tmp_path / "5.txt").write_text("text 5")
    assert not still()
    (tmp_path / "5.txt").unlink()
    (tmp_path / "0.txt").write_text("text o")
    assert not still() and opened == ["0.txt"]
    (tmp_path / "0.txt").unlink()
    assert not still()


def test_validation_glob_is_kept_out_of_training(tmp_path):
    for name in ("a", "b", "val"):
        (tmp_path / f"{name}.txt").write_text(f"text {name}")
    corpus = Corpus(str(tmp_path / "*.txt"), validation_fraction=None, left_out=str(tmp_path / "val*"))
    assert splits(corpus)[:2] == (["text a", "text b"], [])
    with pytest.raises(ValueError, match="the validation glob takes every file"):
        Corpus(str(tmp_path / "*.txt"), left_out=str(tmp_path))


def test_lone_document_is_cut_at_a_line(tmp_path):
    text = "".join(f"line {i}\n" for i in range(100))
    (tmp_path / "input.txt").write_text(text)
    corpus = Corpus(str(tmp_path / "input.txt"), validation_fraction=0.1)
    (head,), (tail,), _ = splits(corpus)
    assert head + tail == text
    assert tail.startswith("line") and 0.05 < len(tail) / len(text) < 0.15
    assert list(corpus.sample(10**6)) == [head]
    (tmp_path / "input.txt").write_text("x")
    with pytest.raises(ValueError, match="one document of"):
        splits(Corpus(str(tmp_path / "input.txt")))


def test_a_sample_is_bounded_and_of_all_files(tmp_path):
    for i in range(20):
        lines = [json.dumps({"text": f"{i:02d}-{j:02d}"}) for j in range(50)]
        (tmp_path / f"{i:02d}.jsonl").write_text("\n".join(lines))
    corpus = Corpus(str(tmp_path), validation_fraction=0.1)
    train = splits(corpus)[0]
    assert list(corpus.sample(10**6)) == train
    few = list(corpus.sample(500))  # characters: 5 documents of each file
    assert len(few) == 100 and set(few) < set(train) and {text[:2] for text in few} == {t[:2] for t in train}
    assert len({text[:2] for text in corpus.sample(50)}) == 10


def test_links_folders_and_things_that_are_no_files(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "one.txt").write_text("one")
    (tmp_path / "a" / "two.txt").write_text("two")
    (tmp_path / "a" / ".hidden.txt").write_text("hidden")
    (tmp_path / "a" / "b" / "up").symlink_to(tmp_path / "a")  # a folder inside itself
    (tmp_path / "a" / "zz_link.txt").symlink_to(tmp_path / "a" / "two.txt")
    os.link(tmp_path / "a" / "two.txt", tmp_path / "a" / "zz_hard.txt")
    (tmp_path / "a" / "nowhere.txt").symlink_to(tmp_path / "absent")
    (tmp_path / "a" / "itself.txt").symlink_to(tmp_path / "a" / "itself.txt")
    os.mkfifo(tmp_path / "a" / "pipe.txt")  # whoever opened it would wait for ever
    found = ["b/one.txt", "two.txt"]
    for source in ("a", "a/**/*.txt"):
        report = CorpusReport()
        files = find_files(str(tmp_path / source), report)
        assert [os.path.relpath(file.path, tmp_path / "a") for file in files] == found
        skipped = dict(report.skipped)
        assert skipped.pop("a link to a file that is there already") >= 2
        assert skipped == {"a link that leads nowhere": 1, "unreadable file": 1, "not a regular file": 1}
    # Spark writes a folder of parts under the name of a file.
    (tmp_path / "x.parquet").mkdir()
    (tmp_path / "x.parquet" / "part-0.parquet").write_bytes(b"")
    assert len(find_files(str(tmp_path / "*.parquet"), CorpusReport())) == 1


@contextlib.contextmanager
def as_nobody():
    """Without root's right to read everything."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


def test_what_may_not_be_read_is_named():
    with tempfile.TemporaryDirectory() as name:  # pytest's own folder is closed to others
        folder = Path(name)
        folder.chmod(0o755)
        (folder / "closed").mkdir(mode=0)
        for name in "abc":
            (folder / f"{name}.txt").write_text(name)
        (folder / "c.txt").chmod(0)
        with as_nobody():
            report = splits(Corpus(str(folder)))[2].report
    assert report.documents == 2
    assert report.skipped == {"unreadable folder": 1, "unreadable file": 1}
    assert "closed" in report.summary() and "c.txt" in report.summary()


def test_shards_beside_files_that_are_none(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.jsonl").write_text(json.dumps({"text": f"text {i}"}))
    for name in ("README.md", "table.csv", "info.json"):
        (tmp_path / name).write_text("not to be trained on")
    train, held_out, reading = splits(Corpus(str(tmp_path)))
    assert sorted(train + held_out) == ["text 0", "text 1", "text 2"]
    (line,) = reading.report.summary().splitlines()[1:]
    assert line.startswith("  3 not of a known format: ")
    assert all(name in line for name in ("README.md", "table.csv", "info.json"))
    # Spelled out, a table is text.
    assert splits(Corpus(str(tmp_path / "*.csv")))[0][0].startswith("not to be")


def test_standard_library_splits_by_file():
    files = find_files("stdlib", CorpusReport())
    train, held_out, reading = splits(Corpus())
    assert reading.report.files == len(files)
    paths = [file.path for file in files]
    assert not any(part in path for path in paths for part in ("/site-packages/", "/test/", "/tests/"))
    assert any(path.endswith("/argparse.py") for path in paths)
    assert reading.report.num_bytes > 5_000_000
    assert 0.02 < len(held_out) / (len(train) + len(held_out)) < 0.09
    assert fingerprints(Corpus())[0] == reading.fingerprint(TRAIN)
