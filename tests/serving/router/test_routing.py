"""The router over HTTP: what goes on to servers, and what a client gets when they are lost."""

import asyncio
import contextlib
import threading
import time

import pytest
from starlette.responses import Response

from deepseek_jax.serving.router.client import Client
from deepseek_jax.serving.router.relay import Rules
from deepseek_jax.serving.server.body import signature
from deepseek_jax.serving.server.errors import ApiError
from tests.serving.router.fleet import TEXT, Fake, Routed, event, refuses, stream, until, whole


@pytest.fixture(scope="module")
def one():
    """A router that tests share which lose nobody."""
    with Routed(decode=1, prefill=1, api_key="key") as routed:
        yield routed


KEY = {"authorization": "Bearer key"}


def test_a_request_goes_on_with_its_pair(one):
    (decode,), (prefill,) = one.decode, one.prefill
    decode.plan.append(whole({"id": "a", "n": 1.5}, x_ignored_fields="usr", x_secret="s"))
    headers = KEY | {"x-prefill": "evil:1", "x-request-id": "mine", "cookie": "c", "connection": "close"}
    answer = one.complete(headers=headers, temperature=0.25)
    assert (answer.status_code, answer.json()) == (200, {"id": "a", "n": 1.5})
    assert answer.headers["x-request-id"] == "mine" and answer.headers["x-ignored-fields"] == "usr"
    headers, body = decode.asked[-1]
    assert headers["x-prefill"] == prefill.says["transfer"] and headers["authorization"] == "Bearer key"
    assert headers["x-request-id"] == "mine" and "cookie" not in headers
    assert isinstance(body.pop("seed"), int) and body == {"prompt": "x", "temperature": 0.25}


@pytest.mark.parametrize("given", [7, 0, None])
def test_a_seed_that_is_given_stays(one, given):
    one.decode[0].plan.append(whole())
    one.complete(seed=given, headers=KEY)
    seed = one.decode[0].asked[-1][1]["seed"]
    assert seed == given if given is not None else isinstance(seed, int)


def test_other_paths_go_on_as_they_are(one):
    one.decode[0].plan += [whole({"data": []}), whole({"tokens": [1]}, 418)]
    assert one.client.get("/v1/models?x=a%2Fb", headers=KEY).json() == {"data": []}
    assert one.client.post("/tokenize", content=b'{"prompt": 1', headers=KEY).status_code == 418
    (headers, _), (_, raw) = one.decode[0].asked[-2:]
    assert "x-prefill" not in headers and raw == b'{"prompt": 1'


def test_errors_of_the_request_come_back_as_they_are(one):
    one.decode[0].plan.append(refuses(ApiError(400, "top_p=2 is wrong", "top_p")))
    answer = one.complete(headers=KEY)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "top_p"
    one.decode[0].plan.append(refuses(ApiError(500, "the engine ended the request: bug")))
    assert one.complete(headers=KEY).status_code == 500
    assert one.metric("retries_total") == 0 == one.metric("lost_total")


def test_keys(one):
    assert one.complete().status_code == 401
    assert one.client.get("/readyz").status_code == 200 and one.client.get("/health").status_code == 200
    assert one.hear(one.decode[0]).status_code == 200  # of this machine
    elsewhere = one.client.post("/members", json=one.decode[0].says, headers={"x-forwarded-for": "1.2.3.4"})
    assert elsewhere.status_code == 401 and "--fleet_key" in elsewhere.json()["error"]["message"]


@pytest.mark.parametrize(
    ("says", "wrong"),
    [
        ({"model": "other"}, "a router serves one model"),
        ({"role": "decoder"}, "did you mean 'decode'"),
        ({"address": "host"}, "must be host:port"),
        ({"address": "u@host:80/x:1"}, "must be host:port"),
        ({"load": {"rows": -1}}, "load.rows=-1 must be an integer >= 0"),
        ({"role": "prefill", "transfer": None}, "transfer=None must be the address"),
    ],
)
def test_servers_that_say_nonsense(one, says, wrong):
    says = {**one.decode[0].says, "address": ":1", **says}
    answer = one.client.post("/members", json=says)
    assert answer.status_code == 400 and wrong in answer.json()["error"]["message"]


def test_a_body_that_is_too_large():
    with Routed(decode=1, max_body=100) as routed:
        routed.decode[0].plan.append(whole())
        assert routed.complete("x" * 120).status_code == 413
        assert routed.complete("x" * 75).status_code == 413  # with its seed
        assert routed.complete("x" * 30).status_code == 200


def test_a_stream_passes():
    with Routed(decode=1) as routed:
        routed.decode[0].plan.append(stream())
        text, events, done = routed.streamed()
        assert text == TEXT and done and {e["id"] for e in events} == {"one"}


@pytest.mark.parametrize("breaks", [0, 1, 5])
def test_a_stream_whose_server_is_lost_goes_on_from_another(breaks):
    with Routed() as routed:
        first, second = routed.decode
        first.plan.append(stream(size=4, breaks=breaks))
        second.plan += [stream(size=7, id="two"), stream()]
        text, events, done = routed.streamed()
        assert text == TEXT and done
        assert [e["choices"][0]["finish_reason"] for e in events].count("stop") == 1
        assert {e["id"] for e in events} == {"one"} if breaks else {"two"}
        seeds = [fake.asked[0][1]["seed"] for fake in (first, second)]
        assert seeds[0] == seeds[1]
        assert routed.metric("retries_total") == 1 == routed.metric("lost_total")
        assert routed.streamed()[0] == TEXT and len(first.asked) == 1  # nothing goes there
        routed.hear(first)
        first.plan.append(stream())
        assert routed.streamed()[0] == TEXT and len(first.asked) == 2  # it has answered again


def test_an_answer_that_differs_ends_with_one_error():
    with Routed() as routed:
        routed.decode[0].plan.append(stream(breaks=5))
        routed.decode[1].plan.append(stream(TEXT.replace("values", "Values")))
        text, events, done = routed.streamed()
        assert text == TEXT[:20] and not done
        assert (
            events[-1]["error"]["code"] == "answer_differs"
            and [("error" in e) for e in events].count(True) == 1
        )


def test_a_server_that_is_gone_and_whole_answers():
    with Routed() as routed:
        routed.decode[0].kill()
        routed.decode[1].plan.append(whole())
        assert routed.complete().json() == {"id": "a"}
        routed.decode[1].plan.append(whole())
        assert routed.complete().json() == {"id": "a"} and routed.metric("retries_total") == 1


def test_a_lost_prefill_server_is_left_out():
    lost = refuses(ApiError(503, "the prefill server is silent", code="prefill_lost"))
    with Routed(decode=1, prefill=2) as routed:
        (decode,) = routed.decode
        decode.plan += [lost, lost, whole()]
        assert routed.complete().status_code == 200
        named = [headers.get("x-prefill") for headers, _ in decode.asked]
        assert named == [*(fake.says["transfer"] for fake in routed.prefill), None]
        routed.hear(decode, alone=False)
        answer = routed.complete()  # nobody can compute its prompt
        assert answer.status_code == 503 and int(answer.headers["retry-after"]) > 0
        assert routed.client.get("/readyz").status_code == 503
        routed.hear(routed.prefill[1])
        decode.plan.append(whole())
        assert routed.complete().status_code == 200


def test_a_prefill_server_that_failed_is_asked_again_where_it_is_the_only_one():
    lost = refuses(ApiError(503, "the prefill server is silent", code="prefill_lost"))
    with Routed(decode=1, prefill=1) as routed:
        (decode,), (prefill,) = routed.decode, routed.prefill
        routed.hear(decode, alone=False)
        decode.plan += [lost, whole()]
        with beating(routed, prefill):
            assert routed.complete().status_code == 200
        assert [h["x-prefill"] for h, _ in decode.asked] == [prefill.says["transfer"]] * 2


def test_an_error_in_a_stream_is_followed_by_another_server():
    stops = 'data: {"error": {"message": "it stopped", "type": "server_error", "param": null, "code": "unavailable"}}\n\n'
    with Routed() as routed:
        routed.decode[0].plan.append(stream(TEXT[:12], last=stops))
        routed.decode[1].plan.append(stream())
        assert routed.streamed()[::2] == (TEXT, True)
        bug = stops.replace("unavailable", "internal_error")
        routed.decode[1].plan.append(stream(TEXT[:12], last=bug))
        text, events, done = routed.streamed()
        assert text == TEXT[:12] and not done and events[-1]["error"]["message"] == "it stopped"


def test_what_comes_at_once_with_an_error_is_not_lost():
    stops = 'data: {"error": {"message": "it stopped", "code": "unavailable"}}\n\n'

    async def at_once(fake):
        return Response(event(TEXT[:4]) + event(TEXT[4:9]) + stops, media_type="text/event-stream")

    with Routed() as routed:
        routed.decode[0].plan.append(at_once)
        routed.decode[1].plan.append(stream())
        assert routed.streamed()[::2] == (TEXT, True)


def test_what_waits_for_a_slow_client_when_a_server_is_lost_is_not_lost():
    got, room = [], asyncio.Event()

    async def send(message):
        await room.wait()
        got.append(message.get("body"))

    async def main():
        client = Client(send)
        client.started = True
        for ask in (client.events(b"a"), client.done()):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.01):
                    await ask
        room.set()
        await client.done()

    asyncio.run(main())
    assert got == [b"adata: [DONE]\n\n", b""]


def test_headers_that_are_not_ascii(one):
    one.decode[0].plan.append(whole())
    headers = KEY | {"user-agent": "caf\xe9".encode("latin-1"), "host": "x/v1/models?"}
    assert one.complete(headers=headers).status_code == 200
    headers, body = one.decode[0].asked[-1]
    assert headers["user-agent"] == "caf\xe9" and "seed" in body


def test_all_are_full():
    full = refuses(ApiError(429, "the queue is full", retry_after=7))
    with Routed() as routed:
        for fake in routed.decode:
            fake.plan += [full, whole()]
        answer = routed.complete()
        assert answer.status_code == 429 and answer.headers["retry-after"] == "7"
        assert [len(fake.asked) for fake in routed.decode] == [1, 1]
        assert routed.complete().status_code == 200  # a full server is not a lost one


def test_there_is_an_end_to_trying():
    with Routed(decode=4) as routed:
        for fake in routed.decode:
            fake.plan.append(stream(breaks=2))
        text, events, done = routed.streamed()
        assert text == TEXT[:8] and not done and events[-1]["error"]["code"] == "unavailable"
        assert sum(len(fake.asked) for fake in routed.decode) == 3
        assert routed.metric("requests_total") == 1


def test_a_client_that_leaves_ends_the_request_there():
    with Routed(decode=1) as routed:
        (decode,) = routed.decode
        decode.plan.append(stream(hold=threading.Event()))
        with routed.streaming() as lines:
            next(lines)
        until(lambda: decode.left == 1)
        until(lambda: routed.router.requests == 0)
        assert routed.router.members.choice.servers[decode.address].requests == 0


def test_a_silent_server_is_lost_with_what_it_was_asked():
    hold = threading.Event()
    with Routed(beat=0.05, silence=0.2) as routed:
        first, second = routed.decode
        first.plan.append(stream(hold=hold))
        second.plan.append(stream())
        with beating(routed, second):
            assert routed.streamed()[::2] == (TEXT, True)
        until(lambda: first.left == 1)


@contextlib.contextmanager
def beating(routed, fake):
    over = threading.Event()

    def beat():
        while not over.wait(0.03):
            routed.hear(fake)

    thread = threading.Thread(target=beat)
    thread.start()
    yield
    over.set()
    thread.join()


def test_who_waits_hears_that_he_does_and_is_answered_in_time():
    with Routed(decode=0, rules=Rules(3, 5.0, 0.05), deadline=0.4) as routed:
        began = time.monotonic()
        answer = routed.complete(stream=True)
        assert 0.3 < time.monotonic() - began < 3
        assert (
            answer.text.count(": keep-alive\n\n") >= 3 and '"message":"no answer within 0.4 s"' in answer.text
        )
        assert routed.complete().status_code == 504
        fake, timer = Fake(routed.loop), None
        fake.plan.append(whole())
        timer = threading.Timer(0.1, lambda: routed.hear(fake))
        timer.start()
        assert routed.complete().status_code == 200  # a server came while it waited
        timer.join()


def test_a_router_that_stops_finishes_what_it_has():
    hold = threading.Event()
    with Routed(decode=1) as routed:
        routed.decode[0].plan.append(stream(hold=hold))
        with routed.streaming() as lines:
            assert next(lines).startswith("data: ")
            routed.router.drain()
            answer = routed.complete()
            assert answer.status_code == 503 and "stopping" in answer.text
            assert routed.client.get("/readyz").status_code == 503
            hold.set()
            assert list(lines)[-2] == "data: [DONE]"
        assert routed.loop.do(routed.router.drained(5))


def test_servers_that_are_asked_and_signatures():
    with Routed(decode=0, fleet_key="fleet") as routed:
        decode, prefill = Fake(routed.loop), Fake(routed.loop, "prefill")
        assert routed.hear(decode).status_code == 401 == routed.hear(decode, key="other").status_code
        assert routed.client.get("/members").status_code == 401
        routed.hear(decode, key="fleet"), routed.hear(prefill, key="fleet")
        decode.plan.append(whole())
        assert routed.complete().status_code == 200
        headers, _ = decode.asked[0]
        assert headers["x-prefill-signature"] == signature("fleet", headers["x-prefill"])
    with Routed(decode=0) as routed:
        fake = Fake(routed.loop, "both")
        fake.plan += [refuses(ApiError(503, "starting")), whole([1]), whole(fake.says), whole()]
        settings = routed.router.settings
        object.__setattr__(settings, "servers", (fake.address,))
        object.__setattr__(settings, "beat", 0.02)
        routed.loop.loop.call_soon_threadsafe(routed.router.begin)
        until(lambda: fake.address in routed.router.members.known)
        assert routed.client.get("/members").json()["members"][0]["role"] == "both"


def test_a_server_that_was_started_again_has_lost_its_requests():
    hold = threading.Event()
    with Routed() as routed:
        first, second = routed.decode
        first.plan.append(stream(hold=hold))
        second.plan.append(stream())
        with routed.streaming() as lines:
            assert next(lines) == event(TEXT[:4]).strip()
            routed.hear(first, identity="2")
            rest = list(lines)
        assert rest[-2] == "data: [DONE]" and len(second.asked) == 1
