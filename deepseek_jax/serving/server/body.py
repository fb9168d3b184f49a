"""Reading a request: whose service it is for, and its body."""

import asyncio
import contextlib
import hmac
import re
from collections.abc import AsyncIterator
from typing import Any, cast

from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest

from deepseek_jax.checks import shown
from deepseek_jax.json_files import parse_object
from deepseek_jax.serving.server import leftover
from deepseek_jax.serving.server.errors import ApiError, bad
from deepseek_jax.serving.server.fields import Fields
from deepseek_jax.serving.server.prepare import off_loop
from deepseek_jax.serving.server.service import Service

_SECONDS = 60.0  # in which a body has to come


PREFILL = "x-prefill"  # header with the address of the server that is to compute the prompt, "host:port"
SIGNATURE = (
    "x-prefill-signature"  # of the router that chose it: what comes from there is kept for other prompts
)
_ADDRESS = re.compile(r"[^\s/@?#]{1,255}:[0-9]{1,5}")


def signature(key: str, address: str) -> str:
    return hmac.digest(key.encode(), address.encode(), "sha256").hex()


def prefill_of(http: HttpRequest) -> str | None:
    """The prefill server that a router has chosen. Raises ApiError for what is no address, 401 for what none has signed."""
    address, key = http.headers.get(PREFILL), service_of(http).settings.fleet_key
    if address is None:
        return None
    if not _ADDRESS.fullmatch(address):
        raise bad(f"the header {PREFILL}={shown(address)} must be host:port")
    given = http.headers.get(SIGNATURE, "").encode()
    if key is not None and not hmac.compare_digest(given, signature(key, address).encode()):
        raise ApiError(
            401, f"the header {PREFILL} is a router's: give it the same --fleet_key as this server"
        )
    return address


def service_of(http: HttpRequest) -> Service:
    return cast(Service, http.app.state.service)


@contextlib.asynccontextmanager
async def read_fields(http: HttpRequest) -> AsyncIterator[Fields]:
    """The object that a request holds; after the block, which reads its fields, what is left over of it is looked at.
    Raises ApiError as `read_object` and `leftover.ignored`."""
    fields = Fields(await read_object(http))
    yield fields
    http.state.ignored = leftover.ignored(fields)


async def read_object(http: HttpRequest) -> dict[str, Any]:
    """The JSON object that a request holds. Raises ApiError: 400 for something else, and as `read_body`."""
    raw = await read_body(http, service_of(http).settings.max_body)
    try:
        return await off_loop(len(raw), lambda: parse_object(raw, "the request's body"))
    except ValueError as error:
        raise bad(str(error)) from error


async def read_body(http: HttpRequest, most: int) -> bytes:
    """Raises ApiError: 400 if the client leaves, 408 if it takes too long, 413 for more than `most` bytes."""
    try:
        async with asyncio.timeout(_SECONDS):
            return await _read(http, most)
    except TimeoutError:
        raise ApiError(408, f"the request did not come within {_SECONDS:g} s") from None
    except ClientDisconnect:
        raise bad("the request ended before its body") from None


async def _read(http: HttpRequest, most: int) -> bytes:
    said = http.headers.get("content-length", "0")
    size = int(said) if said.isascii() and said.isdigit() and len(said) < 20 else 0
    parts = []
    if size <= most:
        size = 0
        async for part in http.stream():
            parts.append(part)
            size += len(part)
            if size > most:
                break
    if size > most:
        raise ApiError(413, f"the request has more than the {most} bytes that one may have")
    return b"".join(parts)
