"""What a server says to routers, and what it lets them ask."""

import threading
import time

import pytest

from deepseek_jax.serving.pages import PagePool
from deepseek_jax.serving.request import Request
from deepseek_jax.serving.router.members import read_member
from deepseek_jax.serving.scheduler import Scheduler
from deepseek_jax.serving.server.body import signature
from deepseek_jax.serving.server.member import Herald, Saying
from deepseek_jax.serving.steps import Limits
from tests.serving.router.fleet import Routed
from tests.serving.server.kit import Serving, scripted, until


def scheduled():
    """A prompt of 100 tokens, with two pages, of which 64 are computed; and one of 70 that waits."""
    scheduler = Scheduler(Limits(1, 64, 64, 128, 8), PagePool(20))
    scheduler.add(Request("a", list(range(100)), 4))
    scheduler.add(Request("b", list(range(70)), 4))
    scheduler.schedule()
    return scheduler


def test_a_server_says_what_it_has_to_do():
    what = scripted(rows=7)
    what.engine.engine.schedulers = [scheduled()]
    with Serving(None) as serving:
        assert serving.client.get("/member").status_code == 404
        serving.service.says = Saying(serving.service, ":8001", "decode", True, lambda: None)
        assert read_member(serving.client.get("/member").json(), "10.0.0.1").ready is False
        serving.service.begin(what)
        said = read_member(serving.client.get("/member").json(), "10.0.0.1")
        assert said.address == "10.0.0.1:8001" and said.ready and said.model == "tiny"
        assert said.load._asdict() == {
            "requests": 2,
            "queued": 36 + 70,
            "held": 128,
            "tokens": 20 * 64,
            "rows": 7,
        }
        serving.service.drain()
        assert read_member(serving.client.get("/member").json(), "h").ready is False


def test_a_server_tells_a_router_that_it_is_there_and_that_it_stops():
    with Routed(decode=0) as routed, Serving(scripted()) as serving:
        service, choice = serving.service, routed.router.members.choice
        service.says = Saying(service, f":{serving.port}", "both", True, lambda: None)
        herald = Herald(f"http://127.0.0.1:{routed.port}/", service.says, None, seconds=0.05)
        address = f"127.0.0.1:{serving.port}"
        until(lambda: address in choice.servers and choice.servers[address].alive)
        assert routed.client.get("/v1/models").json()["data"][0]["id"] == "tiny"
        service.drain()
        herald.close()
        assert not choice.servers[address].alive


def test_a_router_that_is_not_there_is_told_again(caplog):
    with pytest.raises(ValueError, match="router='localhost:8000' must be its URL"):
        Herald("localhost:8000", dict, None)
    herald = Herald("http://127.0.0.1:9", dict, None, seconds=0.01)
    time.sleep(0.1)
    herald.close()
    assert [r.levelname for r in caplog.records if "router" in r.getMessage()] == ["WARNING"]  # once


def test_only_a_router_names_prefill_servers():
    what = scripted()
    with Serving(what, fleet_key="fleet") as serving:
        headers = {"x-prefill": "10.0.0.1:9000"}
        assert serving.post("/v1/completions", {"prompt": "x"}, headers=headers).status_code == 401
        headers["x-prefill-signature"] = signature("fleet", "10.0.0.2:9000")
        assert (
            serving.post(
                "/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}, headers=headers
            ).status_code
            == 401
        )
        headers["x-prefill-signature"] = signature("fleet", "10.0.0.1:9000")
        named = asked(serving, what, headers)
        assert named == "10.0.0.1:9000"
    with Serving(what := scripted()) as serving:
        assert asked(serving, what, {"x-prefill": "[::1]:9000"}) == "[::1]:9000"
        assert asked(serving, what, {}) is None
        answer = serving.post("/v1/completions", {"prompt": "x"}, headers={"x-prefill": "http://h:1/"})
        assert answer.status_code == 400 and "must be host:port" in answer.json()["error"]["message"]


def asked(serving, what, headers):
    """The prefill server of the request that the engine gets."""
    thread = threading.Thread(
        target=serving.post, args=("/v1/completions", {"prompt": "x"}), kwargs={"headers": headers}
    )
    thread.start()
    (request,) = until(lambda: list(what.engine.requests.values()))
    what.engine.say(request.id, [5], finish_reason="length")
    thread.join()
    return request.prefill


def test_a_prefill_server_answers_no_clients():
    with Serving(scripted(), for_clients=False) as serving:
        assert serving.post("/v1/completions", {"prompt": "x"}).status_code == 404
        assert {serving.client.get(path).status_code for path in ("/health", "/readyz", "/metrics")} == {200}
