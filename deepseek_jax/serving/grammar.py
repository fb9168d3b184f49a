"""Constraints on what an answer may be: `Grammars` compiles them by llguidance, a `Constraint` follows one answer.

A `Spec` says what the answer must match; serving/asked.py makes it of what clients send.
"""

import collections
import json
import re
import threading
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple

import llguidance
import numpy as np

from deepseek_jax.checks import require
from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.serving.dialects import END_THINK, MARKERS, THINK, Thinking

_CACHED = 256  # compiled grammars
_LONGEST = 300  # characters of an error
# As much white space as pretty printing needs: a weak model would else write nothing but that.
_JSON: Any = {"whitespace_pattern": r"[\x20\x0A\x0D\x09]{1,64}"}
_NEGATIVE = re.compile(r"-\d+(?:\.\d+)?(?:[eE][-+]?\d+)?")

Kind = Literal["json_schema", "regex", "lark"]


class Spec(NamedTuple):
    """What an answer must match. text: a JSON schema, a regular expression, or a grammar in Lark's form."""

    kind: Kind
    text: str


class _Vocabulary:
    """The tokens as llguidance wants them. It makes no special token of text, so none gets into an answer."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int):
        tags = {i for mark in MARKERS if (i := tokenizer.id_of(mark)) is not None}
        unused = [b""] * (vocab_size - tokenizer.vocab_size)
        self.tokens = [*tokenizer.bytes_inside(range(tokenizer.vocab_size)), *unused]
        special = tokenizer.control_ids | tags | {*tokenizer.stop_ids}
        self.special_token_ids = sorted(special)
        self.eos_token_id, self.bos_token_id = tokenizer.stop_ids[0], None
        self._tokenizer = tokenizer
        self._ids = {raw: i for i, raw in enumerate(self.tokens) if i not in special}
        self._longest = max(map(len, self._ids))

    def __call__(self, raw: bytes) -> list[int]:
        """The tokens that the tokenizer writes these bytes in, inside a text; the longest ones where it changes them."""
        ids = self._tokenizer.encode(raw.decode("utf-8", "replace"))
        same = b"".join(self.tokens[i] for i in ids) == raw
        return ids if same else self._greedy(raw)

    def _greedy(self, raw: bytes) -> list[int]:
        ids, at = [], 0
        while at < len(raw):
            sizes = range(min(self._longest, len(raw) - at), 0, -1)
            size = next((n for n in sizes if raw[at : at + n] in self._ids), 0)
            ids += [self._ids[raw[at : at + size]]] if size else []
            at += size or 1  # a byte that no token has
        return ids


class Grammars:
    """Compiles what requests ask for, once for each `Spec`. Any thread may call it.

    Args:
        vocab_size: of the model, at least the tokenizer's.
        largest: items of a row of llguidance's parser. It bounds what a mask costs under an ambiguous grammar, which is
            quadratic in it.

    Raises ValueError: the tokenizer has no id that ends an answer.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, largest: int = 1000):
        require(bool(tokenizer.stop_ids), "the tokenizer has no id that ends an answer: constraints need one")
        vocabulary = _Vocabulary(tokenizer, vocab_size)
        self._vocabulary = llguidance.LLTokenizer(
            llguidance.TokenizerWrapper(vocabulary),
            eos_token=list(tokenizer.stop_ids),
            slices=llguidance.LLTokenizer.json_slices(),
        )
        self._ids = Ids(tokenizer, vocabulary.tokens)
        self._compiled: collections.OrderedDict[Spec, llguidance.LLMatcher] = collections.OrderedDict()
        self._lock = threading.Lock()
        self._limits = llguidance.LLParserLimits(max_items_in_row=largest, verbose_errors=False)

    def constraint(self, spec: Spec, thinking: Thinking = "none") -> "Constraint":
        """A new answer's; it begins after the reasoning. Raises ValueError for what cannot be compiled."""
        with self._lock:
            matcher = self._compiled.get(spec)
        if matcher is None:
            matcher = self._compile(spec)
        with self._lock:
            self._compiled[spec] = matcher
            self._compiled.move_to_end(spec)
            while len(self._compiled) > _CACHED:
                self._compiled.popitem(last=False)
            return Constraint(matcher.deep_copy(), self._ids, thinking)

    def _compile(self, spec: Spec) -> llguidance.LLMatcher:
        make = llguidance.LLMatcher
        _check_numbers(spec)
        try:
            if spec.kind == "json_schema":
                text = make.grammar_from_json_schema(spec.text, defaults=_JSON)
            else:
                text = (
                    make.grammar_from_regex(spec.text)
                    if spec.kind == "regex"
                    else make.grammar_from_lark(spec.text)
                )
            matcher = make(self._vocabulary, text, log_level=0, limits=self._limits)
            fits = matcher.is_error() or any(matcher.compute_bitmask())
            error = matcher.get_error() or ("" if fits else "nothing matches it")
        except ValueError as refused:
            error = str(refused)
        require(not error, f"{spec.kind} cannot be used: {_line(error)}")
        return matcher


def _check_numbers(spec: Spec) -> None:
    """Raises ValueError for numbers of a schema at which llguidance (1.9.1) crashes, and the process with it: integers that
    are, rounded to float64, the least of 64 bits, and whatever is below."""
    for number in () if spec.kind == "regex" else _NEGATIVE.findall(spec.text):
        require(
            float(number) > -(2.0**63),
            f"{spec.kind} cannot be used: {_line(number)} is -2^63 or below, once rounded",
        )


def _line(error: str) -> str:
    line = " ".join(error.split())
    return line if len(line) <= _LONGEST else f"{line[:_LONGEST]}..."


class Ids:
    """What constraints need of the tokens. Masks are uint32 [words], bit i % 32 of word i // 32.

    Attributes:
        tokens: the bytes of each id.
        end_ids, ends: they end an answer. others: all but those.
        think_id, think: the tag that opens the reasoning; None where it is no token.
        closers: ids whose text goes on after a ">".
    """

    def __init__(self, tokenizer: Tokenizer, tokens: Sequence[bytes]):
        self.words = (len(tokens) + 31) // 32
        self.tokens = tokens
        self.end_ids = frozenset(tokenizer.stop_ids)
        self.ends = self.mask(self.end_ids)
        self.others = self.mask(set(range(tokenizer.vocab_size)) - self.end_ids)
        self.think_id = tokenizer.id_of(THINK)
        self.think = self.mask([] if self.think_id is None else [self.think_id])
        self.closers = [i for i, raw in enumerate(tokens) if raw.partition(b">")[2].strip()]

    def mask(self, ids: Iterable[int]) -> np.ndarray:
        """A mask that nobody may write to."""
        bits = np.zeros(32 * self.words, np.uint8)
        bits[list(ids)] = 1
        words: np.ndarray = np.packbits(bits, bitorder="little").view("<u4")
        words.flags.writeable = False
        return words


class _Before(NamedTuple):
    """What a token changed: the state before it, and whether llguidance read it."""

    thinking: Thinking
    tail: bytes
    ended: bool
    matched: bool


class Constraint:
    """One answer's way through a grammar (`serving.request.Grammar`). One thread at a time may call it.

    While the answer reasons, everything may come but its end. Then what the grammar allows; ids that end the answer
    exactly where the grammar may stop, and nothing after them.
    """

    def __init__(self, matcher: llguidance.LLMatcher, ids: Ids, thinking: Thinking):
        self._matcher, self._ids = matcher, ids
        self._thinking, self._tail, self._ended = thinking, b"", False
        self._history: list[_Before] = []
        self.error: str | None = None

    def mask(self) -> np.ndarray:
        """See `serving.request.Grammar`. A grammar that gets too large, or that no token fits, ends the answer.

        Where the text that comes next is certain, of the ways to write it in tokens the tokenizer's own alone is allowed;
        `accept` takes the others, too.
        """
        if self._ended:
            return self._ids.ends
        if self._thinking == "open":
            return self._free()
        words = np.zeros(self._ids.words, np.uint32)
        self._matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
        words &= ~self._ids.ends
        if self._matcher.is_accepting():
            words |= self._ids.ends
        if self._may_open():
            words |= self._ids.think
        failed = _line(self._matcher.get_error()) or ("" if words.any() else "no token fits")
        if failed:
            self.error = f"the answer cannot keep to the form that was asked for: {failed}"
            return self._ids.ends
        return words

    def accept(self, token: int) -> bool:
        before = _Before(self._thinking, self._tail, self._ended, False)
        if not 0 <= token < len(self._ids.tokens):
            return False
        if self._may_open() and token == self._ids.think_id:
            self._thinking = "open"
        elif self._thinking == "open":
            if token in self._ids.end_ids or self._too_far(token):
                return False
            self._think(token)
        elif token in self._ids.end_ids:
            if not (self._ended or self.error or self._matcher.is_accepting()):
                return False
            self._ended = True
        elif self._ended or not self._matcher.try_consume_tokens([token]):
            return False
        else:
            before = before._replace(matched=True)
        self._history.append(before)
        return True

    def rollback(self, tokens: int) -> None:
        require(
            0 <= tokens <= len(self._history), f"{tokens} tokens cannot be taken back of {len(self._history)}"
        )
        undone = self._history[len(self._history) - tokens :]
        if undone:
            del self._history[-tokens:]
            self._thinking, self._tail, self._ended, _ = undone[0]
            self.error = None
            matched = sum(before.matched for before in undone)
            if matched:
                self._matcher.rollback(matched)

    def _may_open(self) -> bool:
        return self._thinking == "possible" and not self._history

    # --- while it reasons ------------------------------------------------------------------------------------------

    def _think(self, token: int) -> None:
        tail = self._tail + self._ids.tokens[token]
        if END_THINK.encode() in tail:
            self._thinking, tail = "none", b""
        self._tail = tail[-len(END_THINK) :]

    def _too_far(self, token: int) -> bool:
        """Whether the token closes the reasoning and goes on with text, which would be no part of the grammar's."""
        _, closed, rest = (self._tail + self._ids.tokens[token]).partition(END_THINK.encode())
        return bool(closed and rest.strip())

    def _free(self) -> np.ndarray:
        tag = END_THINK.encode()
        if not any(self._tail.endswith(tag[:n]) for n in range(1, len(tag))):
            return self._ids.others
        return self._ids.others & ~self._ids.mask(i for i in self._ids.closers if self._too_far(i))


def schema_text(schema: Any) -> str:
    """A JSON schema as a text that is the same for equal ones. Key order stays: answers have it."""
    return json.dumps(schema, ensure_ascii=False, separators=(",", ":"))
