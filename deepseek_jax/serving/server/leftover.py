"""Fields of a request that no endpoint reads: which are refused, which are ignored, and how a client learns of it.

OpenAI's API refuses every field that it does not know; vLLM takes any, and says so only in its own log. The first breaks
clients of other servers, which send more than we have; with the second, who writes "temprature" gets another distribution and
never hears of it. So here a field that is almost one that is read is refused, with the name that was meant. One that other
servers have, and that would change the answer, is refused too, unless it asks for what happens anyway: an answer that
is not what was asked for is worse than none. The rest is ignored as by vLLM, and named in the response's header
X-Ignored-Fields and in the log, but for what no answer depends on, which clients send by themselves: OpenAI's `user`,
`store`, `metadata` and the like.
"""

import difflib
from collections.abc import Iterator
from typing import Any

from deepseek_jax.checks import plain, shown
from deepseek_jax.serving.server.errors import bad
from deepseek_jax.serving.server.fields import NEAR, Fields

HEADER = "x-ignored-fields"
_NAMED = 16  # fields in the header, at most

# No text depends on them: accounts, storage, caches of others, hints of speed, and what only shows in other answers.
NO_MATTER = frozenset(
    (
        *("user", "store", "metadata", "service_tier", "safety_identifier", "request_id", "session_id"),
        *("prompt_cache_key", "prompt_cache_options", "prompt_cache_retention", "prediction"),
        *("stream_interval", "include_obfuscation", "mm_processor_kwargs", "media_io_kwargs"),
        "spaces_between_special_tokens",
    )
)
# Other servers' fields that change the answer -> values that ask for what happens anyway.
MATTER: dict[str, tuple[Any, ...]] = {
    "allowed_token_ids": ([],),
    "audio": (),
    "bad_words": ([],),
    "best_of": (1,),
    "chat_template": (),
    "documents": ([],),
    "ec_transfer_params": ({},),
    "echo": (False,),
    "function_call": ("none",),
    "functions": ([],),
    "guided_decoding_backend": ("auto",),
    "guided_whitespace_pattern": (),
    "include_reasoning": (True,),
    "include_stop_str_in_output": (False,),
    "kv_transfer_params": ({},),
    "length_penalty": (1,),
    "logprob_token_ids": ([],),
    "mirostat_mode": (0,),
    "modalities": (["text"],),
    "prompt_embeds": (),
    "repetition_detection": (),
    "return_prompt_text": (False,),
    "return_token_offsets": (False,),
    "routed_experts_prompt_start": (),
    "skip_special_tokens": (True,),
    "suffix": ("",),
    "thinking_token_budget": (),
    "top_a": (0,),
    "truncate_prompt_tokens": (),
    "truncation_side": ("left", "right"),
    "typical_p": (1,),
    "use_beam_search": (False,),
    "vllm_xargs": ({},),
    "watermarking": (False,),
    "web_search_options": (),
}


def ignored(fields: Fields) -> tuple[str, ...]:
    """Fields that are left over, for the header. Raises ApiError for slips and for what is not done here."""
    return tuple(name for name in _left(fields) if name.rpartition(".")[2] not in NO_MATTER)


def in_header(names: tuple[str, ...]) -> str:
    """ASCII, and on one line, whatever a client has called its fields."""
    return ", ".join(plain(name).encode("ascii", "backslashreplace").decode() for name in names[:_NAMED])


def _left(fields: Fields) -> Iterator[str]:
    for name, value in fields.values.items():
        if name in fields.read or value is None:
            continue
        if name in MATTER:
            _check_neutral(fields.path + name, value, MATTER[name])
            continue
        near = difflib.get_close_matches(name.lower()[:100], sorted(fields.read), 1, NEAR)
        if near and name not in NO_MATTER:
            said = fields.path + plain(name)
            raise bad(f"{said} is no field; did you mean {fields.path}{near[0]}?", said)
        yield fields.path + name
    for section in fields.sections:
        yield from _left(section)


def _check_neutral(name: str, value: Any, neutral: tuple[Any, ...]) -> None:
    if value not in neutral:
        only = f"; {shown(neutral[0])} would do" if neutral else ""
        raise bad(f"{name}={shown(value)} is not done here: leave it out{only}", name)
