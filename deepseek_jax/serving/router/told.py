"""What a client was sent of a stream, so that the same answer, begun anew by another server, goes on where it broke off.

The pieces in which an answer comes depend on time, what they make up does not. So each field that grows (text, tokens,
log-probabilities, calls) is counted by itself, and of a stream that is begun anew each loses as much as was sent before.
"""

from collections.abc import Callable, Mapping
from typing import Any

from deepseek_jax.serving.server.wire import Json

Path = tuple[str, ...]


def _itself(x: Any) -> Any:
    return x


def _uncompared(x: Any) -> Any:
    return [None] * len(x)


def _functions(calls: Any) -> Any:
    return [call.get("function") for call in calls]  # their ids are drawn anew


# Fields of a choice that grow, and what of them must be equal in a stream that is begun anew. Log-probabilities need not be:
# their last bits may depend on what else runs.
_GROW: dict[Path, Callable[[Any], Any]] = {
    ("text",): _itself,
    ("token_ids",): _itself,
    ("delta", "content"): _itself,
    ("delta", "reasoning_content"): _itself,
    ("delta", "reasoning"): _itself,
    ("delta", "tool_calls"): _functions,
    ("logprobs", "tokens"): _itself,
    ("logprobs", "token_logprobs"): _uncompared,
    ("logprobs", "top_logprobs"): _uncompared,
    ("logprobs", "text_offset"): _uncompared,
    ("logprobs", "content"): _uncompared,
}
# Those that are said once.
_ONCE: tuple[Path, ...] = (
    ("delta", "role"),
    ("prompt_token_ids",),
    ("prompt_logprobs",),
    ("finish_reason",),
)


class DiffersError(Exception):
    """An answer that was begun anew is another one."""


class Told:
    """Reads the events of a stream in their order. Attributes: tries: how many streams it read."""

    def __init__(self) -> None:
        self.tries = 0
        self._head: Json = {}  # what all events of a stream share
        self._choices: dict[int, _Choice] = {}
        self._ended = False  # an event without choices, of usage, was sent

    def begin(self) -> None:
        """The stream begins, or begins anew."""
        self.tries += 1
        for choice in self._choices.values():
            choice.begin()

    def new(self, event: Json) -> Json | None:
        """What of an event the client has not been sent, under the name of the first stream; None: nothing. The first
        stream's events are all new. Raises DiffersError."""
        if not self._head:
            self._head = {name: event[name] for name in ("id", "created") if name in event}
        choices = []
        for choice in event.get("choices") or ():
            index = choice.get("index", 0)
            known = self._choices.setdefault(index, _Choice())
            rest, news = known.new(choice)
            if news or self.tries == 1:
                choices.append(rest)
        if not choices and (event.get("choices") or (self._ended and self.tries > 1)):
            return None
        self._ended = self._ended or not choices
        return event if self.tries == 1 else event | self._head | {"choices": choices}


class _Choice:
    def __init__(self) -> None:
        self._sent: dict[Path, Any] = {}  # what must be equal, of all that was sent
        self._seen: dict[Path, int] = {}  # how much of it this stream has given
        self._said: set[Path] = set()

    def begin(self) -> None:
        self._seen.clear()

    def new(self, choice: Json) -> tuple[Json, bool]:
        """What of it is new, and whether anything is."""
        rest, news = _copied(choice), False
        for path, equal in _GROW.items():
            value = _at(choice, path)
            if isinstance(value, str | list) and value:
                left = self._grown(path, value, equal)
                _put(rest, path, left)
                news = news or bool(left)
        for path in _ONCE:
            value = _at(choice, path)
            if value is not None and path in self._said:
                _put(rest, path, None)
            elif value is not None:
                self._said.add(path)
                news = True
        return rest, news

    def _grown(self, path: Path, value: Any, equal: Callable[[Any], Any]) -> Any:
        """What of a field was not sent."""
        sent, start, same = self._sent.get(path, value[:0]), self._seen.get(path, 0), equal(value)
        old = min(len(value), max(0, len(sent) - start))
        if sent[start : start + old] != same[:old]:
            raise DiffersError(f"{'.'.join(path)} is not what it was before")
        self._seen[path] = start + len(value)
        self._sent[path] = sent + same[old:]
        return value[old:]


def _copied(choice: Json) -> Json:
    return {name: dict(value) if isinstance(value, Mapping) else value for name, value in choice.items()}


def _at(value: Any, path: Path) -> Any:
    for name in path:
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def _put(choice: Json, path: Path, value: Any) -> None:
    """A field of the message that has nothing is left out, as in any event that says nothing of it."""
    *before, last = path
    holder = choice[before[0]] if before else choice
    if value or not before or before[0] != "delta":
        holder[last] = value
    else:
        del holder[last]
