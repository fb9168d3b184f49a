"""From what was asked to requests for the engine."""

import asyncio
import dataclasses
import secrets
from collections.abc import Callable, Sequence
from typing import Any

from deepseek_jax.serving.request import Request
from deepseek_jax.serving.server.errors import ApiError, bad, refused
from deepseek_jax.serving.server.schemas import Options
from deepseek_jax.serving.server.service import Served

_LONG = 4096  # characters, or ids, above which work leaves the event loop
_SEEDS = 1 << 32


async def off_loop(size: int, function: Callable[[], Any]) -> Any:
    """What a function of data of this size returns; long work is done by another thread."""
    return function() if size < _LONG else await asyncio.to_thread(function)


def requests(
    id: str, served: Served, options: Options, prompt: Sequence[int], field: str, default: int | None
) -> list[Request]:
    """One for each sample of a prompt.

    Args:
        id: what the ids of the requests begin with.
        field: of the request that the prompt came from.
        default: tokens of an answer where the request does not say; None: what is left.

    Raises ApiError for what can never run.
    """
    room = served.max_model_len - len(prompt)
    if room < 1:
        raise ApiError(
            400,
            f"{field} of {len(prompt)} tokens leaves no room for an answer: the model has max_model_len="
            f"{served.max_model_len}",
            field,
            "context_length_exceeded",
        )
    most = options.max_tokens if options.max_tokens is not None else min(default or room, room)
    _check_stops(options, served.vocab_size)
    request = Request(
        id=id,
        prompt=prompt,
        max_tokens=max(1, most),
        sampling=options.sampling,
        min_tokens=min(options.min_tokens, max(1, most)),
        stop_ids=(*options.stop_ids, *(() if options.ignore_eos else served.tokenizer.stop_ids)),
        logprobs=options.logprobs,
        prompt_logprobs=options.prompt_logprobs,
        salt=options.salt,
        priority=options.priority,
    )
    with refused():
        request.check(served.vocab_size, served.max_model_len)
    seed = secrets.randbelow(_SEEDS) if options.seed is None else options.seed
    return [dataclasses.replace(request, id=f"{id}-{i}", seed=(seed + i) % _SEEDS) for i in range(options.n)]


def _check_stops(options: Options, vocab_size: int) -> None:
    most = max(options.stop_ids, default=0)
    if most >= vocab_size:
        raise bad(f"stop_token_ids has {most}: token ids lie below vocab_size={vocab_size}", "stop_token_ids")
