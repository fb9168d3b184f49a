"""From what was asked to requests for the engine."""

import asyncio
import dataclasses
import secrets
from collections.abc import Callable, Sequence
from typing import Any

from deepseek_jax.serving.dialects import Thinking
from deepseek_jax.serving.grammar import Spec
from deepseek_jax.serving.request import Grammar, Request
from deepseek_jax.serving.server.errors import ApiError, bad, refused
from deepseek_jax.serving.server.schemas import Options
from deepseek_jax.serving.server.service import Served

_LONG = 4096  # characters, or ids, above which work leaves the event loop
_SEEDS = 1 << 32


async def off_loop(size: int, function: Callable[[], Any]) -> Any:
    """What a function of data of this size returns; long work is done by another thread."""
    return function() if size < _LONG else await asyncio.to_thread(function)


NewGrammar = Callable[[], Grammar | None]


async def constraint(
    served: Served, spec: Callable[[], Spec] | None, thinking: Thinking = "none"
) -> NewGrammar:
    """What gives each sample a grammar of its own. spec: what it must match; None: anything, and there is no grammar.

    Raises ApiError for what cannot be compiled.
    """
    if spec is None:
        return lambda: None

    def compiled() -> Spec:
        found = spec()
        served.grammars.constraint(found)  # it keeps what it compiled
        return found

    with refused("response_format"):
        found = await asyncio.to_thread(compiled)
    return lambda: served.grammars.constraint(found, thinking)


def requests(
    id: str,
    served: Served,
    options: Options,
    prompt: Sequence[int],
    field: str,
    default: int | None = None,
    grammar: NewGrammar = lambda: None,
    prefill: str | None = None,
) -> list[Request]:
    """One for each sample of a prompt.

    Args:
        id: what the ids of the requests begin with.
        field: of the request that the prompt came from.
        default: tokens of an answer where the request does not say; None: what is left.
        grammar: gives a new one for each.
        prefill: address of the server that is to compute the prompt.

    Raises ApiError for what can never run.
    """
    room = served.max_model_len - len(prompt)
    most = min(default or room, room) if options.max_tokens is None else options.max_tokens
    if room < 1 or most > room:
        raise ApiError(
            400,
            f"{field} of {len(prompt)} tokens leaves no room for an answer"
            + (f" of max_tokens={most}" if room > 0 else "")
            + f": the model has max_model_len={served.max_model_len}",
            field if room < 1 else "max_tokens",
            "context_length_exceeded",
        )
    _check_stops(options, served.vocab_size)
    request = Request(
        id=id,
        prompt=prompt,
        max_tokens=max(1, most),  # the engine draws one at least
        sampling=options.sampling,
        min_tokens=min(options.min_tokens, max(1, most)),
        stop_ids=(*options.stop_ids, *(() if options.ignore_eos else served.tokenizer.stop_ids)),
        logprobs=options.logprobs,
        prompt_logprobs=options.prompt_logprobs,
        salt=options.salt,
        priority=options.priority,
        prefill=prefill,
    )
    with refused():
        request.check(served.vocab_size, served.max_model_len)
    seed = secrets.randbelow(_SEEDS) if options.seed is None else options.seed
    return [
        dataclasses.replace(request, id=f"{id}-{i}", seed=(seed + i) % _SEEDS, grammar=grammar())
        for i in range(options.n)
    ]


def _check_stops(options: Options, vocab_size: int) -> None:
    most = max(options.stop_ids, default=0)
    if most >= vocab_size:
        raise bad(f"stop_token_ids has {most}: token ids lie below vocab_size={vocab_size}", "stop_token_ids")
