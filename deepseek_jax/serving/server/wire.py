"""JSON as it goes out: compact UTF-8, and finite."""

import json
from typing import Any

from starlette.responses import Response

Json = dict[str, Any]


def json_text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def json_bytes(value: Any) -> bytes:
    return utf8(json_text(value))


def utf8(text: str) -> bytes:
    """A lone surrogate in JSON, which UTF-8 cannot hold, is written as JSON's escape."""
    return text.encode("utf-8", "backslashreplace")


def answer(value: Any) -> Response:
    return Response(json_bytes(value), media_type="application/json")
