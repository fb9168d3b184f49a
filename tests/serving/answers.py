"""What the tests of replies and grammars share: small tokenizers, tokens of a text cut anyhow, replies to them."""

import functools
import re

import numpy as np
import tokenizers

from deepseek_jax.data import Tokenizer, train_tokenizer
from deepseek_jax.serving.dialects import DIALECTS, MARKERS
from deepseek_jax.serving.replies import Reply
from deepseek_jax.serving.request import Token

TEXT = """def get_weather(city): return {"city": city, "units": ["celsius", "kelvin"], "wind": null, "high": 12.5}
the keys and the values share the latent; the answer is 42, true or false. ``` json function <｜tool▁call▁begin｜>"""


@functools.cache
def tokenizer(special: bool = True) -> Tokenizer:
    """Byte-level, with the markers of reasoning and tools as tokens, flagged special or not."""
    backend = tokenizers.Tokenizer.from_str(train_tokenizer([TEXT], 400)._full.to_str())
    backend.add_tokens([tokenizers.AddedToken(mark, special=special, normalized=False) for mark in MARKERS])
    return Tokenizer(backend)


def tokens(ids, logprob=-1.0) -> list[Token]:
    return [Token(int(i), logprob, logprob) for i in ids]


def cut(text: str, rng: np.random.Generator, own: Tokenizer, whole: bool = True) -> list[int]:
    """Ids of a text in pieces that the generator chooses, down to single bytes; markers are their tokens if `whole`."""
    ids = []
    for part in re.split(f"({'|'.join(map(re.escape, MARKERS))})", text):
        if part in MARKERS and whole:
            ids.append(own.id_of(part))
            continue
        size = int(rng.integers(1, 12))
        cuts = sorted(rng.integers(0, len(part) + 1, len(part) // size).tolist())
        pieces = [part[a:b] for a, b in zip([0, *cuts], [*cuts, len(part)], strict=True)]
        if rng.random() < 0.2:
            ids += byte_ids(own, part.encode())
        else:
            ids += [i for piece in pieces for i in own.encode(piece)]
    return ids


def byte_ids(own: Tokenizer, raw: bytes) -> list[int]:
    """One id for each byte."""
    return [_bytes_of(own)[byte] for byte in raw]


@functools.cache
def _bytes_of(own: Tokenizer) -> dict[int, int]:
    raw = {own.token_bytes(i): i for i in range(own.vocab_size)}
    return {byte: raw[bytes([byte])] for byte in range(256)}


def read(ids, sizes=None, dialect="none", own=None, finish="stop", **options):
    """(reply, deltas) of ids that come `sizes` at a time; one by one without."""
    reply, deltas, at = Reply(own or tokenizer(), dialect=DIALECTS[dialect], **options), [], 0
    while at < len(ids):
        size = next(sizes) if sizes else 1
        deltas.append(reply.push(tokens(ids[at : at + size])))
        at += size
    return reply, [*deltas, reply.close(finish)]


def shown(reply) -> tuple:
    """All that must not depend on how the text came."""
    return (
        reply.content,
        reply.reasoning,
        [(c.index, c.name, c.arguments) for c in reply.calls],
        reply.finish_reason,
    )
