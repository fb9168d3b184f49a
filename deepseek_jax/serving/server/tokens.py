"""Log-probabilities of tokens as clients read them. They are the model's own, before temperature, penalties and bias."""

from collections.abc import Sequence

from deepseek_jax.data.streaming import StreamDecoder
from deepseek_jax.serving.replies import Piece, Spelled, Speller
from deepseek_jax.serving.request import PromptToken
from deepseek_jax.serving.server.wire import Json

_LEAST = -9999.0  # nats: what JSON can hold of a probability of 0, as vLLM writes it


def nats(token: Spelled) -> float | None:
    return None if token.logprob is None else max(token.logprob, _LEAST)


def prompt_pieces(speller: Speller, prompt: Sequence[PromptToken], decoder: StreamDecoder) -> list[Piece]:
    """The tokens of a prompt as `Reply` gives those of an answer; the decoder makes the text that they are offsets of."""
    pieces, offset = [], 0
    for token in prompt:
        pieces.append(Piece(speller(token.id, token.logprob), offset, _rivals(speller, token)))
        offset += len(decoder.push(token.id))
    return pieces


def _rivals(speller: Speller, token: PromptToken) -> tuple[Spelled, ...]:
    return tuple(speller(*rival) for rival in token.top)


def completion_logprobs(pieces: Sequence[Piece], as_ids: bool) -> Json:
    """The form of /v1/completions. as_ids: "token_id:5" instead of texts."""

    def name(token: Spelled) -> str:
        return f"token_id:{token.id}" if as_ids else token.text

    def top(piece: Piece) -> dict[str, float | None] | None:
        if piece.token.logprob is None:
            return None
        rivals: dict[str, float | None] = {}
        for token in (*piece.top, piece.token):  # of those with one text, the likeliest
            rivals.setdefault(name(token), nats(token))
        return rivals

    return {
        "tokens": [name(piece.token) for piece in pieces],
        "token_logprobs": [nats(piece.token) for piece in pieces],
        "top_logprobs": [top(piece) for piece in pieces],
        "text_offset": [piece.offset for piece in pieces],
    }


def chat_logprobs(pieces: Sequence[Piece]) -> Json:
    """The form of /v1/chat/completions."""
    return {
        "content": [
            _entry(piece.token) | {"top_logprobs": [_entry(rival) for rival in piece.top]} for piece in pieces
        ]
    }


def _entry(token: Spelled) -> Json:
    return {"token": token.text, "logprob": nats(token), "bytes": list(token.raw)}


def prompt_logprobs(speller: Speller, prompt: Sequence[PromptToken]) -> list[Json | None]:
    """vLLM's form: by id, the token's own and its rivals'; null for the first token."""

    def all_of(token: PromptToken) -> Json:
        known = (speller(token.id, token.logprob), *_rivals(speller, token))
        return {str(x.id): {"logprob": nats(x), "decoded_token": x.text} for x in known}

    return [None if token.logprob is None else all_of(token) for token in prompt]
