"""The life of a server process: it answers while it gets ready, and a signal ends it when its answers are complete."""

import os
import signal
import threading

import httpx
import pytest

from deepseek_jax.serving.server.app import application
from deepseek_jax.serving.server.running import listening, run
from deepseek_jax.serving.server.service import Service, Settings
from tests.serving.server.kit import TOKENIZER, parsed, scripted, until


class Life:
    """Runs a server in this thread, as signals have it, and what `during(client)` does in another.

    told: what happened, in order.
    """

    def __init__(self, during, grace=20.0, load=None):
        self.what, self.told = scripted(), []
        self.service = Service(Settings("tiny"))
        listener = listening("127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        thread = threading.Thread(target=self._other, args=(during,))
        thread.start()
        try:
            run(
                application(self.service),
                self.service,
                listener,
                load or (lambda: self.what),
                grace=grace,
                on_ready=lambda: self.told.append("ready"),
                at_once=lambda number: self.told.append(number),
            )
        finally:
            thread.join()

    def _other(self, during):
        with httpx.Client(base_url=self.url, timeout=20) as client:
            during(self, client)

    def signal(self, number=signal.SIGTERM):
        os.kill(os.getpid(), number)

    def ready(self, client):
        until(lambda: client.get("/readyz").status_code == 200)


def asking(life, stream, found):
    """Asks in a thread of its own, and waits until the engine has it."""
    body = {"prompt": "x", "stream": stream}
    thread = threading.Thread(
        target=lambda: found.append(httpx.post(f"{life.url}/v1/completions", json=body, timeout=20))
    )
    before = len(life.what.engine.requests)
    thread.start()
    until(lambda: len(life.what.engine.requests) == before + 1)
    return thread


def test_a_signal_loses_no_request_that_was_taken():
    found = []

    def during(life, client):
        life.ready(client)
        threads = [asking(life, stream, found) for stream in (False, True)]
        life.signal()
        until(lambda: client.get("/readyz").status_code == 503)
        assert client.get("/livez").status_code == 200
        refused = client.post("/v1/completions", json={"prompt": "x"})
        assert refused.status_code == 503 and "retry-after" in refused.headers
        for id in list(life.what.engine.requests):
            life.what.engine.say(id, TOKENIZER.encode("the keys"), finish_reason="length")
        for thread in threads:
            thread.join()

    life = Life(during)
    assert life.told == ["ready"] and life.what.engine.closed
    texts = sorted(
        response.json()["choices"][0]["text"]
        if response.headers["content-type"] == "application/json"
        else "".join(event["choices"][0]["text"] for event in parsed(response.text)[:-1])
        for response in found
    )
    assert texts == ["the keys", "the keys"]


def test_requests_that_take_too_long_end_with_an_error():
    found = []

    def during(life, client):
        life.ready(client)
        threads = [asking(life, stream, found) for stream in (False, True)]
        for id in list(life.what.engine.requests):
            life.what.engine.say(id, TOKENIZER.encode("the"))
        until(lambda: all(s.first for g in life.service.running for s in g.samples))
        life.signal(signal.SIGINT)
        for thread in threads:
            thread.join()

    life = Life(during, grace=0.2)
    whole, streamed = sorted(found, key=lambda response: -response.status_code)
    assert whole.status_code == 503 and "before the answer was complete" in whole.json()["error"]["message"]
    assert streamed.status_code == 200 and parsed(streamed.text)[-1]["error"]["code"] == "unavailable"
    assert not life.what.engine.requests


def test_a_second_signal_ends_it_at_once():
    def during(life, client):
        life.ready(client)
        found = []
        thread = asking(life, False, found)
        life.signal()
        until(lambda: life.service.state == "draining")
        life.signal()
        until(lambda: len(life.told) == 2)
        (id,) = life.what.engine.requests
        life.what.engine.say(id, finish_reason="length")
        thread.join()

    assert Life(during).told == ["ready", signal.SIGTERM]


def test_it_answers_while_it_loads_and_ends_when_that_fails():
    go = threading.Event()

    def load():
        assert go.wait(20)
        raise ValueError("config.json is missing")

    def during(life, client):
        until(lambda: client.get("/livez").status_code == 200)
        assert client.get("/readyz").status_code == 503
        assert client.post("/v1/completions", json={"prompt": "x"}).status_code == 503
        go.set()

    with pytest.raises(ValueError, match=r"config.json is missing"):
        Life(during, load=load)


def test_a_signal_while_it_loads_ends_it():
    go = threading.Event()

    def during(life, client):
        until(lambda: client.get("/livez").status_code == 200)
        life.signal()

    life = Life(during, load=lambda: go.wait(20))
    go.set()
    assert life.told == []


def test_an_address_that_cannot_be_had():
    with listening("127.0.0.1", 0) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"cannot listen at 127.0.0.1:{port}: .*in use"):
            listening("127.0.0.1", port)
    with pytest.raises(ValueError, match=r"cannot listen at nowhere.invalid:80"):
        listening("nowhere.invalid", 80)
