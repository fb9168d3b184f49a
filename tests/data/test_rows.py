"""Files of rows: JSON lines and Parquet, and what is wrong with which line of them."""

import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_jax.data.report import CorpusReport
from deepseek_jax.data.rows import Row, read_rows, row_files

VALUES = [{"text": "one", "n": 1}, {"text": "zwölf", "n": None}, {"text": "", "n": [{"a": "b"}]}]


def read(source):
    report = CorpusReport()
    return list(read_rows(row_files(str(source), report))), report


def test_json_lines_and_parquet_and_their_names(tmp_path):
    lines = "\n".join(json.dumps(value) for value in VALUES)
    (tmp_path / "a.jsonl").write_text(f"\ufeff{lines}\n\n  \n{json.dumps(VALUES[0])}", encoding="utf-8")
    (tmp_path / "b.ndjson.gz").write_bytes(gzip.compress(lines.encode()))
    typed = [{"m": [{"role": "user", "content": "x"}]}, {"m": [{"role": "user", "calls": [1]}]}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(typed), tmp_path / "c.parquet")
    (tmp_path / "README.md").write_text("about")
    rows, report = read(tmp_path)
    a, b, c = (str(tmp_path / name) for name in ("a.jsonl", "b.ndjson.gz", "c.parquet"))
    assert rows[:4] == [*(Row(f"{a}:{i}", v) for i, v in enumerate(VALUES, 1)), Row(f"{a}:6", VALUES[0])]
    assert rows[4:7] == [Row(f"{b}:{i}", v) for i, v in enumerate(VALUES, 1)]
    assert [row.name for row in rows[7:]] == [f"{c}:0", f"{c}:1"]
    # Parquet knows columns, not which of them a row had.
    assert rows[8].values == {"m": [{"role": "user", "content": None, "calls": [1]}]}
    assert report.files == 3 and report.skipped == {"not of rows": 1}

    # What templates write has no fields that other rows have: a tool would get their parameters.
    def tools(name):
        return {"tools": [{"name": name, "parameters": {"properties": {name: {"type": "int"}}}}], "n": 1}

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([tools("a"), tools("b")]), tmp_path / "c.parquet")
    assert [row.values for row in read(c)[0]] == [tools("a"), tools("b")]
    with pytest.raises(ValueError, match=r"no file of '.*md' holds rows|README.md:1 is not valid JSON"):
        read(tmp_path / "*.md")


@pytest.mark.parametrize(
    ("line", "error"),
    [
        (b'{"a": 1', "a.jsonl:2 is not valid JSON: Expecting"),
        (b"[1]", "a.jsonl:2 does not hold a JSON object"),
        (b'{"a": NaN}', "a.jsonl:2: a=nan is not a finite number"),
        (b'{"a": 1, "a": 2}', "a.jsonl:2 is not valid JSON: key 'a' stands there twice"),
        (b'{"a": "\\ud800"}', "a.jsonl:2: a=.* is not Unicode text"),
        (b'{"a": "\xff"}', "a.jsonl:2 is not valid JSON: 'utf-8' codec"),
        (b"[" * 5000, "a.jsonl:2 is not valid JSON: it is nested deeper"),
    ],
)
def test_a_line_that_is_no_row_is_an_error_that_names_it(tmp_path, line, error):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "ok"}\n' + line + b"\n")
    with pytest.raises(ValueError, match=error) as raised:
        read(tmp_path / "a.jsonl")
    assert "\n" not in str(raised.value)


def test_damaged_files(tmp_path):
    packed = gzip.compress(b'{"text": "ok"}\n' * 999)
    (tmp_path / "a.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    (tmp_path / "b.jsonl.zst").write_bytes(b"(\xb5/\xfd nothing")
    (tmp_path / "c.parquet").write_bytes(b"PAR1 nothing PAR1")
    for name in ("a.jsonl.gz", "b.jsonl.zst", "c.parquet"):
        with pytest.raises(ValueError, match=f"{name} is damaged, truncated or unreadable: ."):
            read(tmp_path / name)
    with pytest.raises(ValueError, match="no file matches"):
        read(tmp_path / "*.json")


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.binary(max_size=60) | st.text(alphabet='{}[]":,\\ué1 \n', max_size=40).map(str.encode))
def test_any_bytes_are_rows_or_one_line(tmp_path_factory, data):
    file = tmp_path_factory.getbasetemp() / "any.jsonl"
    file.write_bytes(data)
    try:
        rows, _ = read(file)
    except ValueError as error:
        assert str(error).startswith(str(file)) and len(str(error).splitlines()) == 1
    else:
        assert all(isinstance(row.values, dict) for row in rows)
