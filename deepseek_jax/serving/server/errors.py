"""Errors as OpenAI's clients read them: `{"error": {"message", "type", "param", "code"}}` and a status."""

import contextlib
import json
import re
from collections.abc import Iterator, Mapping

from starlette.responses import Response

from deepseek_jax.serving.request import QueueFullError
from deepseek_jax.serving.server.wire import Json, json_bytes

# Status -> (type, code).
_KINDS = {
    400: ("invalid_request_error", None),
    401: ("invalid_request_error", "invalid_api_key"),
    404: ("invalid_request_error", "not_found"),
    405: ("invalid_request_error", "method_not_allowed"),
    408: ("invalid_request_error", "timeout"),
    413: ("invalid_request_error", "request_too_large"),
    429: ("rate_limit_error", "queue_full"),
    500: ("server_error", "internal_error"),
    502: ("server_error", "bad_gateway"),
    503: ("server_error", "unavailable"),
    504: ("server_error", "timeout"),
}
_LONGEST = 1000  # characters of a message
_FIELD = re.compile(r"([a-z_]+(?:\.[a-z0-9_]+)*)(?:=| of | has )")


class ApiError(Exception):
    """What a client is told.

    param: the field of the request that is wrong. code: default: of the status. retry_after: seconds after which it may
    try again.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
    ):
        super().__init__(message)
        self.status, self.param, self.retry_after = status, param, retry_after
        self.type, usual = _KINDS[status]
        self.code = usual if code is None else code

    def body(self) -> Json:
        text = " ".join(str(self).split())
        message = text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
        return {"error": {"message": message, "type": self.type, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        headers = {"connection": "close"} if self.status == 413 else {}
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        if self.retry_after is not None:
            headers["retry-after"] = str(max(1, round(self.retry_after)))
            headers["retry-after-ms"] = str(max(1, round(1000 * self.retry_after)))
        return Response(json_bytes(self.body()), self.status, headers, "application/json")


def said(status: int, headers: Mapping[str, str], body: bytes) -> ApiError:
    """What another server answered with an error."""
    try:
        error = json.loads(body)["error"]
        message, param, code = str(error["message"]), error.get("param"), error.get("code")
    except (ValueError, KeyError, TypeError, AttributeError):
        message, param, code = f"the server answered with status {status}", None, None
    try:
        after = float(headers["retry-after-ms"]) / 1000
    except (ValueError, KeyError):
        after = None
    known = status if status in _KINDS else 500 if status >= 500 else 400
    return ApiError(known, message, param, code, after)


def said_in_stream(body: bytes) -> ApiError:
    """The same of an event, which has no status: its code tells."""
    error = said(500, {}, body)
    codes = {code: status for status, (_, code) in _KINDS.items()}
    usual = 503 if str(error.code).startswith("prefill_") else codes.get(error.code, 500)
    return ApiError(usual, str(error), error.param, error.code)


def bad(message: str, param: str | None = None) -> ApiError:
    return ApiError(400, message, param)


def answer_to(error: Exception) -> ApiError:
    """A full queue is answered 429, another ValueError 400 with the field with which the message begins ("top_p=2 must lie
    in (0, 1]"); anything else is ours."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, QueueFullError):
        return ApiError(429, str(error), retry_after=error.retry_after)
    if isinstance(error, ValueError):
        named = _FIELD.match(str(error))
        return bad(str(error), named[1] if named else None)
    return internal(error)


def internal(error: Exception) -> ApiError:
    """For what nobody expected."""
    return ApiError(500, f"internal error: {type(error).__name__}")


@contextlib.contextmanager
def refused(param: str | None = None) -> Iterator[None]:
    """What the block refuses becomes an answer; `param`, the field that is wrong, where the message does not name it."""
    try:
        yield
    except (ValueError, QueueFullError) as error:
        found = answer_to(error)
        found.param = param or found.param
        raise found from error
