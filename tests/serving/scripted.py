"""An engine that says what it is told to, for states into which a real one cannot be brought."""

from types import SimpleNamespace

from deepseek_jax.serving.request import Token, Update
from deepseek_jax.serving.stats import Stats
from deepseek_jax.serving.transfer.traffic import Traffic


class ScriptedEngine:
    """Has `EngineThread`'s methods. `say` tells a request's listener something; nothing comes by itself.

    requests: by id, of those that are not ended. aborted: ids, in their order.
    """

    def __init__(self):
        self.engine = SimpleNamespace(schedulers=[], stats=Stats(), experts=None, traffic=Traffic())
        self.failed, self.closed = None, False
        self.requests, self.aborted, self._listeners = {}, [], {}

    def submit(self, request, on_update, on_refused=None):
        self.requests[request.id] = request
        self._listeners[request.id] = on_update, on_refused

    def abort(self, request_id, reason="abort"):
        self.aborted.append((request_id, reason))
        self.say(request_id, finish_reason=reason)

    def say(self, request_id, tokens=(), **update):
        """tokens: ids."""
        if request_id not in self.requests:
            return
        on_update, _ = self._listeners[request_id]
        if update.get("finish_reason"):
            del self.requests[request_id]
        on_update(Update(request_id, [Token(i, -1.0, -1.0) for i in tokens], **update))

    def close(self):
        self.closed = True

    def refuse(self, request_id, error):
        del self.requests[request_id]
        self._listeners[request_id][1](error)
