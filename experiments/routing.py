"""The router's process (`experiments.serve --role=router`)."""

import os
import socket
import sys

from deepseek_jax.serving.router.app import application
from deepseek_jax.serving.router.router import Router, Settings
from deepseek_jax.serving.server import logs, running

_WELCOME = """the router is at {url}: start servers with --router={url}, as
  python -m experiments.serve --role=prefill --checkpoint=FOLDER --port=0 --router={url}
  python -m experiments.serve --role=decode --checkpoint=FOLDER --port=0 --router={url}
{url}/members lists them. Ctrl-C ends it when all answers are complete; a second one at once."""


def run(settings: Settings, listener: socket.socket, url: str, grace: float) -> None:
    """Returns after a signal. grace: seconds that requests then have to end."""
    logs.to_stream(sys.stderr)
    print(_WELCOME.format(url=url), flush=True)
    router = Router(settings)
    running.run(
        application(router),
        router,
        listener,
        lambda: None,
        grace=grace,
        on_ready=lambda: None,
        at_once=lambda number: os._exit(128 + number),
    )
