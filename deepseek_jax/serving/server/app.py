"""The endpoints, as one ASGI application."""

import functools
import importlib.metadata
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import HTMLResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from deepseek_jax.serving.server.body import service_of
from deepseek_jax.serving.server.chat import chat_completions
from deepseek_jax.serving.server.completions import completions
from deepseek_jax.serving.server.errors import ApiError, internal
from deepseek_jax.serving.server.gate import Gate
from deepseek_jax.serving.server.service import Service
from deepseek_jax.serving.server.tokenizing import detokenize, tokenize, tokenizer_info
from deepseek_jax.serving.server.wire import Json, answer

_PAGE = Path(__file__).with_name("page.html")
_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; img-src data:"


async def _error(http: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()


async def _unexpected(http: HttpRequest, error: Exception) -> Response:
    """It is raised again after this, and logged (gate.py)."""
    return internal(error).response()


async def _no_endpoint(http: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    what = f"{http.method} {http.url.path}"
    words = {404: f"there is no {what}", 405: f"{what}: another method is needed here"}
    response = ApiError(error.status_code, words.get(error.status_code, str(error.detail))).response()
    response.headers.update(error.headers or {})
    return response


# --- what is served --------------------------------------------------------------------------------------------------


def _card(service: Service) -> Json:
    return {
        "id": service.settings.name,
        "object": "model",
        "created": service.created,
        "owned_by": "deepseek_jax",
        "max_model_len": service.served.max_model_len,
    }


async def _models(http: HttpRequest) -> Response:
    return answer({"object": "list", "data": [_card(service_of(http))]})


async def _model(http: HttpRequest) -> Response:
    service = service_of(http)
    service.check_model(http.path_params["name"])
    return answer(_card(service))


# --- how it is -------------------------------------------------------------------------------------------------------


def _status(good: bool, what: str) -> Response:
    return PlainTextResponse(what + "\n", 200 if good else 503)


async def _health(http: HttpRequest) -> Response:
    alive = service_of(http).alive
    return _status(alive, "alive" if alive else "the engine has failed")


async def _ready(http: HttpRequest) -> Response:
    service = service_of(http)
    return _status(service.ready, service.state if service.alive else "the engine has failed")


async def _metrics(http: HttpRequest) -> Response:
    return Response(
        service_of(http).instruments.text(), media_type="text/plain; version=0.0.4; charset=utf-8"
    )


@functools.cache
def _version_of() -> Any:
    try:
        return importlib.metadata.version("deepseek-jax")
    except importlib.metadata.PackageNotFoundError:  # run from its folder
        return "unknown"


async def _version(http: HttpRequest) -> Response:
    return answer({"version": _version_of()})


async def _page(http: HttpRequest) -> Response:
    return HTMLResponse(_PAGE.read_bytes(), headers={"content-security-policy": _POLICY})


async def _member(http: HttpRequest) -> Response:
    """What routers ask."""
    says = service_of(http).says
    if says is None:
        raise ApiError(404, "this server has no router")
    return answer(says())


# --- all of it -------------------------------------------------------------------------------------------------------

_FOR_CLIENTS = (
    Route("/v1/completions", completions, methods=["POST"]),
    Route("/v1/chat/completions", chat_completions, methods=["POST"]),
    Route("/v1/models", _models),
    Route("/v1/models/{name:path}", _model),
    Route("/tokenize", tokenize, methods=["POST"]),
    Route("/detokenize", detokenize, methods=["POST"]),
    Route("/tokenizer_info", tokenizer_info),
    Route("/", _page),
)
_OF_ITSELF = (
    Route("/health", _health),
    Route("/livez", _health),
    Route("/readyz", _ready),
    Route("/metrics", _metrics),
    Route("/version", _version),
    Route("/member", _member),
)


def application(service: Service, for_clients: bool = True) -> ASGIApp:
    """The server's endpoints, over a service that may become ready later. for_clients: it answers them, and does not only say
    how it is."""
    app = Starlette(
        routes=[*(_FOR_CLIENTS if for_clients else ()), *_OF_ITSELF],
        exception_handlers={  # type: ignore[arg-type]
            ApiError: _error,
            HTTPException: _no_endpoint,
            Exception: _unexpected,
        },
    )
    app.state.service = service
    return Gate(app, service)
