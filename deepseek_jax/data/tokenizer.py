"""Byte-level BPE with DeepSeek's special tokens (report §4.1): trained on the corpus, or loaded.

The pre-tokenizer is the one DeepSeek-V3's tokenizer.json declares: digits in groups of up to three, runs of
Chinese and Japanese, then words, punctuation with the line breaks that follow it, and white space.

Documents are encoded with a copy that knows no special token: a page that quotes "<｜end▁of▁sentence｜>"
stays text, and cannot end a document or open a chat turn.
"""

import functools
import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers

SPECIAL_TOKENS = {
    "bos": "<｜begin▁of▁sentence｜>",
    "eos": "<｜end▁of▁sentence｜>",
    "pad": "<｜▁pad▁｜>",
    "fim_hole": "<｜fim▁hole｜>",
    "fim_begin": "<｜fim▁begin｜>",
    "fim_end": "<｜fim▁end｜>",
    "user": "<｜User｜>",
    "assistant": "<｜Assistant｜>",
}
MIN_VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)

_DIGITS = r"\p{N}{1,3}"
_CJK = "[一-龥぀-ゟ゠-ヿ]+"
_WORDS = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"""
    r"|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class Tokenizer:
    """Text to token ids and back.

    Attributes:
        vocab_size: number of ids, special tokens included.
        is_byte_level: every id stands for fixed bytes, so any text round-trips exactly.
        bos_id, eos_id, pad_id, fim_hole_id, fim_begin_id, fim_end_id, user_id, assistant_id: ids of
            DeepSeek's special tokens; ValueError when the tokenizer has none.
    """

    def __init__(self, backend: tokenizers.Tokenizer, special_tokens: dict[str, str] | None = None):
        spec = json.loads(backend.to_str())
        self._full = backend
        self._full.no_truncation()
        self._full.no_padding()
        self._special = SPECIAL_TOKENS | (special_tokens or {})
        self._added_ids = sorted(token["id"] for token in spec["added_tokens"])
        # Not `encode_special_tokens`: DeepSeek's FIM and chat tokens are added tokens not flagged special.
        plain = spec | {"added_tokens": [], "post_processor": None, "truncation": None, "padding": None}
        self._plain = tokenizers.Tokenizer.from_str(json.dumps(plain))
        self.vocab_size = max(backend.get_vocab(with_added_tokens=True).values()) + 1
        self.is_byte_level = _has_byte_level(spec["decoder"])

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Tokenizer":
        """Loads a `tokenizer.json`, or a folder that holds one.

        From a folder, bos, eos and pad of another family are taken from `tokenizer_config.json`.

        Raises:
            ValueError: there is no such file, or it is no tokenizer.
        """
        given = Path(path).expanduser()
        file = given / "tokenizer.json" if given.is_dir() else given
        if not file.is_file():
            raise ValueError(f"no tokenizer at {file}: give a tokenizer.json or a folder that holds one")
        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the Rust side raises bare Exception
            raise ValueError(f"{file} is not a tokenizer.json: {error}") from error
        return cls(backend, _configured_special_tokens(file.parent / "tokenizer_config.json", backend))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a tokenizer.json, whole or not at all."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=target.name + ".")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(self._full.to_str())
        os.replace(temporary, target)

    def encode(self, text: str, allow_special: bool = False) -> list[int]:
        """Ids of `text`. Names of special tokens are plain text unless `allow_special` (prompts)."""
        backend = self._full if allow_special else self._plain
        return backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, encoded in parallel as plain text."""
        return [encoding.ids for encoding in self._plain.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: Sequence[int] | np.ndarray, skip_special: bool = False) -> str:
        """Text of `ids`; an incomplete UTF-8 sequence becomes U+FFFD. See `StreamDecoder` for streaming."""
        return self._full.decode([int(i) for i in ids], skip_special_tokens=skip_special)

    def decode_batch(self, batch: Sequence[Sequence[int]]) -> list[str]:
        return self._full.decode_batch([list(ids) for ids in batch], skip_special_tokens=False)

    def token(self, token_id: int) -> str:
        """Text of one id on its own."""
        return self.decode([token_id])

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hash of everything that decides how text becomes ids."""
        described = self._full.to_str() + json.dumps(self._special, sort_keys=True)
        return hashlib.sha256(described.encode()).hexdigest()[:16]

    def byte_lengths(self) -> np.ndarray:
        """int32[vocab_size]: UTF-8 bytes of text each id stands for; 0 for added tokens and unused ids."""
        lengths_v = np.zeros(self.vocab_size, np.int32)
        for token, token_id in self._full.get_vocab(with_added_tokens=True).items():
            # The byte-level alphabet writes one character per byte.
            lengths_v[token_id] = len(token) if self.is_byte_level else len(self.token(token_id).encode())
        lengths_v[self._added_ids] = 0
        return lengths_v

    def special_id(self, name: str) -> int:
        """Id of a special token by its short name, a key of `SPECIAL_TOKENS`.

        Raises:
            ValueError: the tokenizer has no such token.
        """
        token_id = self._full.token_to_id(self._special[name])
        if token_id is None:
            raise ValueError(
                f"the tokenizer has no {name} token ({self._special[name]!r}): switch off what needs it "
                "(FIM: fim_rate=0), or use a tokenizer with DeepSeek's special tokens"
            )
        return token_id

    bos_id = property(lambda self: self.special_id("bos"))
    eos_id = property(lambda self: self.special_id("eos"))
    pad_id = property(lambda self: self.special_id("pad"))
    fim_hole_id = property(lambda self: self.special_id("fim_hole"))
    fim_begin_id = property(lambda self: self.special_id("fim_begin"))
    fim_end_id = property(lambda self: self.special_id("fim_end"))
    user_id = property(lambda self: self.special_id("user"))
    assistant_id = property(lambda self: self.special_id("assistant"))


class StreamDecoder:
    """Decodes ids one at a time; a character split over several ids comes out once, when it is whole."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._emitted = 0

    def push(self, token_id: int) -> str:
        """The text that `token_id` completes, often "" inside a multi-byte character."""
        self._ids.append(int(token_id))
        text = self._tokenizer.decode(self._ids)
        whole = len(text.rstrip("\ufffd"))
        new, self._emitted = text[self._emitted : whole], max(self._emitted, whole)
        if whole == len(text) and self._tokenizer.is_byte_level:
            self._ids, self._emitted = [], 0  # nothing pending: later ids do not depend on these
        return new

    def flush(self) -> str:
        """What is left at the end: U+FFFD for a character that never became whole."""
        text = self._tokenizer.decode(self._ids)[self._emitted :]
        self._ids, self._emitted = [], 0
        return text


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Trains byte-level BPE; the same texts and size give the same tokenizer.

    Args:
        texts: the documents; a corpus too small for `vocab_size` merges gives fewer ids.
        vocab_size: ids in all; bos, eos and pad are 0, 1 and 2, as in DeepSeek's.

    Raises:
        ValueError: `vocab_size` leaves no room for the 256 bytes and the special tokens.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise ValueError(
            f"vocab_size {vocab_size} is too small: 256 bytes and {len(SPECIAL_TOKENS)} special tokens "
            f"need at least {MIN_VOCAB_SIZE}"
        )
    backend = tokenizers.Tokenizer(models.BPE())
    splits = [pre_tokenizers.Split(Regex(p), behavior="isolated") for p in (_DIGITS, _CJK, _WORDS)]
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, to_bytes])
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[
            AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS.values()
        ],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return Tokenizer(backend)


def _has_byte_level(decoder: dict | None) -> bool:
    if decoder is None:
        return False
    return decoder["type"] == "ByteLevel" or any(_has_byte_level(d) for d in decoder.get("decoders", []))


def _configured_special_tokens(config_file: Path, backend: tokenizers.Tokenizer) -> dict[str, str]:
    """Names of bos, eos and pad in another family's tokenizer_config.json, where DeepSeek's are absent."""
    if not config_file.is_file():
        return {}
    config = json.loads(config_file.read_text(encoding="utf-8"))
    found = {}
    for name in ("bos", "eos", "pad"):
        token = config.get(f"{name}_token")
        token = token.get("content") if isinstance(token, dict) else token
        if backend.token_to_id(SPECIAL_TOKENS[name]) is None and token:
            found[name] = token
    return found
