"""How an answer is written: what /v1/completions and /v1/chat/completions have in common.

What is constant in the events of a stream is written once.
"""

import abc
import time
from collections.abc import Callable, Sequence

from deepseek_jax.serving.replies import Delta, Piece
from deepseek_jax.serving.server.generation import Sample
from deepseek_jax.serving.server.schemas import Options
from deepseek_jax.serving.server.wire import Json, json_text, utf8


class Form(abc.ABC):
    """Writes what comes of samples, of which number i is the choice with index i.

    Args:
        kind: of the object, and that of the events of a stream.
    """

    def __init__(
        self, id: str, kind: tuple[str, str], model: str, options: Options, samples: Sequence[Sample]
    ):
        self.id, self.samples, self.options = id, samples, options
        self._head = {"id": id, "object": kind[0], "created": int(time.time()), "model": model}
        self._event_head = "data: " + json_text(self._head | {"object": kind[1]})[:-1]
        self._told: set[int] = set()  # choices whose end was sent

    # --- for the endpoints ---

    @abc.abstractmethod
    def choice(self, index: int, sample: Sample, pieces: Sequence[Piece]) -> Json:
        """Of a whole answer. pieces: its tokens, if the reply spells them."""

    @abc.abstractmethod
    def parts(self, index: int, sample: Sample, new: Delta, reason: str | None) -> list[Json]:
        """Of a stream: what else its events hold of the choice, besides index and finish_reason; the last goes with the
        reason, if there is one."""

    # --- `answer.Form` ---

    def whole(self) -> Json:
        choices = [
            {
                "index": i,
                **self.choice(i, sample, sample.take().pieces[: sample.count]),
                "finish_reason": sample.reply.finish_reason,
            }
            for i, sample in enumerate(self.samples)
        ]
        return self._head | {"choices": choices, "usage": usage(self.samples)}

    def events(self) -> bytes:
        return b"".join(
            self._events_of(i, sample) for i, sample in enumerate(self.samples) if i not in self._told
        )

    def _events_of(self, index: int, sample: Sample) -> bytes:
        reason: str | None = None
        if sample.reason is not None and sample.error is None:
            self._told.add(index)
            reason = sample.reply.finish_reason
        parts = self.parts(index, sample, sample.take(), reason)
        ends = [*[None] * (len(parts) - 1), reason]
        return b"".join(
            self._event([{"index": index, **part, "finish_reason": end}])
            for part, end in zip(parts, ends, strict=False)
        )

    def _event(self, choices: list[Json]) -> bytes:
        options = self.options
        used = usage(self.samples) if options.usage_always or not choices else None
        more = f',"usage":{json_text(used)}' if options.usage else ""
        return utf8(f'{self._event_head},"choices":{json_text(choices)}{more}}}\n\n')

    def last(self) -> bytes:
        return self._event([]) if self.options.usage else b""

    def figures(self) -> Json:
        samples, used = self.samples, usage(self.samples)
        first = [sample.first - sample.begun for sample in samples if sample.first is not None]
        return {
            "id": self.id,
            "prompt_tokens": used["prompt_tokens"],
            "cached_tokens": used["prompt_cache_hit_tokens"],
            "completion_tokens": used["completion_tokens"],
            "finish_reasons": [sample.reply.finish_reason for sample in samples],
            "first_token_ms": round(1000 * min(first), 1) if first else None,
        }


def usage(samples: Sequence[Sample]) -> Json:
    """A prompt counts once, however many its samples."""
    prompts = [sample for sample in samples if sample.counts_prompt]
    prompt, cached = _sum(prompts, lambda s: len(s.request.prompt)), _sum(prompts, lambda s: s.cached)
    answer = _sum(samples, lambda s: s.count)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": answer,
        "total_tokens": prompt + answer,
        "prompt_tokens_details": {"cached_tokens": cached},
        "prompt_cache_hit_tokens": cached,
        "prompt_cache_miss_tokens": prompt - cached,
    }


def _sum(samples: Sequence[Sample], of: Callable[[Sample], int]) -> int:
    return sum(map(of, samples))
