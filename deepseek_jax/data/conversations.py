"""A row becomes samples: what the model reads, and what it learns to say, token by token.

    {"messages": [{"role", "content"}, ...]}        the answers, or the last one alone
    {"prompt": ..., "completion": ...}              the completion; both texts, or both lists of messages
    {"text": ...}                                   all of it, as of a document in pre-training

The messages before an answer are rendered by the tokenizer's own chat template, with the beginning of the answer, and
encoded: these are the ids that a sampler is given. What is learned after them is what a sampler should have drawn, encoded
on its own: what the template adds for the answer, up to the token that ends it. So templates need no marks around answers.

A template that does not write an answer as it stands does not decide what is learned: DeepSeek's deletes the reasoning of
every answer, the last one included. Then the answer's own text follows the prompt (`answer_after`). Special tokens that an
answer quotes stay text, unless the template adds more than the answer (calls of tools, a channel).

Answers of one conversation share a sample as long as the prompt of the next begins with the ids of the one before. After
a template that deletes reasoning it does not; each answer is a sample of its own then.
"""

import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from deepseek_jax.checks import require, shown
from deepseek_jax.data.row_fields import learned_of, messages_of, options_of, reasoning_of
from deepseek_jax.data.tokenizer import Tokenizer

LEARN = ("all", "last")  # which answers of a conversation
KINDS = '"messages", "prompt" and "completion", or "text"'
_THINK, _END_THINK = "<think>", "</think>"
_OPENED = re.compile(rf"{_THINK}\s*\Z")
# Switches of templates that ask whether an answer reasons.
_REASONS = {"thinking": True, "enable_thinking": True}
_BEFORE = "\n"  # no tokenizer joins it with a word
_PROBE = ({"role": "user", "content": "?"}, {"role": "assistant", "content": "!"})


class Turn(NamedTuple):
    """A prompt and what the model learns to say after it, as texts, and the id that ends it.

    chat: the prompt is a template's, with all its special tokens; else a text, which begins as the tokenizer has texts
        begin. by_template: the answer has special tokens as well.
    """

    prompt: str
    answer: str
    end: int
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
        self._stops = {tokenizer.token(i): i for i in (*tokenizer.stop_ids, self._eos)}
        self._ends = re.compile("|".join(map(re.escape, sorted(self._stops, reverse=True))))

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
            return [Turn("", self._text("text", given["text"]), self._eos)]
        raise ValueError(f"nothing to learn: a row has {KINDS}; this one has {shown(sorted(given))}")

    def _completion(self, prompt: Any, completion: Any, given: Mapping[str, Any]) -> list[Turn]:
        if isinstance(prompt, list) and isinstance(completion, list):
            return self._conversation([*prompt, *completion], given, len(prompt))
        texts = isinstance(prompt, str) and isinstance(completion, str)
        kinds = f"prompt={shown(prompt)} and completion={shown(completion)}"
        require(texts, f"{kinds} should both be texts, or both be lists of messages")
        return [Turn(prompt, self._text("completion", completion), self._eos)]

    def _text(self, name: str, value: Any) -> str:
        require(isinstance(value, str), f"{name}={shown(value)} should be a text")
        said = value.removesuffix(self._tokenizer.token(self._eos))  # which follows anyway
        require(bool(said.strip()), f"nothing to learn: {name} is empty")
        return said

    def _conversation(self, messages: Any, given: Mapping[str, Any], first: int = 0) -> list[Turn]:
        """The answers from message `first` on."""
        said, options = messages_of(messages), options_of(given, self._tokenizer.chat_template)
        answers = [i for i, m in enumerate(said) if i >= first and m["role"] == "assistant" and learned_of(m)]
        require(
            bool(answers), f"nothing to learn: none of {len(said) - first} messages is an answer to learn"
        )
        chosen = answers if self._learn == "all" else answers[-1:]
        return [self._turn(said, i, options) for i in chosen]

    def _turn(self, messages: list[dict[str, Any]], i: int, options: dict[str, Any]) -> Turn:
        require(i > 0, "message 0 is the assistant's: there is nothing that it answers")
        message = messages[i]
        reasoning, content = reasoning_of(message), message.get("content") or ""
        empty = f"nothing to learn: message {i}, the assistant's, is empty"
        require(bool((reasoning + content).strip() or message.get("tool_calls")), empty)
        if reasoning or _END_THINK in content:
            options = _REASONS | options
        render = self._tokenizer.chat_template.render
        prompt = render(messages[:i], **options)
        whole = render(messages[: i + 1], add_generation_prompt=False, **options)
        calls = bool(message.get("tool_calls"))
        added = whole[len(prompt) :] if whole.startswith(prompt) else ""
        said, end = self._written(added, reasoning, content)
        if said and not (calls and said == content):
            return Turn(prompt, said, end, chat=True, by_template=said != content)
        require(not calls, f"message {i}: the chat template does not write its tool calls here")
        return Turn(prompt, answer_after(prompt, reasoning, content), self._end, chat=True)

    def _written(self, added: str, reasoning: str, content: str) -> tuple[str, int]:
        """What a template adds to the prompt for an answer, up to the token that ends it, and that token; "" where it does
        not write the answer as it stands."""
        place = added.find(reasoning)
        place = added.find(content, place + len(reasoning)) if place >= 0 else -1
        if place < 0:
            return "", self._end
        after = place + len(content)
        if ends := self._ends.search(added, after):
            return added[: ends.start()], self._stops[ends[0]]
        return added[: max(after, len(added.rstrip()))], self._end

    # --- turns to samples -----------------------------------------------------------------------------------------------

    def samples(self, rows: Sequence[Sequence[Turn]]) -> list[list[Sample]]:
        """The samples of each row, from its turns; texts are encoded in parallel."""
        turns = [turn for row in rows for turn in row]
        prompts = self._encoded([(turn.prompt, True, not turn.chat) for turn in turns])
        answers = self._encoded([(turn.answer, turn.by_template, False) for turn in turns])
        if self._puts_a_space:
            behind = self._encoded([(f"{_BEFORE}{turn.answer}", turn.by_template, False) for turn in turns])
            answers = list(map(self._without_space, turns, answers, behind))
        pairs = iter(
            [(prompt, [*ids, turn.end]) for turn, prompt, ids in zip(turns, prompts, answers, strict=True)]
        )
        return [_joined(next(pairs) for _ in row) for row in rows]

    @functools.cached_property
    def _puts_a_space(self) -> bool:
        """Whether the tokenizer puts a space before a text (Metaspace), which an answer behind a prompt does not have."""
        before, both = self._tokenizer.encode(_BEFORE), self._tokenizer.encode(f"{_BEFORE}a")
        return both != before + self._tokenizer.encode("a")

    def _without_space(self, turn: Turn, answer: list[int], behind: list[int]) -> list[int]:
        """Of an answer behind a prompt, what it adds to the ids of `_BEFORE`, unless it joins them."""
        before = self._tokenizer.encode(_BEFORE)
        return behind[len(before) :] if turn.prompt and behind[: len(before)] == before else answer

    def _encoded(self, texts: list[tuple[str, bool, bool]]) -> list[list[int]]:
        """Ids of (text, whether special tokens are matched, whether the bos stands before it), none of an empty text."""
        found: list[list[int]] = [[] for _ in texts]
        for kind in {text[1:] for text in texts}:
            places = [i for i, text in enumerate(texts) if text[1:] == kind and text[0]]
            batch = self._tokenizer.encode_batch([texts[i][0] for i in places], *kind)
            for i, ids in zip(places, batch, strict=True):
                found[i] = ids
        return found


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


def answer_after(prompt: str, reasoning: str, content: str) -> str:
    """The text of an answer: <think>reasoning</think>content, less what the prompt has opened or closed already.

    Behind a prompt that opens the reasoning, an answer without any closes it at once. White space around both is that of the
    prompt: DeepSeek-R1's opens with a line break. Raises ValueError: reasoning behind a prompt that has closed it.
    """
    opened = _OPENED.search(prompt)
    gap = "\n" if opened and "\n" in opened[0] else ""
    closes = _END_THINK in content
    if reasoning or (opened and not closes):
        content = f"{_THINK}{gap}{reasoning}{gap}{_END_THINK}{2 * gap}{content}"
    said = f"the prompt ends with {_END_THINK}, the answer reasons: set chat_template_kwargs so that the prompt does not"
    require(not (prompt.rstrip().endswith(_END_THINK) and (reasoning or closes)), said)
    for mark in (opened[0], _THINK) if opened else ():
        if content.startswith(mark):
            return content[len(mark) :]
    return content
