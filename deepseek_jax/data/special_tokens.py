"""Which tokens are special, by the rules of `transformers`: named ones, added ones, and those that end a generation.

tokenizer.json lists added tokens. tokenizer_config.json names some of them (`bos_token`, `eos_token`, ...), may add
others and change their flags; older folders do so in special_tokens_map.json and added_tokens.json.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any

import tokenizers
from tokenizers import AddedToken

from deepseek_jax.checks import require, shown
from deepseek_jax.data.text_files import ADDED, CONFIG, GENERATION, SPECIAL_MAP, Files, to_object

# DeepSeek's, by the names that we call them.
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
# `transformers`' names.
_NAMES = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
_FULL_WIDTH_BARS = re.compile("<｜.+｜>", re.DOTALL)


# A name, or a name with flags.
Token = str | AddedToken


@dataclasses.dataclass(frozen=True)
class Declared:
    """Special tokens that the files beside tokenizer.json declare.

    Attributes:
        named: by `transformers`' names, "bos_token" and so on; None where a file says so.
        extra: further special tokens, without names.
        by_id: added tokens.
        replaces: these stand for those of tokenizer.json, else beside them.
        as_text: special tokens are never matched in a text (`split_special_tokens`).
    """

    named: dict[str, Token | None]
    extra: tuple[Token, ...]
    by_id: dict[int, AddedToken]
    replaces: bool
    as_text: bool

    @property
    def names(self) -> dict[str, str]:
        """Named tokens that there are, as templates see them."""
        return {name: str(token) for name, token in self.named.items() if token is not None}


def declared(files: Files) -> Declared:
    """Reads the files. Raises ValueError for one that is not what it should be, and names it."""
    config = to_object(files, CONFIG)
    if "added_tokens_decoder" not in config:
        config |= to_object(files, SPECIAL_MAP)
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    if isinstance(extra, dict):
        config |= extra
        extra = []
    require(isinstance(extra, list), f"{CONFIG}: extra_special_tokens={shown(extra)} is not a list of tokens")
    given = [name for name in config if name.endswith("_token") and _is_token(config[name])]
    order = [*(name for name in _NAMES if name in config), *(name for name in given if name not in _NAMES)]
    extras = tuple(_token(token, "extra_special_tokens") for token in extra)
    named = {name: None if config[name] is None else _token(config[name], name) for name in order}
    special = {str(token) for token in (*(named.get(name) for name in _NAMES), *extras) if token is not None}
    by_id = _by_id(config, files, special)
    as_text = config.get("split_special_tokens") is True
    return Declared(named, extras, by_id, "added_tokens_decoder" in config, as_text)


def _is_token(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, dict) and isinstance(value.get("content"), str))


def _token(value: Any, name: str) -> Token:
    require(_is_token(value), f"{CONFIG}: {name}={shown(value)} is not a token")
    return value if isinstance(value, str) else _with_flags(value)


def _with_flags(value: Mapping[str, Any]) -> AddedToken:
    names = ("single_word", "lstrip", "rstrip", "normalized", "special")
    return AddedToken(value["content"], **{name: bool(value[name]) for name in names if name in value})


def _by_id(config: Mapping[str, Any], files: Files, special: set[str]) -> dict[int, AddedToken]:
    if "added_tokens_decoder" in config:
        listed = config["added_tokens_decoder"]
        if not isinstance(listed, dict) or not all(key.isdecimal() for key in listed):
            raise ValueError(f"{CONFIG}: added_tokens_decoder is not an object of tokens by id")
        for key, token in listed.items():
            if not isinstance(token, dict) or not _is_token(token):
                raise ValueError(f"{CONFIG}: added_tokens_decoder.{key}={shown(token)} is not a token")
        return {int(key): _with_flags(token) for key, token in listed.items()}
    ids = to_object(files, ADDED)
    require(all(isinstance(i, int) for i in ids.values()), f"{ADDED} is not an object of ids by token")
    return {
        i: AddedToken(text, normalized=text not in special, special=text in special)
        for text, i in ids.items()
    }


def add_to(backend: tokenizers.Tokenizer, said: Declared) -> None:
    """Adds to the vocabulary what it lacks: listed tokens first, then named and further special ones."""
    present = backend.get_added_tokens_decoder()
    listed = said.by_id if said.replaces else said.by_id | present
    new: list[Token] = [listed[i] for i in sorted(listed)]
    known = {str(token) for token in (*present.values(), *new)}
    for token in (*said.named.values(), *said.extra):
        if token is not None and str(token) not in known and token not in new:
            new.append(token)
    names = said.names.values()
    tokens = [AddedToken(token, special=True) if isinstance(token, str) else token for token in new]
    for token in tokens:
        token.special = token.special or token.content in names
    backend.add_tokens(tokens)
    backend.encode_special_tokens = said.as_text


def control_tokens(added: Iterable[Mapping[str, Any]], always: set[str]) -> set[str]:
    """Which of the added tokens of a tokenizer.json (dicts) must not come out of a document's text.

    Those flagged special, those in `always`, and those in the full-width bars of DeepSeek's turns and tools, which
    its tokenizer does not flag. The rest ("<think>") is ordinary text that has an id of its own.
    """
    return {
        token["content"]
        for token in added
        if token["special"] or token["content"] in always or _FULL_WIDTH_BARS.fullmatch(token["content"])
    }


def without_control(spec: Mapping[str, Any], control: set[str]) -> dict[str, Any]:
    """The tokenizer.json of a tokenizer with the same ids, which makes no control token of a text.

    They are flagged special, for `encode_special_tokens`, and the model, which may know them as words or pieces, knows
    them by names that are in no text: neither byte-level nor with a mark for spaces.
    """
    model = dict(spec["model"])
    # The model itself refers to these.
    kept = {model.get("unk_token")} | {f"<0x{byte:02X}>" for byte in range(256) if model.get("byte_fallback")}
    hidden = {token: f"\U0010ffff {token}" for token in control - kept}
    vocab = model["vocab"]
    if isinstance(vocab, dict):
        model["vocab"] = {hidden.get(token, token): i for token, i in vocab.items()}
    else:
        model["vocab"] = [[hidden.get(token, token), score] for token, score in vocab]
    if "merges" in model:
        pairs = (tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model["merges"])
        model["merges"] = [pair for pair in pairs if not hidden.keys() & {*pair, "".join(pair)}]
    added = [
        token
        | {"content": hidden.get(token["content"], token["content"]), "special": token["content"] in control}
        for token in spec["added_tokens"]
    ]
    return {**spec, "model": model, "added_tokens": added, "post_processor": None}


def stop_ids(files: Files, config: Mapping[str, Any], eos: int | None) -> tuple[int, ...]:
    """The ids that end a generation.

    The eos list of generation_config.json, as in `transformers`; without one, `eos` of the tokenizer and that of the
    model's config.json. Raises ValueError: no ids.
    """
    listed = _ids(to_object(files, GENERATION), GENERATION)
    if listed:
        return listed
    return tuple(dict.fromkeys([*(() if eos is None else (eos,)), *_ids(config, "config.json")]))


def _ids(config: Mapping[str, Any], where: str) -> tuple[int, ...]:
    value = config.get("eos_token_id")
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) and 0 <= i < 1 << 31 for i in ids):
        raise ValueError(f"{where}: eos_token_id={shown(value)} is neither an id nor a list of ids")
    return tuple(dict.fromkeys(ids))
