"""`/v1/completions`: texts, or token ids, that are gone on with."""

import dataclasses
from collections.abc import Sequence

from starlette.requests import Request as HttpRequest

from deepseek_jax.data.fim import fim_prompt
from deepseek_jax.data.streaming import StreamDecoder
from deepseek_jax.serving.replies import Delta, Piece, Reply
from deepseek_jax.serving.server import prepare, schemas
from deepseek_jax.serving.server.answer import Answer
from deepseek_jax.serving.server.body import prefill_of, read_fields, service_of
from deepseek_jax.serving.server.errors import refused
from deepseek_jax.serving.server.forms import Form
from deepseek_jax.serving.server.generation import Sample
from deepseek_jax.serving.server.schemas import CompletionAsked, Options, Prompt
from deepseek_jax.serving.server.service import Served, new_id
from deepseek_jax.serving.server.tokens import completion_logprobs, prompt_logprobs, prompt_pieces
from deepseek_jax.serving.server.wire import Json

_TOKENS = 16  # of an answer, where the request does not say; OpenAI's


async def completions(http: HttpRequest) -> Answer:
    service = service_of(http)
    served = service.served
    async with read_fields(http) as fields:
        asked = schemas.completion(fields)
    service.check_model(asked.options.model)
    size = sum(map(len, asked.prompts))
    ids = await prepare.off_loop(size, lambda: [_ids(served, asked, prompt) for prompt in asked.prompts])
    id = f"cmpl-{new_id()}"
    spec = asked.options.spec
    grammar = await prepare.constraint(served, None if spec is None else lambda: spec)
    prefill = prefill_of(http)
    many = [_samples(f"{id}-{i}", served, asked, prompt, grammar, prefill) for i, prompt in enumerate(ids)]
    form = CompletionForm(
        id, served, service.settings.name, asked, [sample for few in many for sample in few]
    )
    return service.answer(form, asked.options.stream)


def _ids(served: Served, asked: CompletionAsked, prompt: Prompt) -> list[int]:
    if not isinstance(prompt, str):
        return prompt
    if asked.suffix is not None:
        with refused("suffix"):
            return fim_prompt(prompt, asked.suffix, served.tokenizer)
    if asked.special:
        return served.tokenizer.encode_prompt(prompt)
    return served.tokenizer.encode(prompt, allow_special=True)


def _samples(
    id: str,
    served: Served,
    asked: CompletionAsked,
    prompt: list[int],
    grammar: prepare.NewGrammar,
    prefill: str | None,
) -> list[Sample]:
    options = _with_prompt(asked)
    made = prepare.requests(id, served, options, prompt, "prompt", _TOKENS, grammar, prefill)
    speller = served.speller if options.token_ids or options.logprobs is not None else None
    before = prompt if isinstance(asked.prompts[0], str) and asked.suffix is None else ()
    return [
        Sample(
            request,
            Reply(served.tokenizer, options.stop, prompt=before, speller=speller, silent=request.stop_ids),
            counts_prompt=i == 0,
            discards=options.max_tokens == 0,
        )
        for i, request in enumerate(made)
    ]


def _with_prompt(asked: CompletionAsked) -> Options:
    """Log-probabilities of what is echoed belong to those of the answer."""
    options = asked.options
    if not asked.echo or options.logprobs is None:
        return options
    return dataclasses.replace(options, prompt_logprobs=max(options.logprobs, options.prompt_logprobs or 0))


class CompletionForm(Form):
    """Choice i * n + j is sample j of prompt i."""

    def __init__(self, id: str, served: Served, name: str, asked: CompletionAsked, samples: Sequence[Sample]):
        super().__init__(id, ("text_completion",) * 2, name, asked.options, samples)
        self._asked, self._served = asked, served
        self._begun: set[int] = set()  # choices that had an event
        self._held: dict[int, tuple[Piece, ...]] = {}  # tokens whose text is held back

    def choice(self, index: int, sample: Sample, pieces: Sequence[Piece]) -> Json:
        return self._written(index, sample, sample.reply.content, pieces, True)

    def parts(self, index: int, sample: Sample, new: Delta, reason: str | None) -> list[Json]:
        first = index not in self._begun
        pieces = self._held.pop(index, ()) + new.pieces
        at_once = self.options.token_ids and not self.options.stop  # ids do not wait for whole characters
        shows = new.content or reason or (at_once and pieces) or (first and self._asked.echo and sample.first)
        if not shows:
            self._held[index] = pieces
            return []
        self._begun.add(index)
        return [self._written(index, sample, new.content, pieces, first)]

    def _written(self, index: int, sample: Sample, text: str, pieces: Sequence[Piece], first: bool) -> Json:
        """A choice, or a part of it; `first`: its first part, with what it says of the prompt."""
        options, served, more = self.options, self._served, Json()
        before = self._echoed(index) if self._asked.echo else ""
        if options.token_ids:
            more["token_ids"] = [piece.token.id for piece in pieces]
        if options.token_ids and first:
            more["prompt_token_ids"] = list(sample.request.prompt)
        if options.prompt_logprobs is not None and first and sample.prompt is not None:
            more["prompt_logprobs"] = prompt_logprobs(served.speller, sample.prompt)
        if options.logprobs is None:
            return {"text": before * first + text, "logprobs": None} | more
        prompt = sample.prompt if self._asked.echo and first else None
        given = prompt_pieces(served.speller, prompt or (), self._decoder(index))
        moved = [piece._replace(offset=len(before) + piece.offset) for piece in pieces]
        logprobs = completion_logprobs([*given, *moved], self._asked.ids_as_tokens)
        return {"text": before * first + text, "logprobs": logprobs} | more

    def _echoed(self, index: int) -> str:
        given = self._asked.prompts[index // self.options.n]
        return given if isinstance(given, str) else self._served.tokenizer.decode(given)

    def _decoder(self, index: int) -> StreamDecoder:
        """Makes the text that is echoed of the prompt's ids. A bos that was put before a text is not in it."""
        text = isinstance(self._asked.prompts[index // self.options.n], str)
        return StreamDecoder(self._served.tokenizer, skip_special=text)
