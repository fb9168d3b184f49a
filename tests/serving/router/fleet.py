"""A router over HTTP in this process, and servers that do as a test says: real sockets, and no model."""

import asyncio
import collections
import contextlib
import json
import socket
import threading
import time

import httpx
import uvicorn
from starlette.applications import Starlette
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route

from deepseek_jax.serving.router.app import application
from deepseek_jax.serving.router.relay import Rules
from deepseek_jax.serving.router.router import Router, Settings
from deepseek_jax.serving.server.errors import ApiError

TEXT = "the keys and the values share the latent."


class Loop:
    """An event loop in a thread of its own, with servers at free ports."""

    def __init__(self):
        self.loop, self._servers = asyncio.new_event_loop(), []
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()

    def do(self, coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(20)

    def serve(self, app):
        """(server, port)"""
        listener = socket.socket()
        listener.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="off", access_log=False))
        task = asyncio.run_coroutine_threadsafe(server.serve(sockets=[listener]), self.loop)
        until(lambda: server.started)
        self._servers.append((server, task))
        return server, listener.getsockname()[1], task

    def close(self):
        for server, task in self._servers:
            end(server, task, self.loop)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()


def end(server, task, loop):
    """Closes its connections and waits for its end."""
    server.force_exit = server.should_exit = True
    for connection in list(server.server_state.connections):
        loop.call_soon_threadsafe(connection.transport.abort)
    task.result(10)


def until(true, seconds=10):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.002)


class Fake:
    """A server that answers each request by the next of its `plan`: functions of the request's body that return a response.

    asked: (headers, body) of each request. left: clients that left in the middle of a stream.
    """

    def __init__(self, loop, role="decode", **says):
        self.plan, self.asked, self.left = collections.deque(), [], 0
        routes = [Route("/{path:path}", self._answer, methods=["GET", "POST"])]
        self._loop, (self.server, self.port, self._task) = loop, loop.serve(Starlette(routes=routes))
        self.address = f"127.0.0.1:{self.port}"
        self.says = {
            "address": self.address,
            "role": role,
            "model": "tiny",
            "identity": "1",
            "ready": True,
            "alone": True,
        }
        self.says |= {"load": {}, "transfer": f"10.0.0.1:{self.port}" if role == "prefill" else None} | says

    async def _answer(self, http):
        raw = await http.body()
        self.asked.append((dict(http.headers), json.loads(raw) if raw.endswith(b"}") else raw))
        return await self.plan.popleft()(self)

    def kill(self):
        """No connection any more, those that there are end."""
        end(self.server, self._task, self._loop.loop)


def whole(value=None, status=200, **headers):
    async def plan(fake):
        named = {name.replace("_", "-"): text for name, text in headers.items()}
        return JSONResponse({"id": "a"} if value is None else value, status, named)

    return plan


def refuses(error: ApiError):
    async def plan(fake):
        return error.response()

    return plan


def pieces(text, size):
    return [text[i : i + size] for i in range(0, len(text), size)]


def event(text, id="one", finish=None):
    choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": finish}
    return f"data: {json.dumps({'id': id, 'created': 7, 'choices': [choice]})}\n\n"


def stream(text=TEXT, size=4, breaks=None, last="data: [DONE]\n\n", hold=None, id="one"):
    """breaks: after so many events the connection does. hold: an event of threading before the second event."""

    async def plan(fake):
        async def events():
            try:
                for i, part in enumerate(pieces(text, size)):
                    if i == breaks:
                        raise ConnectionAbortedError("as planned")
                    if i == 1 and hold is not None:
                        while not hold.is_set():
                            await asyncio.sleep(0.005)
                    yield event(part, id)
                if last.startswith("data: ["):
                    yield event("", id, "stop")
                yield last
            except asyncio.CancelledError:
                fake.left += 1
                raise

        return StreamingResponse(events(), media_type="text/event-stream")

    return plan


class Routed:
    """A router with fakes that are heard: `decode`, `prefill`."""

    def __init__(self, decode=2, prefill=0, rules=Rules(3, 0.3, 10.0), **settings):  # noqa: B008
        self.loop = Loop()
        self.router = Router(Settings(rules=rules, **settings))
        _, self.port, _ = self.loop.serve(application(self.router))
        self.loop.loop.call_soon_threadsafe(self.router.begin)
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=20, trust_env=False)
        self.decode = [Fake(self.loop) for _ in range(decode)]
        self.prefill = [Fake(self.loop, "prefill") for _ in range(prefill)]
        for fake in (*self.decode, *self.prefill):
            assert self.hear(fake).status_code == 200
        self.decode.sort(key=lambda fake: fake.address)  # the order in which equals are asked
        self.prefill.sort(key=lambda fake: fake.address)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.client.close()
        self.loop.do(self.router.drained(0))
        self.loop.close()

    def hear(self, fake, key=None, **says):
        headers = {} if key is None else {"authorization": f"Bearer {key}"}
        return self.client.post("/members", json=fake.says | says, headers=headers)

    def complete(self, prompt="x", **body):
        headers = body.pop("headers", {})
        return self.client.post("/v1/completions", json={"prompt": prompt, **body}, headers=headers)

    def streamed(self, **body):
        """(text, events, whether it ended with [DONE])"""
        return read(self.complete(stream=True, **body))

    @contextlib.contextmanager
    def streaming(self, **body):
        with self.client.stream(
            "POST", "/v1/completions", json={"prompt": "x", "stream": True, **body}
        ) as response:
            yield response.iter_lines()

    def metric(self, name):
        lines = self.client.get("/metrics").text.splitlines()
        return sum(
            float(line.split()[-1]) for line in lines if line.startswith(f"deepseek_jax:router_{name}{{")
        )


def read(response):
    assert response.status_code == 200, response.text
    found = [line[6:] for line in response.text.splitlines() if line.startswith("data: ")]
    events = [json.loads(data) for data in found if data != "[DONE]"]
    text = "".join(e["choices"][0]["text"] for e in events if "choices" in e)
    return text, events, found[-1] == "[DONE]" and found.count("[DONE]") == 1
