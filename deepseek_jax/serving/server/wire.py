"""JSON as it goes out: compact UTF-8, and finite."""

import json
from typing import Any

from starlette.responses import Response

Json = dict[str, Any]

# Ends of lines to `str.splitlines`, by which httpx cuts a stream in lines; JSON has them as they are.
_ENDS = tuple((end, f"\\u{ord(end):04x}") for end in "\x85\u2028\u2029")


def json_text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def json_bytes(value: Any) -> bytes:
    return utf8(json_text(value))


def utf8(text: str) -> bytes:
    """A lone surrogate in JSON, which UTF-8 cannot hold, is written as JSON's escape, and so is the end of a line."""
    for end, escape in _ENDS:
        text = text.replace(end, escape)
    return text.encode("utf-8", "backslashreplace")


def answer(value: Any) -> Response:
    return Response(json_bytes(value), media_type="application/json")
