"""Two engines in one process, prefill and decode, with a connection between them; and one that does both, to compare with."""

import dataclasses
import functools
import queue

from deepseek_jax.model.decoding import prepare
from deepseek_jax.serving.engine import Engine
from deepseek_jax.serving.one_device import OneDevice
from deepseek_jax.serving.options import Options
from deepseek_jax.serving.programs import Weights
from deepseek_jax.serving.thread import EngineThread
from deepseek_jax.serving.transfer.deadlines import Deadlines
from deepseek_jax.serving.transfer.decode import Fetching
from deepseek_jax.serving.transfer.prefill import PrefillServer
from tests.serving.drafting_requests import CFG, PAGES, SIZES, model
from tests.serving.mesh_engine import FewSizes

OPTIONS = Options(rows=4, max_model_len=256, chunk=64, waiting=1000, stall=1e9, drafts=True)
SOON = Deadlines(meet=2, queued=20, transfer=20, beat=0.2, direct=5)


class OneSize(FewSizes):
    """Few programs to compile: one of decode rows, one of a chunk."""

    @property
    def chunks(self):
        return ((1, self.chunk),)


ONE_SIZE = OneSize(**dataclasses.asdict(SIZES))


@functools.cache
def ready():
    params, bias = model()
    return Weights(prepare(params, CFG), bias, 60)


@functools.cache
def device(name, pages, fp8, sizes):
    """One for each name; its pages hold whatever earlier tests left."""
    made = OneDevice(CFG, sizes, pages, fp8, drafts=True)
    made.weights = ready()
    return made


def plain(name="together", pages=PAGES, fp8=False, sizes=ONE_SIZE):
    return Engine(device(name, pages, fp8, sizes), OPTIONS)


class Always:
    """Names one server."""

    def __init__(self, address):
        self.to = address

    def address(self, request):
        return self.to


class TwoServers:
    """`decode` and `prefill` are threads of engines; `server` and `fetching` the sides of the transfer. name: of the devices,
    if others run at the same time."""

    def __init__(self, decode=None, prefill=None, alone=False, direct=False, deadlines=SOON, name=""):
        self.prefill = EngineThread(prefill or plain(f"prefill {name}"))
        self.server = PrefillServer(self.prefill, "same", "127.0.0.1", 0, deadlines=deadlines, direct=direct)
        self.decode = EngineThread(decode or plain(f"decode {name}"))
        self.prefills = Always("{}:{}".format(*self.server.address))
        self.fetching = Fetching(
            self.decode, "same", self.prefills, alone, deadlines=deadlines, direct=direct
        )

    def run(self, requests):
        """What comes of requests that are submitted at once: their updates."""
        heard = queue.SimpleQueue()
        for request in requests:
            self.decode.submit(request, heard.put)
        out, left = {request.id: [] for request in requests}, len(requests)
        while left:
            update = heard.get(timeout=60)
            out[update.id].append(update)
            left -= update.finish_reason is not None
        return out

    def free(self):
        """Whether nobody holds a page or a slot, on either side, in a while."""
        for thread in (self.prefill, self.decode):
            thread.call(lambda: None)
        return all(not_held(thread.engine) for thread in (self.prefill, self.decode))

    def __enter__(self):
        return self

    def __exit__(self, *raised):
        self.fetching.close()
        self.server.close()
        for thread in (self.prefill, self.decode):
            failed = thread.failed
            thread.close()
            assert failed is None, failed


def not_held(engine):
    return all(
        (s.pool.held, s.pool.free + s.pool.cached) == (0, s.pool.pages) and not (s.running or s.waiting)
        for s in engine.schedulers
    )


def ids(out):
    return {
        name: [token.id for update in updates for token in update.tokens] for name, updates in out.items()
    }
