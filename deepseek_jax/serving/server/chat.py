"""`/v1/chat/completions`: the next turn of a conversation, with reasoning and tool calls."""

from collections.abc import Sequence
from typing import NamedTuple

from starlette.requests import Request as HttpRequest

from deepseek_jax.serving.replies import Delta, Piece, Reply, ToolCall
from deepseek_jax.serving.server import prepare, schemas
from deepseek_jax.serving.server.answer import Answer
from deepseek_jax.serving.server.body import read_object, service_of
from deepseek_jax.serving.server.errors import refused
from deepseek_jax.serving.server.forms import Form
from deepseek_jax.serving.server.generation import Sample
from deepseek_jax.serving.server.schemas import ChatAsked, Conversation
from deepseek_jax.serving.server.service import Served, new_id
from deepseek_jax.serving.server.tokens import chat_logprobs, prompt_logprobs
from deepseek_jax.serving.server.wire import Json


class Prompt(NamedTuple):
    """A rendered conversation."""

    text: str
    ids: list[int]


async def chat_completions(http: HttpRequest) -> Answer:
    service = service_of(http)
    served = service.served
    asked = schemas.chat(await read_object(http))
    service.check_model(asked.options.model)
    prompt = await prompt_of_messages(served, asked.conversation)
    id = f"chatcmpl-{new_id()}"
    form = ChatForm(id, served, service.settings.name, asked, _samples(id, served, asked, prompt))
    return service.answer(form, asked.options.stream)


async def prompt_of_messages(served: Served, conversation: Conversation) -> Prompt:
    """Raises ApiError for what the chat template refuses, or if there is none."""

    def prompt() -> Prompt:
        with refused("messages"):
            tools = list(conversation.tools) if conversation.tool_choice != "none" else []
            template = served.tokenizer.chat_template
            text = template.render(conversation.messages, tools=tools or None, **conversation.switches)
            return Prompt(text, served.tokenizer.encode(text, allow_special=True))

    size = sum(len(message.get("content") or "") for message in conversation.messages)
    return await prepare.off_loop(size, prompt)


def _samples(id: str, served: Served, asked: ChatAsked, prompt: Prompt) -> list[Sample]:
    options, dialect = asked.options, served.dialect
    speller = served.speller if options.token_ids or options.logprobs is not None else None
    return [
        Sample(
            request,
            Reply(
                served.tokenizer,
                options.stop,
                dialect=dialect,
                thinking=dialect.thinking(prompt.text),
                tools=asked.conversation.tool_choice != "none",
                speller=speller,
                silent=request.stop_ids,
            ),
            counts_prompt=i == 0,
        )
        for i, request in enumerate(prepare.requests(id, served, options, prompt.ids, "messages", None))
    ]


def _call(call: ToolCall, indexed: bool) -> Json:
    found = {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
    return {"index": call.index} | found if indexed else found


class ChatForm(Form):
    """Choice i is sample i."""

    def __init__(self, id: str, served: Served, name: str, asked: ChatAsked, samples: Sequence[Sample]):
        kind = ("chat.completion", "chat.completion.chunk")
        super().__init__(id, kind, name, asked.options, samples)
        self._served = served
        self._begun: set[int] = set()  # choices that had an event
        self._held: dict[int, tuple[Piece, ...]] = {}  # tokens whose text is held back

    # --- whole ---

    def whole(self) -> Json:
        (*_, sample), options = self.samples, self.options
        if options.prompt_logprobs is None or sample.prompt is None:
            return super().whole()
        return super().whole() | {"prompt_logprobs": prompt_logprobs(self._served.speller, sample.prompt)}

    def choice(self, index: int, sample: Sample, pieces: Sequence[Piece]) -> Json:
        reply = sample.reply
        message: Json = {"role": "assistant", "content": reply.content}
        if reply.reasoning:
            message |= {"reasoning_content": reply.reasoning, "reasoning": reply.reasoning}
        if reply.calls:
            message |= {
                "content": reply.content or None,
                "tool_calls": [_call(call, False) for call in reply.calls],
            }
        return {"message": message} | self._of_tokens(pieces)

    # --- streamed ---

    def parts(self, index: int, sample: Sample, new: Delta, reason: str | None) -> list[Json]:
        deltas: list[Json] = []
        if new.reasoning:
            deltas.append({"reasoning_content": new.reasoning, "reasoning": new.reasoning})
        if new.content:
            deltas.append({"content": new.content})
        if new.calls:
            deltas.append({"tool_calls": [_call(call, True) for call in new.calls]})
        if reason is not None and not deltas:
            deltas.append({})
        pieces = self._held.pop(index, ()) + new.pieces
        if not deltas:
            self._held[index] = pieces
            return self._role(index, sample)
        rest = [{"delta": delta, "logprobs": None} for delta in deltas[:-1]]
        return [*self._role(index, sample), *rest, {"delta": deltas[-1]} | self._of_tokens(pieces)]

    def _role(self, index: int, sample: Sample) -> list[Json]:
        """The first event of a choice, when its first token has come."""
        if index in self._begun or sample.first is None:
            return []
        self._begun.add(index)
        return [{"delta": {"role": "assistant", "content": ""}, "logprobs": None}]

    def _of_tokens(self, pieces: Sequence[Piece]) -> Json:
        logprobs = None if self.options.logprobs is None else chat_logprobs(pieces)
        ids = {"token_ids": [piece.token.id for piece in pieces]} if self.options.token_ids else {}
        return {"logprobs": logprobs, **ids}
