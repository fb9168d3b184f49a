"""JSON files: what is refused, with file and field named on one line."""

import json

import pytest

from deepseek_jax.json_files import MAX_BYTES, MAX_DEPTH, parse_object, read_object


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "^FILE is not valid JSON: Expecting property name"),
        ("[1]", "^FILE does not hold a JSON object"),
        ('{"a": NaN}', "^FILE: a=nan is not a finite number"),
        ('{"a": [0, {"b": -Infinity}]}', r"^FILE: a.1.b=-inf is not a finite number"),
        ('{"a": 1e999}', "^FILE: a=inf is not a finite number"),
        ('{"a": 1, "b": {"c": 1, "c": 2}}', "^FILE is not valid JSON: key 'c' stands there twice"),
        ('{"a": ' + "9" * 5000 + "}", "^FILE is not valid JSON: Exceeds the limit"),
        ('{"a": ' + "[" * 40 + "1" + "]" * 40 + "}", rf"^FILE is not valid JSON: a.0.*nested deeper than {MAX_DEPTH}"),
        ('{"a": ' + "[" * 100_000, rf"^FILE is not valid JSON: it is nested deeper than {MAX_DEPTH}"),
        (r'{"a": "\ud800"}', r"^FILE: a='\\ud800' is not Unicode text"),
        (r'{"\udc00\n": 1}', r"^FILE: '\\udc00\\n'=1 is not Unicode text"),
    ],
)  # fmt: skip
def test_refused_in_one_line(text, message):
    with pytest.raises(ValueError, match=message) as error:
        parse_object(text.encode(), "FILE")
    assert str(error.value).isprintable() and len(str(error.value)) < 400


def test_too_many_containers():
    with pytest.raises(ValueError, match=r"^FILE holds 3000002 lists and objects; at most 2097152 are read"):
        parse_object(b'{"a": [' + b"[]," * 3_000_000 + b"1]}", "FILE")


def test_bytes_that_are_no_text():
    with pytest.raises(ValueError, match=r"^FILE is not valid JSON: 'utf-8' codec"):
        parse_object(b'{"a": "\xff"}', "FILE")


def test_what_is_right_comes_back():
    deep = {"a": 1}
    for _ in range(MAX_DEPTH - 1):
        deep = {"in": [], "of": deep, "names": {}, "é": [1.5, -(10**30), None, True, "\U0001f600"]}
    assert parse_object(json.dumps(deep).encode(), "FILE") == deep


def test_files(tmp_path):
    (tmp_path / "a.json").write_text('{"a": 1}')
    assert read_object(tmp_path / "a.json") == {"a": 1}
    with pytest.raises(ValueError, match=r"b.json is missing"):
        read_object(tmp_path / "b.json")
    with pytest.raises(ValueError, match="is not a file"):
        read_object(tmp_path)
    with open(tmp_path / "large.json", "wb") as f:
        f.truncate(MAX_BYTES + 1)
    with pytest.raises(
        ValueError, match=rf"large.json has {MAX_BYTES + 1} bytes; at most {MAX_BYTES} are read"
    ):
        read_object(tmp_path / "large.json")
