"""What a client wants, as it is sent on to servers."""

import secrets
from collections.abc import Mapping
from typing import Any, NamedTuple

from starlette.requests import Request as HttpRequest

from deepseek_jax.checks import shown
from deepseek_jax.json_files import parse_object
from deepseek_jax.serving.router.choice import Ask
from deepseek_jax.serving.router.prefix import ask_of
from deepseek_jax.serving.server.body import read_body
from deepseek_jax.serving.server.errors import ApiError, bad
from deepseek_jax.serving.server.prepare import off_loop
from deepseek_jax.serving.server.wire import json_bytes

_ANSWERS = ("/v1/completions", "/v1/chat/completions")
# What servers read of a client's headers, and what traces need; nothing else goes on, x-prefill least of all.
_HEADERS = ("accept", "authorization", "content-type", "traceparent", "tracestate", "user-agent")


class Wants(NamedTuple):
    """path: with the query. answer: it is asked for an answer of the model, as a stream or whole."""

    method: str
    path: str
    headers: Mapping[bytes, bytes]
    body: bytes
    ask: Ask
    answer: bool
    stream: bool


async def read_wants(http: HttpRequest, most: int) -> Wants:
    """most: bytes of a body. Raises ApiError."""
    raw = await read_body(http, most)
    named, query = http.scope["path"], http.scope.get("query_string", b"").decode("latin-1")
    path = http.scope.get("raw_path", b"").decode("latin-1") or named
    path += f"?{query}" if query else ""
    if not path.startswith("/"):
        raise bad(f"path={shown(path)} must begin with /")
    headers = {n.encode(): http.headers[n].encode("latin-1") for n in _HEADERS if n in http.headers}
    headers[b"x-request-id"] = http.scope["state"]["request_id"].encode()
    if http.method != "POST" or named not in _ANSWERS:
        return Wants(http.method, path, headers, raw, Ask(), False, False)
    try:
        body, sent, ask = await off_loop(len(raw), lambda: _read(raw))
    except ValueError:  # the server says what is wrong
        return Wants("POST", path, headers, raw, Ask(), False, False)
    if len(sent) > most:  # with its seed
        raise ApiError(413, f"the request has more than the {most} bytes that one may have")
    return Wants("POST", path, headers, sent, ask, True, body.get("stream") is True)


def _read(raw: bytes) -> tuple[dict[str, Any], bytes, Ask]:
    """The body, the same with a seed, and what it asks for. Raises ValueError."""
    body = parse_object(raw, "the request's body")
    return body, seeded(body, raw), ask_of(body)


def seeded(body: Mapping[str, Any], raw: bytes) -> bytes:
    """A body with a seed, so that the same answer comes whoever is asked, and however often."""
    if body.get("seed") is not None:
        return raw
    seed = secrets.randbelow(1 << 32)
    if "seed" in body:
        return json_bytes({**body, "seed": seed})
    comma = b"," if body else b""
    return raw.rstrip()[:-1] + comma + f'"seed":{seed}}}'.encode()
