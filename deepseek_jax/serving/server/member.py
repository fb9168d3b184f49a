"""What a server says of itself to routers, and how it tells one that it is there."""

import json
import logging
import threading
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable
from typing import Any

from deepseek_jax.checks import require, shown
from deepseek_jax.model.cache import PAGE
from deepseek_jax.serving.server.service import Service
from deepseek_jax.serving.server.wire import Json, json_bytes

LOGGER = logging.getLogger("deepseek_jax.serving")
_SECONDS = 5.0  # that a router may take to answer
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # routers are near


class Saying:
    """Says of a service what `router/members.py: Member` reads.

    Args:
        address: "host:port" of HTTP; with no host, the router finds it.
        role: "prefill", "decode" or "both". alone: a decode server computes prompts where no prefill server can.
        transfer: gives the address where a prefill server gives prompts; None: there is none, or not yet.
    """

    def __init__(
        self, service: Service, address: str, role: str, alone: bool, transfer: Callable[[], str | None]
    ):
        self._service, self._address, self._role, self._alone = service, address, role, alone
        self._transfer, self._identity = transfer, uuid.uuid4().hex

    def __call__(self) -> Json:
        service = self._service
        return {
            "address": self._address,
            "role": self._role,
            "model": service.settings.name,
            "identity": self._identity,
            "transfer": self._transfer(),
            "ready": service.ready,
            "alone": self._alone,
            "load": load(service) if service.ready else {},
        }


def load(service: Service) -> Json:
    """Of a service that is ready: `router/choice.py: Load`."""
    schedulers = service.engine.engine.schedulers
    running = [r for s in schedulers for r in list(s.running)]
    waiting = [r for s in schedulers for r in list(s.waiting)]
    return {
        "requests": len(running) + len(waiting),
        "queued": sum(len(r.tokens) for r in waiting) + sum(max(0, r.goal - r.computed) for r in running),
        "held": PAGE * sum(s.pool.held for s in schedulers),
        "tokens": PAGE * sum(s.pool.pages for s in schedulers),
        "rows": service.served.rows,
    }


class Herald:
    """Tells a router again and again what a server says of itself, from a thread of its own.

    Args:
        router: its URL. key: that the router asks of servers; None: none. seconds: from one time to the next.

    Raises ValueError for what is no URL.
    """

    def __init__(self, router: str, says: Callable[[], Json], key: str | None, seconds: float = 1.0):
        self._url, self._says, self._key, self._seconds = f"{router.rstrip('/')}/members", says, key, seconds
        named = urllib.parse.urlsplit(router)
        require(
            named.scheme in ("http", "https") and bool(named.hostname),
            f"router={shown(router)} must be its URL, as http://127.0.0.1:8000",
        )
        self._now, self._over, self._wrong = threading.Event(), False, ""
        self._thread = threading.Thread(target=self._run, name="herald", daemon=True)
        self._thread.start()

    def tell(self) -> None:
        """Now, as something has changed."""
        self._now.set()

    def close(self) -> None:
        """Says for the last time how things are."""
        self._over = True
        self._now.set()
        self._thread.join(_SECONDS)

    def _run(self) -> None:
        while not self._over:
            self._once()
            self._now.wait(self._seconds)
            self._now.clear()
        self._once()

    def _once(self) -> None:
        wrong = self._failure()
        if wrong and wrong != self._wrong:
            LOGGER.warning(
                "the router does not take this server", extra={"fields": {"router": self._url, "why": wrong}}
            )
        self._wrong = wrong

    def _failure(self) -> str:
        """Tells it once; what went wrong, "" if nothing."""
        headers = {"content-type": "application/json"}
        if self._key is not None:
            headers["authorization"] = f"Bearer {self._key}"
        try:
            request = urllib.request.Request(self._url, json_bytes(self._says()), headers)
            with _OPENER.open(request, timeout=_SECONDS):
                return ""
        except urllib.error.HTTPError as error:
            return f"{error.code}: {_message(error)}"
        except Exception as error:  # whatever it is, the next time may be better
            return f"{type(error).__name__}: {error}"


def _message(error: urllib.error.HTTPError) -> Any:
    try:
        return json.loads(error.read(1 << 16))["error"]["message"]
    except (OSError, ValueError, KeyError, TypeError):
        return error.reason
