"""A row becomes samples: what the model reads, and what it learns to say, token by token.

    {"messages": [{"role", "content"}, ...]}        the answers, or the last one alone
    {"prompt": ..., "completion": ...}              the completion; both texts, or both lists of messages
    {"text": ...}                                   all of it, as of a document in pre-training

The messages before an answer are rendered by the tokenizer's own chat template, with the beginning of the answer, and
encoded: these are the ids that a sampler is given. The answer itself is not rendered: its own text, encoded on its own,
and the token that ends a turn are what a sampler would have drawn. So templates need no marks around answers, and what
they take out of a conversation stays in the answer that is learned: DeepSeek's deletes the reasoning of every answer.
(What only a template can write, as calls of tools, is the text that it adds to the prompt.)

Answers of one conversation share a sample as long as the prompt of the next begins with the ids of the one before. After
a template that deletes reasoning it does not; each answer is a sample of its own then.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from deepseek_jax.checks import require, shown
from deepseek_jax.data.chat import Message
from deepseek_jax.data.tokenizer import Tokenizer

LEARN = ("all", "last")  # which answers of a conversation
KINDS = '"messages", "prompt" and "completion", or "text"'
_THINK, _END_THINK = "<think>", "</think>"
_PROBE = ({"role": "user", "content": "?"}, {"role": "assistant", "content": "!"})


class Turn(NamedTuple):
    """A prompt and what the model learns to say after it, as texts.

    chat: the prompt is a template's, with all its special tokens; else a text, which begins as the tokenizer has texts
        begin. by_template: the answer has special tokens as well.
    """

    prompt: str
    answer: str
    chat: bool = False
    by_template: bool = False


class Sample(NamedTuple):
    """ids int32 [n]; learned bool [n], which of them are labels."""

    ids: np.ndarray
    learned: np.ndarray


class Conversations:
    """Makes samples of rows, with a tokenizer and its chat template.

    Args:
        learn: "all" answers of a conversation, or the "last".
    """

    def __init__(self, tokenizer: Tokenizer, learn: str = "all"):
        self._tokenizer, self._learn = tokenizer, learn
        self._eos = tokenizer.eos_id
        self._end = self._end_of_turn() if tokenizer.has_chat_template else self._eos

    def _end_of_turn(self) -> int:
        """The token that ends an answer: the last of a conversation that ends generations, else the eos."""
        try:
            ids = self._tokenizer.encode_chat(_PROBE, add_generation_prompt=False)
        except ValueError:  # a template that wants other conversations
            return self._eos
        return next((i for i in reversed(ids) if i in self._tokenizer.stop_ids), self._eos)

    # --- rows to turns ------------------------------------------------------------------------------------------------

    def turns(self, values: Mapping[str, Any]) -> list[Turn]:
        """What there is to learn in a row, oldest first, at least one turn. Raises ValueError: nothing, or no such row."""
        given = {name: value for name, value in values.items() if value is not None}
        if "messages" in given:
            return self._conversation(given["messages"], given)
        if "prompt" in given and "completion" in given:
            return self._completion(given["prompt"], given["completion"], given)
        if "text" in given:
            return [Turn("", self._text("text", given["text"]))]
        raise ValueError(f"nothing to learn: a row has {KINDS}; this one has {shown(sorted(given))}")

    def _completion(self, prompt: Any, completion: Any, given: Mapping[str, Any]) -> list[Turn]:
        if isinstance(prompt, list) and isinstance(completion, list):
            return self._conversation([*prompt, *completion], given, len(prompt))
        kinds = f"prompt={shown(prompt)} and completion={shown(completion)}"
        require(isinstance(prompt, str), f"{kinds} should both be texts, or both be lists of messages")
        return [Turn(prompt, self._text("completion", completion))]

    def _text(self, name: str, value: Any) -> str:
        require(isinstance(value, str), f"{name}={shown(value)} should be a text")
        said = value.removesuffix(self._tokenizer.token(self._eos))  # which follows anyway
        require(bool(said.strip()), f"nothing to learn: {name} is empty")
        return said

    def _conversation(self, messages: Any, given: Mapping[str, Any], first: int = 0) -> list[Turn]:
        """The answers from message `first` on."""
        said = messages_of(messages)
        answers = [i for i, m in enumerate(said) if i >= first and m.get("role") == "assistant"]
        require(bool(answers), f"nothing to learn: none of {len(said) - first} messages is the assistant's")
        chosen = answers if self._learn == "all" else answers[-1:]
        return [self._turn(said, i, options_of(given)) for i in chosen]

    def _turn(self, messages: list[dict[str, Any]], i: int, options: Mapping[str, Any]) -> Turn:
        require(i > 0, "message 0 is the assistant's: there is nothing that it answers")
        prompt = self._tokenizer.chat_template.render(messages[:i], **options)
        message = messages[i]
        reasoning, content = reasoning_of(message), message.get("content") or ""
        if reasoning or message.get("tool_calls"):
            added = self._added(prompt, messages[: i + 1], options)
            if reasoning in added and content in added:
                return Turn(prompt, added, chat=True, by_template=True)
            require(
                not message.get("tool_calls"), f"message {i}: the chat template does not write its tool calls"
            )
        text = f"{_THINK}{reasoning}{_END_THINK}{content}" if reasoning else content
        require(bool(text.strip()), f"nothing to learn: message {i}, the assistant's, is empty")
        return Turn(prompt, _after(prompt, text), chat=True)

    def _added(self, prompt: str, messages: list[dict[str, Any]], options: Mapping[str, Any]) -> str:
        """What the template adds to the prompt for the last message; "" if it writes another prompt before it."""
        whole = self._tokenizer.chat_template.render(messages, add_generation_prompt=False, **options)
        return whole[len(prompt) :] if whole.startswith(prompt) else ""

    # --- turns to samples -----------------------------------------------------------------------------------------------

    def samples(self, rows: Sequence[Sequence[Turn]]) -> list[list[Sample]]:
        """The samples of each row, from its turns; texts are encoded in parallel."""
        turns = [turn for row in rows for turn in row]
        prompts = self._encoded([(turn.prompt, True, not turn.chat) for turn in turns])
        answers = self._encoded([(turn.answer, turn.by_template, False) for turn in turns])
        pairs = iter([self._ended(*turn) for turn in zip(turns, prompts, answers, strict=True)])
        return [_joined(next(pairs) for _ in row) for row in rows]

    def _encoded(self, texts: list[tuple[str, bool, bool]]) -> list[list[int]]:
        """Ids of (text, whether special tokens are matched, whether the bos stands before it), none of an empty text."""
        found: list[list[int]] = [[] for _ in texts]
        for kind in {text[1:] for text in texts}:
            places = [i for i, text in enumerate(texts) if text[1:] == kind and text[0]]
            batch = self._tokenizer.encode_batch([texts[i][0] for i in places], *kind)
            for i, ids in zip(places, batch, strict=True):
                found[i] = ids
        return found

    def _ended(self, turn: Turn, prompt: list[int], answer: list[int]) -> tuple[list[int], list[int]]:
        """The ids of prompt and answer, the latter up to the first token that ends it, which is added if it has none."""
        if turn.by_template:
            stops = (i for i, token in enumerate(answer) if token in self._tokenizer.stop_ids)
            if (stop := next(stops, None)) is not None:
                return prompt, answer[: stop + 1]
        return prompt, [*answer, self._end if turn.chat else self._eos]


def _joined(turns: Iterable[tuple[list[int], list[int]]]) -> list[Sample]:
    """Samples of the (prompt, answer) ids of one conversation; those that a prompt continues become one."""
    samples, ids, learned = [], list[int](), list[bool]()
    for prompt, answer in turns:
        if ids and prompt[: len(ids)] != ids:
            samples.append(_sample(ids, learned))
            learned = []
        learned += [False] * (len(prompt) - len(learned)) + [True] * len(answer)
        ids = [*prompt, *answer]
    return [*samples, _sample(ids, learned)]


def _sample(ids: list[int], learned: list[bool]) -> Sample:
    learned[0] = False  # nothing comes before the first token
    return Sample(np.array(ids, np.int32), np.array(learned, bool))


def _after(prompt: str, text: str) -> str:
    """The text without a <think> that the prompt has opened already."""
    return text.removeprefix(_THINK) if prompt.rstrip().endswith(_THINK) else text


# --- what rows say ----------------------------------------------------------------------------------------------------


def messages_of(value: Any) -> list[dict[str, Any]]:
    """Messages as templates read them: fields that are None are gone, parts of content are joined. Raises ValueError."""
    require(isinstance(value, list) and bool(value), f"messages={shown(value)} should be a list of messages")
    return [_message(i, message) for i, message in enumerate(value)]


def _message(i: int, message: Any) -> dict[str, Any]:
    good = isinstance(message, Mapping) and isinstance(message.get("role"), str)
    require(good, f'message {i} is {shown(message)}: it should be {{"role", "content"}}')
    given = {name: value for name, value in message.items() if value is not None}
    if isinstance(given.get("content"), list):
        parts: list[Any] = [p.get("text") if isinstance(p, Mapping) else None for p in given["content"]]
        require(
            all(isinstance(p, str) for p in parts),
            f"message {i} has parts that are no text: {shown(message)}",
        )
        given["content"] = "".join(parts)
    if not given.get("tool_calls"):  # an empty list is no call, though templates take it for one
        given.pop("tool_calls", None)
        require(
            isinstance(given.get("content", ""), str), f"message {i} has no text content: {shown(message)}"
        )
    return given


def reasoning_of(message: Message) -> str:
    """The reasoning that stands in a field of its own, "" without one. Raises ValueError: no text."""
    value = next((message[n] for n in ("reasoning_content", "thinking", "reasoning") if message.get(n)), "")
    require(isinstance(value, str), f"reasoning_content={shown(value)} should be a text")
    return str(value)


def options_of(given: Mapping[str, Any]) -> dict[str, Any]:
    """A row's "tools", as a list or its JSON, and "chat_template_kwargs", for the template. Raises ValueError."""
    tools, switches = given.get("tools"), given.get("chat_template_kwargs") or {}
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise ValueError(f"tools={shown(tools)} is no JSON: {error}") from error
    require(tools is None or isinstance(tools, list), f"tools={shown(tools)} should be a list")
    require(isinstance(switches, Mapping), f"chat_template_kwargs={shown(switches)} should be an object")
    return {"tools": tools or None} | dict(switches)


def question_of(values: Mapping[str, Any]) -> str:
    """What a row asks, by which rows are held out (`rows.share_of`): the words of the user before the first answer.

    A system prompt does not count, so that a question is on one side whatever stands before it. Of a text: the text.
    """
    given = values.get("messages") or values.get("prompt")
    if given is None or isinstance(given, str):
        return str(given if given is not None else values.get("text"))
    messages = messages_of(given)
    answers = (i for i, message in enumerate(messages) if message["role"] == "assistant")
    before = messages[: next(answers, None)]
    asked = [str(m.get("content", "")) for m in before if m["role"] != "system"]
    return "\n".join(asked or [str(m.get("content", "")) for m in messages])
