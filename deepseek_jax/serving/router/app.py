"""The router as an ASGI application: its own endpoints, and all others, which go on to servers."""

import asyncio
import hmac
import ipaddress
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request as HttpRequest
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deepseek_jax.json_files import parse_object
from deepseek_jax.serving.router.client import Client, left
from deepseek_jax.serving.router.members import read_member
from deepseek_jax.serving.router.router import Router
from deepseek_jax.serving.router.wants import read_wants
from deepseek_jax.serving.server.answer import CLIENT_LEFT
from deepseek_jax.serving.server.body import read_body
from deepseek_jax.serving.server.errors import ApiError, refused
from deepseek_jax.serving.server.gate import Gate
from deepseek_jax.serving.server.wire import answer

_SAYS = 1 << 16  # bytes that a server says of itself


def application(router: Router) -> ASGIApp:
    own = Starlette(
        routes=[
            Route("/members", _said, methods=["POST"]),
            Route("/members", _listed, methods=["GET"]),
            Route("/health", _health),
            Route("/livez", _health),
            Route("/readyz", _ready),
            Route("/metrics", _metrics),
        ],
        exception_handlers={ApiError: _error},  # type: ignore[dict-item]
    )
    own.state.router = router
    return Gate(_Paths(own, router), router)


class _Paths:
    """Who answers a path."""

    def __init__(self, own: Starlette, router: Router):
        self._own, self._router = own, router
        self._paths = {route.path for route in own.routes if isinstance(route, Route)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in self._paths:
            await self._own(scope, receive, send)
            return
        status = 0

        async def counted(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            await self._pass(scope, receive, counted)
        except ApiError as error:
            status = error.status
            raise
        finally:
            self._router.ended(status or CLIENT_LEFT)

    async def _pass(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends a request on; its client, if it leaves, ends it everywhere."""
        self._router.check_open()
        wants = await read_wants(HttpRequest(scope, receive), self._router.settings.max_body)
        figures: dict[str, Any] = scope["state"].setdefault("figures", {})
        work = asyncio.ensure_future(self._router.answer(wants, Client(send), figures))
        gone = asyncio.ensure_future(left(receive))
        try:
            await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                figures["status"] = CLIENT_LEFT
        finally:
            for task in (work, gone):
                task.cancel()
            ended, _ = await asyncio.gather(work, gone, return_exceptions=True)
        if isinstance(ended, Exception):
            raise ended


def _router_of(http: HttpRequest) -> Router:
    router: Router = http.app.state.router
    return router


# --- servers ---------------------------------------------------------------------------------------------------------


async def _said(http: HttpRequest) -> Response:
    """A server says that it is there."""
    router, host = _router_of(http), http.client.host if http.client else ""
    _check_key(http, router.settings.fleet_key, host)
    raw = await read_body(http, _SAYS)
    with refused():
        member = read_member(parse_object(raw, "what the server says"), f"[{host}]" if ":" in host else host)
        router.members.heard(member)
    return answer({"silence": router.settings.silence})


def _check_key(http: HttpRequest, key: str | None, host: str) -> None:
    """Who says that it is a server gets the prompts of others. Raises ApiError."""
    given = http.headers.get("authorization", "").encode()
    if key is None and not (_is_here(host) and "x-forwarded-for" not in http.headers):
        raise ApiError(
            401, "a router without --fleet_key takes servers of its own machine only: give both a key"
        )
    if key is not None and not hmac.compare_digest(given, b"Bearer " + key.encode()):
        raise ApiError(
            401, "the servers' key is missing or wrong: give router and servers the same --fleet_key"
        )


def _is_here(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


async def _listed(http: HttpRequest) -> Response:
    router = _router_of(http)
    _check_key(http, router.settings.fleet_key, http.client.host if http.client else "")
    return answer({"members": router.members.listed()})


# --- how it is -------------------------------------------------------------------------------------------------------


async def _error(http: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()


async def _health(http: HttpRequest) -> Response:
    return PlainTextResponse("alive\n")


async def _ready(http: HttpRequest) -> Response:
    router = _router_of(http)
    said = router.state if router.state != "ready" or router.ready else "no server takes requests"
    return PlainTextResponse(said + "\n", 200 if router.ready else 503)


async def _metrics(http: HttpRequest) -> Response:
    return Response(_router_of(http).text(), media_type="text/plain; version=0.0.4; charset=utf-8")
