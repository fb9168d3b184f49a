"""`/v1/chat/completions`: the next turn of a conversation, with reasoning and tool calls."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from starlette.requests import Request as HttpRequest

from deepseek_jax.serving.asked import calls_spec
from deepseek_jax.serving.dialects import Thinking
from deepseek_jax.serving.grammar import Spec
from deepseek_jax.serving.messages import prompt_of
from deepseek_jax.serving.replies import Delta, Piece, Reply, ToolCall
from deepseek_jax.serving.request import Request
from deepseek_jax.serving.server import prepare, schemas
from deepseek_jax.serving.server.answer import Answer
from deepseek_jax.serving.server.body import prefill_of, read_fields, service_of
from deepseek_jax.serving.server.errors import bad, refused
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
    async with read_fields(http) as fields:
        asked = schemas.chat(fields)
    service.check_model(asked.options.model)
    prompt = await prompt_of_messages(served, asked.conversation)
    thinking = served.dialect.thinking(prompt.text)
    grammar = await prepare.constraint(served, _spec(served, asked), thinking)
    id = f"chatcmpl-{new_id()}"
    samples = [
        Sample(request, _reply(served, asked, request, thinking), counts_prompt=i == 0)
        for i, request in enumerate(
            prepare.requests(
                id, served, asked.options, prompt.ids, "messages", None, grammar, prefill_of(http)
            )
        )
    ]
    form = ChatForm(id, served, service.settings.name, asked, samples)
    return service.answer(form, asked.options.stream)


async def prompt_of_messages(served: Served, conversation: Conversation) -> Prompt:
    """Raises ApiError for what the chat template refuses, or if there is none."""

    def prompt() -> Prompt:
        text = prompt_of(
            served.tokenizer.chat_template,
            conversation.messages,
            served.dialect,
            conversation.tools,
            continue_final_message=conversation.goes_on,
            **conversation.switches,
        )
        return Prompt(text, served.tokenizer.encode(text, allow_special=True))

    size = sum(len(str(message.get("content"))) for message in conversation.messages)
    with refused("messages"):
        return await prepare.off_loop(size, prompt)


def _spec(served: Served, asked: ChatAsked) -> Callable[[], Spec] | None:
    """Makes what the answer must match: what was asked for, or calls of tools; None: anything."""
    conversation, spec = asked.conversation, asked.options.spec
    if not conversation.must_call:
        return None if spec is None else lambda: spec
    if spec is not None:
        raise bad("tool_choice asks for a call, response_format for another form: give one", "tool_choice")

    def calls() -> Spec:
        with refused("tool_choice"):
            functions, many = conversation.callable, conversation.many
            return calls_spec(functions, served.dialect, served.tokenizer, served.grammars, many)

    return calls


def _reply(served: Served, asked: ChatAsked, request: Request, thinking: Thinking) -> Reply:
    options = asked.options
    return Reply(
        served.tokenizer,
        options.stop,
        dialect=served.dialect,
        thinking=thinking,
        tools=bool(asked.conversation.callable),
        speller=served.speller if options.token_ids or options.logprobs is not None else None,
        silent=request.stop_ids,
    )


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
