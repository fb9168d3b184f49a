"""A router, prefill and decode servers as processes over one tiny checkpoint: what the scripts that kill them share.

with apart(prefill=1, decode=2) as fleet:
    fleet.kill("decode-0")
    fleet.start("decode-0")
    fleet.there("decode-0")
"""

import contextlib
import json
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator, Mapping
from http.client import HTTPException
from pathlib import Path
from typing import Any

from experiments.served import Server, end_servers_at_sigterm
from tests.serving.running import MODEL, command, quiet, save_checkpoint

CPU = {"JAX_PLATFORMS": "cpu"}


class Fleet:
    """Attributes: servers: the processes that run, by name ("prefill-0"); taps: see `tap.py`, by name."""

    def __init__(self, folder: Path, router: Mapping[str, Any], options: Mapping[str, Any], model: str):
        self._folder, self._model, self._starts = folder, model, 0
        self._checkpoint = save_checkpoint(folder / "checkpoint")
        self._options = dict(options)
        given = {"role": "router", "port": "{port}", **router}
        line = [
            sys.executable,
            "-m",
            "experiments.serve",
            *(f"--{name}={value}" for name, value in given.items()),
        ]
        self.router = Server(line, folder / "router", CPU)
        self.servers: dict[str, Server] = {}
        self.logs: list[Path] = [folder / "router"]

    def start(self, name: str, router: bool = True) -> Server:
        """Returns when it says that it is ready. router: it tells the router that it is there."""
        self._starts += 1
        role = name.partition("-")[0]
        more = {"role": role, "router": self.router.url} if router else {"role": role}
        line = command(self._checkpoint, **{"served_model_name": self._model, **self._options, **more})
        log = self._folder / f"{name}-{self._starts}"
        self.logs.append(log)
        self.servers[name] = Server(line, log, CPU, ready="/readyz", seconds=120)
        return self.servers[name]

    def kill(self, name: str) -> None:
        self.servers.pop(name).kill()

    def there(self, name: str, seconds: float = 20) -> None:
        """Waits until the router sends requests to a server."""
        port, end = self.servers[name].port, time.monotonic() + seconds
        while not any(m["alive"] and m["address"].endswith(f":{port}") for m in self.members()):
            assert time.monotonic() < end, f"the router does not know {name}"
            time.sleep(0.05)

    def members(self) -> list[dict[str, Any]]:
        return json.loads(self.router.get("/members"))["members"]

    def quiet(self) -> None:
        """Waits until nothing runs or waits and no page is held anywhere."""
        for server in self.servers.values():
            quiet(server)

    def close(self) -> None:
        for server in [*self.servers.values(), self.router]:
            server.kill()

    def tracebacks(self) -> list[str]:
        return [log.name for log in self.logs if "Traceback" in log.read_text()]


@contextlib.contextmanager
def apart(
    prefill: int = 1,
    decode: int = 1,
    router: Mapping[str, Any] | None = None,
    model: str = MODEL,
    tapped: bool = False,
    **options: Any,
) -> Iterator[Fleet]:
    """tapped: the prefill servers do not tell the router of themselves; who holds a tap does."""
    end_servers_at_sigterm()
    with tempfile.TemporaryDirectory() as folder:
        fleet = Fleet(Path(folder), router or {}, options, model)
        try:
            for name in [*(f"prefill-{i}" for i in range(prefill)), *(f"decode-{i}" for i in range(decode))]:
                fleet.start(name, router=not (tapped and name.startswith("prefill")))
            yield fleet
        except BaseException:
            for log in fleet.logs[-4:]:
                print(f"--- {log.name}\n{log.read_text()[-3000:]}", file=sys.stderr)
            raise
        finally:
            fleet.close()


class Sponsor:
    """Tells the router of a prefill server in its place, with another address where prompts are fetched."""

    def __init__(self, fleet: Fleet, name: str, transfer: str):
        self._fleet, self._name, self._transfer = fleet, name, transfer
        self.real: str | None = None  # where the server gives prompts
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._over.wait(0.2):
            with contextlib.suppress(OSError, HTTPException, KeyError, ValueError):
                says = json.loads(self._fleet.servers[self._name].get("/member"))
                self.real = says["transfer"]
                body = json.dumps(says | {"transfer": says["transfer"] and self._transfer}).encode()
                urllib.request.urlopen(f"{self._fleet.router.url}/members", body, timeout=5).close()

    def close(self) -> None:
        self._over.set()
        self._thread.join()
