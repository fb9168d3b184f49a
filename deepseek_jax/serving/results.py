"""What a program brought, from its arrays on the host to the tokens of a request."""

import itertools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from deepseek_jax.serving.programs import Given
from deepseek_jax.serving.request import PromptToken, Request, Token
from deepseek_jax.serving.sampler import Drawn
from deepseek_jax.serving.steps import Chunk, Running


def up_to_the_end(running: Running, tokens: list[Token]) -> tuple[list[Token], str | None]:
    """Those of the tokens that belong to the sequence; and why it ends with the last one, None if it goes on."""
    request = running.request
    answered = len(running.tokens) - len(request.prompt)
    for n, token in enumerate(tokens, 1):
        if token.id in request.stop_ids:
            return tokens[:n], "stop"
        if answered + n >= request.max_tokens:
            return tokens[:n], "length"
    return tokens, None


def token_of(request: Request, drawn: Any, i: Any, version: int) -> Token:
    """That of row i."""
    top = _top(request.logprobs, drawn.top_ids_bk, drawn.top_logprobs_bk, i)
    kept = drawn.kept_bw[i].copy() if request.kept else None  # a view would keep those of all rows
    routes = drawn.routes_blk[i].copy() if request.routes else None
    logprob, sampled = float(drawn.logprob_b[i]), float(drawn.sampled_b[i])
    return Token(int(drawn.token_b[i]), logprob, sampled, version, top, kept, routes)


def asked_for(drawn: Any, requests: Sequence[Request]) -> Any:
    """So that what nobody asked for, 16 KB of ids and 1 KB of experts of each row of DeepSeek-V3, does not come to the host."""
    kept, routes = any(r.kept for r in requests), any(r.routes for r in requests)

    def only(x: Any) -> Any:
        if not isinstance(x, Drawn):
            return x
        return x._replace(kept_bw=x.kept_bw if kept else None, routes_blk=x.routes_blk if routes else None)

    return jax.tree.map(only, drawn, is_leaf=lambda x: isinstance(x, Drawn))


def given_as_asked(given: Any, requests: Sequence[Request]) -> Any:
    """The same of what is said of the tokens of prompts."""
    logprobs = any(r.prompt_logprobs is not None for r in requests)
    routes_rtlk = given.routes_rtlk if any(r.routes for r in requests) else None
    return (given if logprobs else Given(None, None, None))._replace(routes_rtlk=routes_rtlk)


def prompt_tokens(chunk: Chunk, given: Any, i: int) -> dict[int, PromptToken]:
    """The tokens of a prompt that follow those of a chunk, row i of its program, by their positions."""
    request, n, found = chunk.running.request, len(chunk.tokens), {}
    pad = given.logprob_rt.shape[1] - n
    for t in itertools.takewhile(lambda t: chunk.start + t + 1 < len(request.prompt), range(n)):
        at = (i, pad + t)
        place = chunk.start + t + 1
        top = _top(request.prompt_logprobs, given.top_ids_rtk, given.top_logprobs_rtk, at)
        found[place] = PromptToken(request.prompt[place], float(given.logprob_rt[at]), top)
    return found


def routes_of(prompt: np.ndarray, tokens: Sequence[Token]) -> np.ndarray:
    """Experts of each token of a sequence but the last, which was not computed: int16 [t - 1, l, k], from `Update.routes` and
    those of its answer."""
    return np.stack([*prompt, *(np.asarray(token.routes) for token in tokens)])


def _top(asked: int | None, ids: np.ndarray, logprobs: np.ndarray, at: Any) -> list[tuple[int, float]]:
    if not asked:
        return []
    return list(zip(ids[at][:asked].tolist(), logprobs[at][:asked].tolist(), strict=True))
