"""Rows of a batch file, as OpenAI's batches have them, answered by the server's own endpoints; nothing goes over a network."""

import asyncio
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from starlette.types import ASGIApp, Message

from deepseek_jax.checks import require, shown
from deepseek_jax.serving.server.service import new_id

URLS = ("/v1/completions", "/v1/chat/completions")


def check_row(row: Mapping[str, Any], where: str) -> None:
    """Raises ValueError for what is no {"custom_id", "method": "POST", "url", "body"}."""
    require(isinstance(row.get("custom_id"), str), f'{where}: "custom_id" must be text')
    require(
        row.get("method", "POST") == "POST",
        f'{where}: "method" is {shown(row.get("method"))} and must be "POST"',
    )
    require(
        row.get("url") in URLS,
        f'{where}: "url" is {shown(row.get("url"))} and must be one of {", ".join(URLS)}',
    )
    require(isinstance(row.get("body"), Mapping), f'{where}: "body" must be an object')
    require(not row["body"].get("stream"), f'{where}: "stream" makes no sense in a file: leave it out')


async def answered(
    app: ASGIApp, rows: Sequence[Mapping[str, Any]], at_once: int
) -> AsyncIterator[tuple[int, dict[str, Any]]]:
    """Yields the number of a row and its answer, as OpenAI's output files have it, as soon as that has come. The model that a
    row names is not looked at. at_once: rows that are asked at the same time."""
    left, room = asyncio.Queue[tuple[int, dict[str, Any]]](), asyncio.Semaphore(at_once)

    async def one(i: int, row: Mapping[str, Any]) -> None:
        async with room:
            status, body = await _call(
                app, row["url"], {k: v for k, v in row["body"].items() if k != "model"}
            )
        id = new_id()
        response = {"status_code": status, "request_id": id, "body": body}
        left.put_nowait(
            (i, {"id": f"batch_req_{id}", "custom_id": row["custom_id"], "response": response, "error": None})
        )

    async with asyncio.TaskGroup() as group:
        for i, row in enumerate(rows):
            group.create_task(one(i, row))
        for _ in rows:
            yield await left.get()


async def _call(app: ASGIApp, path: str, body: Mapping[str, Any]) -> tuple[int, Any]:
    """Status and body of the answer to a POST."""
    scope = {
        "type": "http",
        "http_version": "1.1",
        "method": "POST",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": [(b"content-type", b"application/json")],
        "state": {},
    }
    sent = iter([{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}])
    status, parts = 0, []

    async def receive() -> Message:
        message = next(sent, None)
        if message is None:
            await asyncio.Event().wait()  # nobody leaves
            raise AssertionError
        return message

    async def send(message: Message) -> None:
        nonlocal status
        status = message.get("status", status)
        parts.append(message.get("body", b""))

    await app(scope, receive, send)
    return status, json.loads(b"".join(parts))
