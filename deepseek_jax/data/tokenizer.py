"""`Tokenizer` turns text into ids and back, and knows the special tokens, the stops and the chat template.

It is trained on the corpus (bpe_training.py) or loaded from a folder, whose files are read by the rules of
`transformers` (special_tokens.py).

Documents are encoded with a copy that matches no control token (`special_tokens.control_tokens`): a page that quotes
"<｜end▁of▁sentence｜>" stays text, and cannot end a document or open a chat turn. Ordinary added tokens are matched in
documents as in prompts.
"""

import functools
import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from deepseek_jax.checks import named, path_of, require
from deepseek_jax.data import byte_level, cuts, special_tokens, text_files
from deepseek_jax.data.chat import DEFAULT_TEMPLATE, ChatTemplate
from deepseek_jax.data.special_tokens import SPECIAL_TOKENS
from deepseek_jax.json_files import read_object

_BYTE_TOKEN = re.compile("<0x([0-9A-F]{2})>")


class Tokenizer:
    """Text to token ids and back.

    Args:
        backend: as tokenizer.json holds it; changed to what the files say.
        files: the text files of its folder (`text_files.read`), kept for `save`.
        config: the model's config.json, for its eos.

    Attributes:
        vocab_size: number of ids, special tokens included.
        is_byte_level: every id stands for fixed bytes, so any text round-trips exactly.
        names: the named special tokens that there are, as `transformers` names them ("bos_token").
        stop_ids: the ids that end a generation.
        control_ids: the ids that no document has (see above).
        cuts: where a text may be cut so that the pieces have the ids of the whole (cuts.py); None: nowhere.
        bos_id, eos_id, pad_id, fim_hole_id, fim_begin_id, fim_end_id, user_id, assistant_id: ids of special tokens;
            ValueError when the tokenizer has none.

    Raises:
        ValueError: a file that is not what it should be.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        files: text_files.Files | None = None,
        config: Mapping[str, Any] | None = None,
    ):
        backend.no_truncation()
        backend.no_padding()
        self._files = dict(files or {})
        said = special_tokens.declared(self._files)
        special_tokens.add_to(backend, said)
        self._full = backend
        self._special = _special_names(backend, said)
        own = {f"{name}_token": self._special.get(name) for name in ("bos", "eos", "pad")}
        own_names = {name: token for name, token in own.items() if token is not None}
        self.names = said.names if said.named or text_files.CONFIG in self._files else own_names
        self.stop_ids = special_tokens.stop_ids(self._files, config or {}, self._id("eos"))

        spec = json.loads(backend.to_str())
        self._skipped = frozenset(token["id"] for token in spec["added_tokens"] if token["special"])
        stops = (backend.id_to_token(i) or "" for i in self.stop_ids)
        always = {*SPECIAL_TOKENS.values(), *self.names.values(), *stops}
        control = special_tokens.control_tokens(spec["added_tokens"], always)
        self.control_ids = frozenset(t["id"] for t in spec["added_tokens"] if t["content"] in control)
        self._ordinary = [token for token in spec["added_tokens"] if token["content"] not in control]
        self._plain = tokenizers.Tokenizer.from_str(json.dumps(special_tokens.without_control(spec, control)))
        self._plain.encode_special_tokens = True
        self.vocab_size = max(backend.get_vocab(with_added_tokens=True).values()) + 1
        self.is_byte_level = _has_decoder(spec["decoder"], "ByteLevel")
        self._has_byte_tokens = _has_decoder(spec["decoder"], "ByteFallback")
        self.cuts = cuts.place(spec, self._ordinary)

    @classmethod
    def load(cls, path: str | os.PathLike[str], config: Mapping[str, Any] | None = None) -> "Tokenizer":
        """Loads a `tokenizer.json` with the files beside it, or a folder that holds them.

        Args:
            config: the model's config.json; default: the one of the folder, if there is one.

        Raises:
            ValueError: there is no such file, or one of them is not what it should be.
        """
        given = path_of(path, "path")
        file = given / text_files.TOKENIZER if given.is_dir() else given
        require(file.is_file(), f"no tokenizer at {file}: give a tokenizer.json or a folder that holds one")
        beside = file.name == text_files.TOKENIZER
        files = text_files.read(file.parent) if beside else {text_files.TOKENIZER: file.read_bytes()}
        if config is None and beside and (file.parent / "config.json").is_file():
            config = read_object(file.parent / "config.json")
        try:
            backend = tokenizers.Tokenizer.from_buffer(files[text_files.TOKENIZER])
        except Exception as error:  # the Rust side raises bare Exception
            raise ValueError(f"{file} is not a tokenizer.json: {error}") from error
        with named(f"{file.parent}: "):
            return cls(backend, files, config)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes all its files into a folder, or tokenizer.json alone to a file named *.json.

        Files that it came with are written as they came. tokenizer_config.json, with the turns of a chat, and
        generation_config.json, with the stops, are made where there were none.
        """
        target = Path(path)
        files = {text_files.TOKENIZER: self._full.to_str().encode()} | self._files
        if target.suffix == ".json" and not target.is_dir():
            text_files.write_file(target, files[text_files.TOKENIZER])
            return
        made = {text_files.CONFIG: self._config(), text_files.GENERATION: self.generation_ids()}
        made_files = {name: text_files.from_object(value) for name, value in made.items()}
        text_files.write(target, made_files | files)

    def _config(self) -> dict[str, Any]:
        """A tokenizer_config.json for a tokenizer that came without one."""
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        own = self._has_turns and not text_files.has_template(self._files)
        return config | self.names | ({"chat_template": DEFAULT_TEMPLATE} if own else {})

    def generation_ids(self) -> dict[str, Any]:
        """Returns bos, eos (all stops) and pad for generation_config.json and config.json; None for a missing one."""
        found = {f"{name}_token_id": self._id(name) for name in ("bos", "pad")}
        stops = list(self.stop_ids)
        return found | {"eos_token_id": (stops[0] if len(stops) == 1 else stops) if stops else None}

    # --- text to ids --------------------------------------------------------------------------------------

    def encode(self, text: str, allow_special: bool = False) -> list[int]:
        """Ids of `text` alone. Control tokens are plain text unless `allow_special` (a rendered chat)."""
        backend = self._full if allow_special else self._plain
        return backend.encode(text, add_special_tokens=False).ids

    def encode_batch(
        self, texts: Sequence[str], allow_special: bool = False, bos: bool = False
    ) -> list[list[int]]:
        """Ids of each text, encoded in parallel, as `encode` does; `bos`: as `encode_prompt` does."""
        backend = self._full if allow_special or bos else self._plain
        return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=bos)]

    def encode_prompt(self, text: str) -> list[int]:
        """Ids of a text to continue, special tokens matched, with the bos if the tokenizer puts one before texts."""
        return self._full.encode(text, add_special_tokens=True).ids

    def encode_chat(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, **options: Any
    ) -> list[int]:
        """Ids of a conversation's prompt; for the arguments and errors see `ChatTemplate.render`."""
        return self.encode(
            self.chat_template.render(messages, add_generation_prompt, **options), allow_special=True
        )

    def encode_turns(
        self, messages: Sequence[Mapping[str, Any]], **options: Any
    ) -> tuple[list[int], list[bool]]:
        """(ids, which of them the assistant said) of a conversation, by the template's {% generation %} blocks."""
        text, spans = self.chat_template.render_spans(messages, **options)
        encoding = self._full.encode(text, add_special_tokens=False)
        said = [any(begin < end and first < stop for begin, stop in spans) for first, end in encoding.offsets]
        return encoding.ids, said

    @functools.cached_property
    def chat_template(self) -> ChatTemplate:
        """The chat template of the tokenizer's files, else DeepSeek's if the vocabulary has its turns.

        Raises ValueError: neither, or a template that is no text.
        """
        templates = text_files.templates(self._files)
        if not self.has_chat_template:
            raise ValueError("the tokenizer has no chat template: put a chat_template.jinja beside it")
        return ChatTemplate(templates or DEFAULT_TEMPLATE, self.names)

    @property
    def has_chat_template(self) -> bool:
        return bool(text_files.templates(self._files)) or self._has_turns

    @property
    def _has_turns(self) -> bool:
        return "user" in self._special and "assistant" in self._special

    # --- ids to text --------------------------------------------------------------------------------------

    def decode(self, ids: Sequence[int] | np.ndarray, skip_special: bool = False) -> str:
        """Text of `ids`; an incomplete UTF-8 sequence becomes U+FFFD. See `StreamDecoder` for streaming."""
        return self._full.decode([int(i) for i in ids], skip_special_tokens=skip_special)

    def decode_batch(self, batch: Sequence[Sequence[int]]) -> list[str]:
        return self._full.decode_batch([list(ids) for ids in batch], skip_special_tokens=False)

    def token(self, token_id: int) -> str:
        """Text of one id on its own."""
        return self.decode([token_id])

    def text_after(
        self, before: Sequence[int], ids: Sequence[int] | np.ndarray, skip_special: bool = False
    ) -> str:
        """Returns the text that `ids` add to the ids before them: a word inside the text keeps its leading space."""
        if self.is_byte_level or not len(before):
            return self.decode(ids, skip_special)
        return self.decode([*before, *ids], skip_special)[len(self.decode(before, skip_special)) :]

    def token_bytes(self, token_id: int) -> bytes | None:
        """The bytes that an id stands for wherever it is; None if it stands for text that depends on its place."""
        token = self._full.id_to_token(token_id)
        if token is None:  # unused
            return b""
        if self.is_byte_level:
            return byte_level.token_bytes(token)
        byte = _BYTE_TOKEN.fullmatch(token) if self._has_byte_tokens else None
        return bytes.fromhex(byte[1]) if byte else None

    def bytes_inside(self, ids: Iterable[int]) -> list[bytes]:
        """The bytes that each id stands for inside a text, not at its beginning."""
        raw = {i: self.token_bytes(i) for i in ids}
        in_place = [i for i, x in raw.items() if x is None]
        if in_place:  # after some other text, so that no decoder takes them for the first
            texts = self.decode_batch([[self._word, i] for i in in_place])
            start = len(self.token(self._word))
            raw |= {i: text[start:].encode() for i, text in zip(in_place, texts, strict=True)}
        return [x or b"" for x in raw.values()]

    @functools.cached_property
    def _word(self) -> int:
        in_place = [i for i in range(self.vocab_size) if self.token_bytes(i) is None]
        return next((i for i in in_place if self.token(i).isalpha()), in_place[0])

    def byte_lengths(self) -> np.ndarray:
        """int32[vocab_size]: UTF-8 bytes of text each id stands for; 0 for control tokens and unused ids."""
        lengths_v = np.array([len(x) for x in self.bytes_inside(range(self.vocab_size))], np.int32)
        lengths_v[list(self.control_ids)] = 0
        return lengths_v

    # --- special tokens -----------------------------------------------------------------------------------

    def is_special(self, token_id: int) -> bool:
        """Whether `decode` leaves the id out with `skip_special`."""
        return token_id in self._skipped

    def id_of(self, token: str) -> int | None:
        """Id of a token by its own text, as the vocabulary writes it; None if there is none."""
        return self._full.token_to_id(token)

    def special_id(self, name: str) -> int:
        """Id of a special token by its short name, a key of `SPECIAL_TOKENS`.

        Raises:
            ValueError: the tokenizer has no such token.
        """
        token_id = self._id(name)
        if token_id is None:
            raise ValueError(
                f"the tokenizer has no {name} token ({SPECIAL_TOKENS[name]!r}): name one in tokenizer_config.json, "
                "switch off what needs it (FIM: fim_rate=0), or use a tokenizer with DeepSeek's special tokens"
            )
        return token_id

    def _id(self, name: str) -> int | None:
        return self._full.token_to_id(self._special[name]) if name in self._special else None

    bos_id = property(lambda self: self.special_id("bos"))
    eos_id = property(lambda self: self.special_id("eos"))
    pad_id = property(lambda self: self.special_id("pad"))
    fim_hole_id = property(lambda self: self.special_id("fim_hole"))
    fim_begin_id = property(lambda self: self.special_id("fim_begin"))
    fim_end_id = property(lambda self: self.special_id("fim_end"))
    user_id = property(lambda self: self.special_id("user"))
    assistant_id = property(lambda self: self.special_id("assistant"))

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hash of everything that decides how a document becomes ids."""
        described = self._full.to_str() + json.dumps(SPECIAL_TOKENS | self._special, sort_keys=True)
        if self._ordinary or self.cuts is not cuts.LINES:  # once, none were matched, and all was cut at lines
            described += json.dumps(["cut", *(token["content"] for token in self._ordinary)])
        return hashlib.sha256(described.encode()).hexdigest()[:16]


def _special_names(backend: tokenizers.Tokenizer, said: special_tokens.Declared) -> dict[str, str]:
    """Special tokens by short name: those that the files name, else DeepSeek's where the vocabulary has them."""
    found = {name: token for name, token in SPECIAL_TOKENS.items() if backend.token_to_id(token) is not None}
    for name in SPECIAL_TOKENS:
        if f"{name}_token" in said.named:
            token = said.named[f"{name}_token"]
            found.pop(name, None)
            found |= {} if token is None else {name: str(token)}
    return found


def _has_decoder(decoder: dict | None, kind: str) -> bool:
    if decoder is None:
        return False
    return decoder["type"] == kind or any(_has_decoder(d, kind) for d in decoder.get("decoders", []))
