"""What is served, and the state that all requests share."""

import asyncio
import dataclasses
import functools
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from deepseek_jax.checks import require, shown
from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.serving.dialects import Dialect, dialect_of
from deepseek_jax.serving.grammar import Grammars
from deepseek_jax.serving.replies import Speller
from deepseek_jax.serving.server.admission import Admission
from deepseek_jax.serving.server.answer import Answer
from deepseek_jax.serving.server.errors import ApiError, bad
from deepseek_jax.serving.server.forms import Form
from deepseek_jax.serving.server.generation import Generation, Mailbox, Sample
from deepseek_jax.serving.server.instruments import Instruments
from deepseek_jax.serving.server.wire import Json
from deepseek_jax.serving.thread import EngineThread

_STARTING = "the server is starting: its model is not ready yet"
_DRAINING = "the server is stopping and takes no new requests"


@dataclasses.dataclass(frozen=True)
class Settings:
    """Attributes:
    name: of the model, as clients ask for it.
    api_key: that clients must send; None: none.
    fleet_key: with which routers sign what clients may not ask for; None: it needs no signature.
    max_body: bytes of a request.
    waiting, waiting_tokens: sequences that may wait beside those that run, and tokens of the prompts of all that have no
        token yet.
    keep_alive: seconds after which a stream in which nothing comes gets a comment.
    """

    name: str
    api_key: str | None = None
    fleet_key: str | None = None
    max_body: int = 16 << 20
    waiting: int = 256
    waiting_tokens: int = 1 << 20
    keep_alive: float = 10.0

    def __post_init__(self) -> None:
        for name in ("max_body", "waiting_tokens", "keep_alive"):
            require(getattr(self, name) > 0, f"{name}={shown(getattr(self, name))} must be positive")
        require(self.waiting >= 0, f"waiting={shown(self.waiting)} must be >= 0")
        require(bool(self.name), "name is empty: give the model's name")
        require(self.api_key != "", "api_key is empty: leave it out for a server without one")
        require(self.fleet_key != "", "fleet_key is empty: leave it out for servers without one")


@dataclasses.dataclass(frozen=True)
class Served:
    """A model that is ready.

    engine: `serving.thread.EngineThread`. vocab_size: ids of the model. rows: sequences that run at the same time. fetching,
    giving: of prompts, where prefill and decode are apart.
    """

    engine: Any
    tokenizer: Tokenizer
    vocab_size: int
    max_model_len: int
    rows: int
    fetching: "Fetching | None" = None
    giving: "Giving | None" = None

    @functools.cached_property
    def speller(self) -> Speller:
        return Speller(self.tokenizer)

    @functools.cached_property
    def dialect(self) -> Dialect:
        return dialect_of(self.tokenizer)

    @functools.cached_property
    def grammars(self) -> Grammars:
        """Takes a while when it is asked for first."""
        return Grammars(self.tokenizer, self.vocab_size)


def served(engine: EngineThread, tokenizer: Tokenizer, **apart: Any) -> Served:
    """What an engine serves. apart: `fetching` or `giving`."""
    device = engine.engine.device
    rows = device.sizes.slots * len(engine.engine.schedulers)
    return Served(engine, tokenizer, device.cfg.vocab_size, device.sizes.max_model_len, rows, **apart)


class Fetching(Protocol):
    """Prompts are computed by others (`transfer/decode.py`)."""

    def close(self) -> None: ...


class Giving(Protocol):
    """Prompts are computed for others (`transfer/prefill.py: PrefillServer`). requests: that are not ended."""

    @property
    def requests(self) -> int: ...

    def drain(self) -> None: ...

    def close(self) -> None: ...


class Service:
    """The server's state: "starting", "ready", "draining".

    Attributes:
        says: tells routers of this server; None: there is none that could ask.
        created: seconds since 1970.
        running: generations that are not ended.
    """

    def __init__(self, settings: Settings):
        self.settings, self.created = settings, int(time.time())
        self.state = "starting"
        self.admission = Admission(settings.waiting, settings.waiting_tokens)
        self.instruments = Instruments(settings.name, self.admission)
        self.running: set[Generation] = set()
        self.requests = 0  # being answered
        self._served: Served | None = None
        self._mailbox: Mailbox | None = None
        self.says: Callable[[], Json] | None = None

    # --- its life ---

    def begin(self, served: Served) -> None:
        """Is ready from now on."""
        self._served = served
        self.instruments.engine = served.engine.engine
        self.admission.sequences += served.rows
        if self.state == "starting":
            self.state = "ready"

    def drain(self) -> None:
        """Takes no new requests from now on."""
        self.state = "draining"
        if self._giving is not None:
            self._giving.drain()

    async def drained(self, seconds: float) -> bool:
        """Waits until all requests are answered; those that are not in time are ended with an error. Returns whether all
        were in time."""
        end = time.monotonic() + seconds
        while self._open and time.monotonic() < end:
            await asyncio.sleep(0.02)
        late = bool(self._open)
        for generation in list(self.running):
            generation.cancel(ApiError(503, "the server stopped before the answer was complete"))
        return not late

    @property
    def _giving(self) -> Giving | None:
        return None if self._served is None else self._served.giving

    @property
    def _open(self) -> int:
        """Requests of clients and of decode servers."""
        return self.requests + (0 if self._giving is None else self._giving.requests)

    def close(self) -> None:
        """Ends the engine."""
        if self._served is not None:
            for side in filter(None, (self._served.fetching, self._served.giving)):
                side.close()
            self._served.engine.close()

    @property
    def alive(self) -> bool:
        return self._served is None or self._served.engine.failed is None

    @property
    def ready(self) -> bool:
        return self.state == "ready" and self.alive

    @property
    def served(self) -> Served:
        """Raises ApiError unless it is ready."""
        if self._served is None or self.state != "ready":
            raise ApiError(503, _DRAINING if self.state == "draining" else _STARTING, retry_after=5.0)
        if self._served.engine.failed is not None:
            raise ApiError(503, "the engine has failed: the server must be started again")
        return self._served

    def check_model(self, name: str | None) -> None:
        """Raises ApiError for another model than the one that is served."""
        if name is not None and name != self.settings.name:
            raise ApiError(
                404,
                f"model={shown(name)} is not served here: there is {self.settings.name!r}",
                "model",
                "model_not_found",
            )

    # --- generations (`generation.Listener`) ---

    @property
    def engine(self) -> Any:
        assert self._served is not None
        return self._served.engine

    def answer(self, form: Form, stream: bool) -> Answer:
        """Runs the samples of a form."""
        if self._mailbox is None:
            self._mailbox = Mailbox(asyncio.get_running_loop())
        return Answer(Generation(self, self._mailbox, form.samples), form, stream, self.settings.keep_alive)

    def enter(self, samples: Sequence[Sample]) -> None:
        tokens = sum(len(sample.request.prompt) for sample in samples)
        try:
            self.admission.enter(len(samples), tokens)
        except ValueError as error:
            prompts = sum(sample.counts_prompt for sample in samples)
            raise bad(str(error), "prompt" if prompts > 1 else "n") from error
        self.running.add(samples[0].generation)

    def came(self, sample: Sample, tokens: int, when: float) -> None:
        if sample.first is None:
            self.admission.leave(len(sample.request.prompt), started=True)
        self.instruments.came(sample, tokens, when)

    def ended(self, sample: Sample, when: float) -> None:
        self.instruments.ended(sample, when)
        self.refused(sample)

    def refused(self, sample: Sample) -> None:
        """The engine did not take it: it is counted nowhere, as what is wrong at first sight."""
        if sample.first is None:
            self.admission.leave(len(sample.request.prompt), started=False)
        if sample.generation.ended:
            self.running.discard(sample.generation)


def new_id() -> str:
    return uuid.uuid4().hex
