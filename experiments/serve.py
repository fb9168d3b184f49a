"""Serve a training run's or a Hugging Face folder's model over HTTP, as OpenAI's API:

    python -m experiments.serve --checkpoint=runs/tiny
    python -m experiments.serve --checkpoint=FOLDER --host=0.0.0.0 --port=8000 --api_key=SECRET
    python -m experiments.serve --checkpoint=runs/tiny --mesh=node=2,local=4
    python -m experiments.launch --processes=2 -- python -m experiments.serve --checkpoint=runs/tiny --mesh=node=2,local=4

Prefill and decode apart, behind a router that speaks the same API:

    python -m experiments.serve --role=router --port=8000
    python -m experiments.serve --role=prefill --checkpoint=FOLDER --port=8001 --router=http://127.0.0.1:8000
    python -m experiments.serve --role=decode --checkpoint=FOLDER --port=8002 --router=http://127.0.0.1:8000

Then open http://127.0.0.1:8000/ in a browser to talk to it, or ask it from a terminal or any client of OpenAI's:

    curl http://127.0.0.1:8000/v1/completions -H 'Content-Type: application/json' -d '{"prompt": "import os", "max_tokens": 32}'
    OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none").chat.completions.create(model=NAME, messages=[...])

Endpoints: /v1/completions, /v1/chat/completions, /v1/models; /health, /livez, /readyz, /metrics (Prometheus, vLLM's names),
/version; /tokenize, /detokenize, /tokenizer_info; and the page at /. A prefill server has only those that say how it is; a
router passes on all but /health, /livez, /readyz, /metrics and /members, which are its own.

Requests run together, as many as --rows; others wait, up to --waiting, and what comes on top is answered 429 with
Retry-After. A client that leaves ends its request. Ctrl-C or SIGTERM takes no new requests, finishes those that run within
--grace seconds, and ends with status 0; a second one ends at once. One line of JSON for each request goes to standard
error. At the first start all programs are compiled, which takes a while; later ones find them in ~/.cache/deepseek_jax.
"""

import contextvars
import functools
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from deepseek_jax.checks import require
from deepseek_jax.config import DistributedConfig
from deepseek_jax.parallel.processes import joining
from deepseek_jax.parallel.processes.together import is_first
from experiments import command_line
from experiments.devices import cpu_devices
from experiments.mesh_flag import named_by_the_flag, parse_mesh

_EVERYWHERE = ("", "0.0.0.0", "::")
_TURN = 1e-3  # seconds that the engine's thread keeps Python to itself while an answer waits to go out
FLAGS = flags.FlagValues()  # its own, so that other commands may have flags of these names
_text: Any = functools.partial(flags.DEFINE_string, flag_values=FLAGS)
_whole: Any = functools.partial(flags.DEFINE_integer, flag_values=FLAGS)
_number: Any = functools.partial(flags.DEFINE_float, flag_values=FLAGS)
_switch: Any = functools.partial(flags.DEFINE_bool, flag_values=FLAGS)
_list: Any = functools.partial(flags.DEFINE_list, flag_values=FLAGS)
_choice: Any = functools.partial(flags.DEFINE_enum, flag_values=FLAGS)

_CHECKPOINT = _text("checkpoint", None, "Folder of a run or of Hugging Face; all roles but router need it.")
_HOST = _text("host", "127.0.0.1", "Address to listen at; 0.0.0.0: of all networks.")
_PORT = _whole("port", 8000, "Port to listen at; 0: any that is free.", 0, 65535)
_NAME = _text("served_model_name", None, "The model's name for clients; default: the folder's.")
_KEY = _text(
    "api_key",
    None,
    "Key that clients must send; default: DEEPSEEK_JAX_API_KEY of the environment, else none.",
)
_MESH = _text("mesh", "", "Mesh of devices, such as node=2,local=4; empty: one device.")
_STEP = _whole("step", None, "Checkpoint step; default: the newest.")
_EMA = _switch("ema", False, "Use the averaged parameters.")
_FP8 = _switch("keep_fp8", False, "Multiply the FP8 weights of a Hugging Face folder as they are.")
_ROWS = _whole("rows", 32, "Sequences that run at the same time, on each device.", 1)
_LENGTH = _whole("max_model_len", None, "Tokens of prompt and answer; default: the model's positions.", 1)
_PAGES = _whole("pages", None, "Pages of 64 tokens in the cache; default: what memory allows.", 1)
_CACHE = _choice("cache", "model", ("model", "fp8"), "Cache in the model's dtype, or in FP8.")
_CHUNK = _whole("chunk", None, "Tokens of prompts that go through the model at once.", 1)
_DRAFTS = _choice("drafts", "off", ("off", "on", "auto"), "Draft with the MTP module; auto: where it pays.")
_REDUNDANT = _whole(
    "redundant",
    None,
    "Over a mesh: so many copies of busy experts in each layer; experts then move as their loads change. 0: they move, "
    "without copies.",
    0,
)
_SHARED = _switch(
    "shared_routed",
    False,
    "With --redundant: the shared expert has slots and copies, too, as one more routed one.",
)
_REPLAN = _whole(
    "replan", 1000, "With --redundant: steps from one look at the experts' loads to the next.", 1
)
_BELOW = _number(
    "replan_below",
    1.0,
    "With --redundant: experts move if the mean load of a device falls below this part of the fullest one's.",
    0.0,
    1.0,
)
_LOADS = _text(
    "expert_loads",
    None,
    "With --redundant: file of the experts' loads, read at the start if it is there, written at the end.",
)
_OVERLAP = _text(
    "overlap",
    "off",
    "Over a mesh: tokens of a GPU from which on its rows run in two halves, one beside the other's exchange; off; or auto: "
    "where it pays.",
)
_INVARIANT = _switch("invariant", False, "An answer is the same bits whatever else runs; slower.")
_WAITING = _whole("waiting", 256, "Sequences that may wait beside those that run.", 0)
_WAITING_TOKENS = _whole("waiting_tokens", 1 << 20, "Tokens of the prompts that wait.", 1)
_BODY = _whole("max_body", 16 << 20, "Bytes of a request.", 1)
_KEEP_ALIVE = _number("keep_alive", 10.0, "Seconds of silence after which a stream gets a comment.", 0.1)
_GRACE = _number("grace", 60.0, "Seconds that requests have to end when the server stops.", 0.0)
_ROLE = _choice(
    "role",
    "both",
    ("both", "prefill", "decode", "router"),
    "both: computes prompts and answers. prefill: computes prompts for decode servers. decode: answers, and fetches the prompts "
    "from prefill servers. router: has no model, and sends each request to a prefill and a decode server.",
)
_ROUTER = _text(
    "router",
    None,
    "All roles but router: URL of the router that is to know this server, as http://10.0.0.1:8000.",
)
_TRANSFER_PORT = _whole(
    "transfer_port",
    0,
    "Role prefill: port where decode servers fetch prompts; 0: any that is free.",
    0,
    65535,
)
_ALONE = _switch("alone", True, "Role decode: compute a prompt here where no prefill server can.")
_FLEET_KEY = _text(
    "fleet_key",
    None,
    "Key that a router and its servers share; default: DEEPSEEK_JAX_FLEET_KEY of the environment, else none, and a router "
    "hears servers of its own machine only.",
)
_PREFILL = _list(
    "prefill", [], "Role router: addresses of prefill servers, HOST:PORT,..., that do not name this router."
)
_DECODE = _list("decode", [], "Role router: addresses of decode servers, and of such for both.")
_DEADLINE = _number("deadline", 3600.0, "Role router: seconds in which a request is answered whole.", 0.1)
_PATIENCE = _number(
    "patience", 30.0, "Role router: seconds that a request waits for a server that takes it.", 0.0
)
_TRIES = _whole("tries", 3, "Role router: times that a request is sent, as servers are lost.", 1)
_SILENCE = _number("silence", 10.0, "Role router: seconds of silence after which a server is lost.", 0.2)
_EVENTS = _text(
    "kv_events", None, "ZeroMQ endpoint, such as tcp://*:5557, that says which prefixes are cached."
)


def _secret(flag: Any) -> str | None:
    """Of the command line, where others of the machine can read it, or of the environment."""
    return os.environ.get(f"DEEPSEEK_JAX_{flag.name.upper()}") if flag.value is None else flag.value


def _settings() -> Any:
    from deepseek_jax.serving.server.service import Settings

    return Settings(
        name=Path(_CHECKPOINT.value).resolve().name if _NAME.value is None else _NAME.value,
        api_key=_secret(_KEY),
        fleet_key=_secret(_FLEET_KEY),
        max_body=_BODY.value,
        waiting=_WAITING.value,
        waiting_tokens=_WAITING_TOKENS.value,
        keep_alive=_KEEP_ALIVE.value,
    )


def _options() -> Any:
    from deepseek_jax.serving.options import Options

    return Options(
        rows=_ROWS.value,
        max_model_len=_LENGTH.value,
        chunk=_CHUNK.value,
        pages=_PAGES.value,
        cache=_CACHE.value,
        waiting=_WAITING.value,
        invariant=_INVARIANT.value,
        drafts="auto" if _DRAFTS.value == "auto" else _DRAFTS.value == "on",
        redundant=_REDUNDANT.value,
        replan=_REPLAN.value,
        replan_below=_BELOW.value,
        expert_loads=_LOADS.value,
        overlap=int(_OVERLAP.value) if _OVERLAP.value.isdecimal() else _OVERLAP.value,
    )


def _slots() -> Any:
    """How experts are read, where they move."""
    from deepseek_jax.parallel.slots import InSlots

    if _REDUNDANT.value is None:
        require(
            not _SHARED.value, "--shared_routed is for experts that move: give --redundant, too, 0 or more"
        )
        return None
    require(_MESH.value != "", f"--redundant={_REDUNDANT.value} is for a mesh of devices: give --mesh, too")
    return InSlots(_REDUNDANT.value, _SHARED.value)


def _model(mesh: Any) -> Any:
    import deepseek_jax

    model = deepseek_jax.load(
        _CHECKPOINT.value,
        step=_STEP.value,
        ema=_EMA.value,
        keep_fp8=_FP8.value,
        mesh=mesh,
        slots=_slots(),
    )
    if model.tokenizer is None:
        raise ValueError(f"{_CHECKPOINT.value} has no tokenizer.json: the server needs one")
    if model.tokenizer.has_chat_template:
        model.tokenizer.chat_template.check()
    return model


def _say(text: str) -> None:
    print(f"error: {text}", file=sys.stderr, flush=True)


def _weights(model: Any) -> str:
    """By what prefill and decode servers know each other's; of several processes, all must call it."""
    if _ROLE.value == "both":
        return ""
    from deepseek_jax.serving.transfer.identity import fingerprint

    return fingerprint(model.params, model.plan)


def _load(mesh: Any, options: Any, events: Any) -> Any:
    """The model in a warm engine."""
    from deepseek_jax import now
    from deepseek_jax.serving.build import build
    from deepseek_jax.serving.server.service import served
    from deepseek_jax.serving.thread import EngineThread

    with named_by_the_flag():
        model = _model(mesh)
        weights = _weights(model)
        with now.doing("making the engine ready"):
            engine = build(model, options, say=_say)
    for rank, scheduler in enumerate(engine.schedulers if events else ()):
        scheduler.pool.listener = events.listener(rank)
    thread = EngineThread(engine)
    return served(thread, model.tokenizer, **_apart(thread, weights))


def _apart(thread: Any, weights: str) -> dict[str, Any]:
    """The server's side of the transfer of prompts, if it has one."""
    if _ROLE.value == "prefill":
        from deepseek_jax.serving.transfer.prefill import PrefillServer

        return {"giving": PrefillServer(thread, weights, _HOST.value, _TRANSFER_PORT.value)}
    if _ROLE.value == "decode":
        from deepseek_jax.serving.transfer.decode import Asked, Fetching

        return {"fetching": Fetching(thread, weights, Asked(), _ALONE.value)}
    return {}


def _at(host: str, port: int) -> str:
    """An address for routers; they find the host of a server that listens everywhere."""
    return f":{port}" if host in _EVERYWHERE else f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _says(service: Any, port: int) -> Any:
    """What routers are told of this server."""
    from deepseek_jax.serving.server.member import Saying

    def transfer() -> str | None:
        giving = service.served.giving if service.ready else None
        return None if giving is None else _at(_HOST.value, giving.address[1])

    return Saying(service, _at(_HOST.value, port), _ROLE.value, _ALONE.value, transfer)


def _welcome(name: str, url: str, key: bool) -> str:
    if _ROLE.value == "prefill":
        return f"{name} is ready to compute prompts for decode servers; {url}/health and {url}/metrics say how it is"
    secret = ' -H "Authorization: Bearer $KEY"' if key else ""
    return (
        f"{name} is ready: open {url}/ in a browser, or try\n"
        f"  curl {url}/v1/completions{secret} -H 'Content-Type: application/json' "
        """-d '{"prompt": "Once", "max_tokens": 32}'\n"""
        "Ctrl-C ends it when all answers are complete; a second one at once."
    )


def _url(host: str, port: int) -> str:
    shown = "localhost" if host in _EVERYWHERE else f"[{host}]" if ":" in host else host
    return f"http://{shown}:{port}"


def _meet(mesh: Any) -> int:
    """Joins the other processes, if this one was started as one of several; how many there are."""
    join = joining.find(DistributedConfig(), os.environ)
    if join is not None and mesh is None:
        raise ValueError(
            "several processes serve over the devices of a mesh: give --mesh, as --mesh=node=2,local=8"
        )
    count = 1 if join is None else join.processes or 1
    if mesh is not None:
        cpu_devices(max(1, mesh.data) * mesh.node * mesh.local * mesh.tensor // count)
    if join is not None:
        joining.start(join, DistributedConfig())
    return count


def _follow(mesh: Any) -> int:
    """What the processes but the first do. A signal is theirs to hear that one's answers are complete from it."""
    from deepseek_jax.serving.build import follow

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    with joining.failing_fast(_say), named_by_the_flag():
        model = _model(mesh)
        _weights(model)
        follow(model, _options(), _say)
        joining.stop()
    return 0


def _route() -> int:
    """Role router."""
    from deepseek_jax.serving.router.relay import Rules
    from deepseek_jax.serving.router.router import Settings
    from deepseek_jax.serving.server import running
    from experiments import routing

    settings = Settings(
        servers=(*_PREFILL.value, *_DECODE.value),
        api_key=_secret(_KEY),
        fleet_key=_secret(_FLEET_KEY),
        max_body=_BODY.value,
        deadline=_DEADLINE.value,
        beat=min(1.0, _SILENCE.value / 5),
        silence=_SILENCE.value,
        rules=Rules(_TRIES.value, _PATIENCE.value, _KEEP_ALIVE.value),
    )
    listener = running.listening(_HOST.value, _PORT.value)
    routing.run(settings, listener, _url(_HOST.value, listener.getsockname()[1]), _GRACE.value)
    return 0


def main(argv: Sequence[str]) -> int:
    command_line.parse_flags(argv, FLAGS)
    if _ROLE.value == "router":
        return _route()
    if _CHECKPOINT.value is None:
        raise ValueError("give --checkpoint=CHECKPOINT (see --help)")
    mesh = parse_mesh(_MESH.value)
    processes = _meet(mesh)
    if processes > 1 and not is_first():
        return _follow(mesh)
    from deepseek_jax.serving.kv_events import KvEvents
    from deepseek_jax.serving.server import logs, running
    from deepseek_jax.serving.server.app import application
    from deepseek_jax.serving.server.member import Herald
    from deepseek_jax.serving.server.service import Service

    settings, options = _settings(), _options()
    listener = running.listening(_HOST.value, _PORT.value)
    events = None if _EVENTS.value is None else KvEvents(_EVENTS.value)
    url = _url(_HOST.value, listener.getsockname()[1])
    logs.to_stream(sys.stderr)
    sys.setswitchinterval(_TURN)
    context = contextvars.copy_context()  # in which the screen shows what is done
    service = Service(settings)
    service.says = _says(service, listener.getsockname()[1])
    herald = None if _ROUTER.value is None else Herald(_ROUTER.value, service.says, settings.fleet_key)
    running.run(
        application(service, for_clients=_ROLE.value != "prefill"),
        service,
        listener,
        lambda: context.run(_load, mesh, options, events),
        grace=_GRACE.value,
        on_ready=lambda: print(_welcome(settings.name, url, settings.api_key is not None), flush=True),
        at_once=lambda number: os._exit(128 + number),
    )
    if herald is not None:
        herald.close()
    if events is not None:
        events.close()
    if processes > 1:
        joining.stop()
    return 0


if __name__ == "__main__":
    command_line.run(main)
