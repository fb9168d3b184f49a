"""What every request passes: an id, the API key, answers for errors, and one line in the log."""

import hmac
import logging
import re
import time
from typing import Any, Protocol

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deepseek_jax.serving.server import leftover
from deepseek_jax.serving.server.errors import ApiError, internal
from deepseek_jax.serving.server.service import new_id

LOGGER = logging.getLogger("deepseek_jax.serving")
_ID = re.compile(r"[\x21-\x7e]{1,128}")
# Anybody may ask for these, and often: the page, health, metrics, what routers ask. /members has a key of its own.
_OPEN = frozenset(("/", "/health", "/livez", "/readyz", "/metrics", "/version", "/member", "/members"))


class Settings(Protocol):
    @property
    def api_key(self) -> str | None: ...


class Counted(Protocol):
    """What stands behind a gate (`service.py: Service`). requests: that are being answered."""

    requests: int

    @property
    def settings(self) -> Settings: ...


class Gate:
    """An ASGI application around another. A log record has the fields of its line in `record.fields`."""

    def __init__(self, app: ASGIApp, service: Counted):
        self._app, self._service = app, service
        key = service.settings.api_key
        self._key = None if key is None else b"Bearer " + key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        call = _Call(scope, send, _request_id(headers))
        scope.setdefault("state", {})["request_id"] = call.id
        counted = scope["path"] not in _OPEN
        self._service.requests += counted
        try:
            self._check(scope["path"], headers.get(b"authorization", b""))
            await self._app(scope, receive, call.send)
        except ApiError as error:
            await call.answer(error, scope, receive)
        except Exception as error:
            LOGGER.exception("a request failed", extra={"fields": call.fields()})
            await call.answer(internal(error), scope, receive)
        finally:
            self._service.requests -= counted
            LOGGER.log(call.level, "request", extra={"fields": call.fields()})

    def _check(self, path: str, given: bytes) -> None:
        if self._key is None or path in _OPEN or hmac.compare_digest(given, self._key):
            return
        raise ApiError(401, "the API key is missing or wrong: send Authorization: Bearer KEY")


def _request_id(headers: dict[bytes, bytes]) -> str:
    """The client's X-Request-Id if it can stand in a header and a log, else a new one."""
    given = headers.get(b"x-request-id", b"").decode("latin-1")
    return given if _ID.fullmatch(given) else new_id()


class _Call:
    """One request on its way."""

    def __init__(self, scope: Scope, send: Send, id: str):
        self._scope, self._send, self.id = scope, send, id
        self._began = time.monotonic()
        self.status = 0

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            own = [(b"x-request-id", self.id.encode())]
            if self._ignored:
                own.append((leftover.HEADER.encode(), leftover.in_header(self._ignored).encode()))
            message["headers"] = [*message.get("headers", ()), *own]
        await self._send(message)

    async def answer(self, error: ApiError, scope: Scope, receive: Receive) -> None:
        if not self.status:
            await error.response()(scope, receive, self.send)

    @property
    def _ignored(self) -> tuple[str, ...]:
        """Fields of its body."""
        return self._scope.get("state", {}).get("ignored", ())  # type: ignore[no-any-return]

    @property
    def level(self) -> int:
        quiet = self._scope["path"] in _OPEN
        return logging.DEBUG if quiet else logging.WARNING if self.status >= 500 else logging.INFO

    def fields(self) -> dict[str, Any]:
        own = {
            "request_id": self.id,
            "method": self._scope["method"],
            "path": self._scope["path"],
            "status": self.status,
            "ms": round(1000 * (time.monotonic() - self._began), 1),
        }
        if self._ignored:
            own["ignored_fields"] = leftover.in_header(self._ignored)
        return own | self._scope.get("state", {}).get("figures", {})
