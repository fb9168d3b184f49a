"""A server in this process over a real engine with a tiny model, and what the tests read of its answers."""

import contextlib
import dataclasses
import functools
import json
import queue
import re
import tempfile
import threading
import time
from pathlib import Path

import httpx
import uvicorn

import deepseek_jax
from deepseek_jax import hf
from deepseek_jax.serving.build import build
from deepseek_jax.serving.engine import Engine
from deepseek_jax.serving.options import Options
from deepseek_jax.serving.server.app import application
from deepseek_jax.serving.server.service import Served, Service, Settings, served
from deepseek_jax.serving.thread import EngineThread
from tests.oracle.tiny import V3, weights
from tests.serving.running import tokenizer
from tests.serving.scripted import ScriptedEngine

CFG = dataclasses.replace(
    V3, vocab_size=448, num_hidden_layers=2, max_position_embeddings=256, num_nextn_predict_layers=0
)
OPTIONS = Options(rows=2, chunk=64, pages=24, waiting=64)
TOKENIZER = tokenizer()


@functools.cache
def folder() -> tempfile.TemporaryDirectory:
    """The model's, in Hugging Face's format."""
    made = tempfile.TemporaryDirectory()
    hf.save(Path(made.name) / "small", CFG, *weights(CFG, seed=3), format="f32", tokenizer=TOKENIZER)
    return made


@functools.cache
def _device():
    return build(deepseek_jax.load(Path(folder().name) / "small"), OPTIONS).device


def real() -> Served:
    """An engine of its own; the programs are compiled once."""
    return served(EngineThread(Engine(_device(), OPTIONS)), TOKENIZER)


def scripted(rows: int = 2) -> Served:
    return Served(ScriptedEngine(), TOKENIZER, CFG.vocab_size, CFG.max_position_embeddings, rows)


class Serving:
    """HTTP over a socket. client: of httpx, for this server."""

    def __init__(self, what: Served | None, for_clients: bool = True, **settings):
        self.service = Service(Settings(name="tiny", **settings))
        self.what = what
        if what is not None:
            self.service.begin(what)
        config = uvicorn.Config(
            application(self.service, for_clients), port=0, log_config=None, lifespan="off", access_log=False
        )
        self.server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self.server.run, daemon=True)

    def __enter__(self):
        self._thread.start()
        until(lambda: self.server.started)
        self.port = self.server.servers[0].sockets[0].getsockname()[1]
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=60)
        return self

    def __exit__(self, *_):
        self.client.close()
        self.server.should_exit = True
        self._thread.join()

    def post(self, path: str, body: dict, **options) -> httpx.Response:
        return self.client.post(path, json=body, **options)

    def ask(self, path: str, body: dict) -> dict:
        """The answer, which must be one."""
        response = self.post(path, body)
        assert response.status_code == 200, response.text
        return response.json()

    def complete(self, prompt, **body) -> dict:
        return self.ask("/v1/completions", {"prompt": prompt, "temperature": 0, **body})

    def chat(self, text: str, **body) -> dict:
        messages = [{"role": "user", "content": text}]
        return self.ask("/v1/chat/completions", {"messages": messages, "temperature": 0, **body})

    def events(self, path: str, body: dict) -> list:
        """The objects of a stream; the last is "[DONE]"."""
        response = self.post(path, {**body, "stream": True})
        assert response.headers["content-type"].startswith("text/event-stream"), response.text
        return parsed(response.text)

    def metrics(self) -> dict[str, float]:
        """Sums over labels."""
        found: dict[str, float] = {}
        for name, value in re.findall(r"^([\w:]+)\{.*\} (\S+)$", self.client.get("/metrics").text, re.M):
            found[name] = found.get(name, 0) + float(value)
        return found

    @property
    def engine(self):
        return self.what.engine


@contextlib.contextmanager
def closing(what: Served):
    yield what
    what.engine.close()


def parsed(text: str) -> list:
    blocks = [block for block in text.split("\n\n") if block and not block.startswith(":")]
    assert all(block.startswith("data: ") and "\n" not in block for block in blocks), text
    found = [block.removeprefix("data: ") for block in blocks]
    return [entry if entry == "[DONE]" else json.loads(entry) for entry in found]


def until(condition, seconds: float = 20.0):
    """Waits for something; returns what the condition gave."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.005)
    return found


def directly(engine: EngineThread, request) -> tuple[list, list]:
    """(tokens, prompt) of a request that goes to the engine itself."""
    updates: queue.SimpleQueue = queue.SimpleQueue()
    engine.submit(request, updates.put)
    tokens, prompt = [], None
    while True:
        update = updates.get(timeout=60)
        tokens += update.tokens
        prompt = update.prompt or prompt
        if update.finish_reason:
            return tokens, prompt
