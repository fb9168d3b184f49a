"""Tokenizers of the kinds that there are, as folders in the Hugging Face format, made here from a few texts."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from deepseek_jax.data import byte_level

TEXTS = [
    "def read(self):\n    return self.text  # the keys and the values\n\n\nclass Keys:\n    pass\n",
    'The cat that killed the rat that ate the malt, 12345 times: 日本語 and é, ü. "Who?"\n',
    "  two  spaces\tand a tab \r\n of the <think> of it </think> TOOL",
]

LLAMA_3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CHATML = """{%- if tools %}<|im_start|>system
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}{{ '<|im_end|>\n' }}{% endif %}
{%- for m in messages %}
{{- '<|im_start|>' + m.role + '\n' }}
{%- if m.role == 'assistant' %}{% generation %}{{ m.content }}
{%- for call in m.tool_calls %}{{ '<tool_call>' + (call.function | tojson) + '</tool_call>' }}{% endfor %}
{{- '<|im_end|>' }}{% endgeneration %}{{ '\n' }}
{%- else %}{{ m.content + '<|im_end|>\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"""


def _trained(model: Any, trainer: Any, **parts: Any) -> Tokenizer:
    backend = Tokenizer(model)
    for name, part in parts.items():
        setattr(backend, name, part)
    backend.train_from_iterator(TEXTS * 3, trainer)
    return backend


def _bpe(size: int, special: list[str], alphabet: list[str] = (), **kwargs: Any) -> trainers.BpeTrainer:
    return trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=special,
        initial_alphabet=list(alphabet),
        show_progress=False,
        **kwargs,
    )


def _bos_first(backend: Tokenizer, bos: str) -> None:
    backend.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, backend.token_to_id(bos))]
    )


def _in_one_pattern(pattern: str) -> pre_tokenizers.PreTokenizer:
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), to_bytes])


def _byte_level(special: list[str], pre: pre_tokenizers.PreTokenizer) -> Tokenizer:
    trainer = _bpe(340, special, pre_tokenizers.ByteLevel.alphabet())
    return _trained(models.BPE(), trainer, pre_tokenizer=pre, decoder=decoders.ByteLevel())


def chat_model(folder: Path) -> None:
    """Byte-level, as GPT-2: two stops of which the tokenizer names one, no bos, ordinary added tokens, a template."""
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    backend = _byte_level(names, pre_tokenizers.ByteLevel(add_prefix_space=False))
    backend.add_tokens(["<think>", "</think>"])
    _write(folder, backend, {"bos_token": None, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"})
    ids = [backend.token_to_id("<|im_end|>"), backend.token_to_id("<|endoftext|>")]
    _json(folder / "generation_config.json", {"eos_token_id": ids, "temperature": 0.7})
    (folder / "chat_template.jinja").write_text(CHATML, encoding="utf-8")


def bos_model(folder: Path) -> None:
    """Byte-level, as Llama 3: the post-processor writes the bos; the list of added tokens is in the config."""
    backend = _byte_level(["<|begin_of_text|>", "<|end_of_text|>"], _in_one_pattern(LLAMA_3))
    _bos_first(backend, "<|begin_of_text|>")
    size = backend.get_vocab_size()
    listed = {
        str(size): {"content": "<|eot_id|>", "special": True, "normalized": False},
        str(size + 1): {"content": "[keys]", "special": False},
    }
    named = {
        "bos_token": "<|begin_of_text|>",
        "eos_token": "<|eot_id|>",
        "clean_up_tokenization_spaces": False,
    }
    _write(
        folder,
        backend,
        {**named, "added_tokens_decoder": listed, "chat_template": "{{ bos_token }}{{ messages }}"},
    )


def metaspace(folder: Path) -> None:
    """As Llama 2: Metaspace with byte tokens, bos from the post-processor, special tokens in the old file."""
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    backend = _trained(
        models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True),
        _bpe(600, ["<unk>", "<s>", "</s>", *bytes_]),
        pre_tokenizer=pre_tokenizers.Metaspace(prepend_scheme="first", split=False),
        decoder=decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        ),
    )
    spec = json.loads(backend.to_str())
    spec["added_tokens"] = [t for t in spec["added_tokens"] if t["content"] not in bytes_]
    backend = Tokenizer.from_str(json.dumps(spec))
    backend.add_tokens([AddedToken("<think>", normalized=False)])
    _bos_first(backend, "<s>")
    _write(folder, backend, {"add_bos_token": True, "model_max_length": 10**30})
    _json(
        folder / "special_tokens_map.json",
        {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "unk_token": "<unk>"},
    )


def metaspace_words(folder: Path) -> None:
    """Metaspace that ends words before spaces and puts one before each part between added tokens, too."""
    unigram = trainers.UnigramTrainer(
        vocab_size=120, special_tokens=["<unk>", "</s>"], unk_token="<unk>", show_progress=False
    )
    pre = pre_tokenizers.Metaspace(prepend_scheme="always")
    backend = _trained(models.Unigram(), unigram, pre_tokenizer=pre, decoder=decoders.Metaspace())
    backend.add_tokens(["<think>", "TOOL"])
    _write(folder, backend, {"eos_token": "</s>"})


def llama_2(folder: Path) -> None:
    """Metaspace over whole texts, with a vocabulary in which no token has a space inside."""
    metaspace(folder)
    spec = json.loads((folder / "tokenizer.json").read_text())
    model = spec["model"]
    inside = {token for token in model["vocab"] if re.search("[^▁]▁", token)}
    model["merges"] = [merge for merge in model["merges"] if not inside & {*merge, "".join(merge)}]
    unused = iter(range(10**6))
    model["vocab"] = {f"unused{next(unused)}" if t in inside else t: i for t, i in model["vocab"].items()}
    _json(folder / "tokenizer.json", spec)


def sentencepiece(folder: Path) -> None:
    """As the older Llama files: spaces by a normalizer, pieces by Unigram; the eos is no added token."""
    unigram = trainers.UnigramTrainer(
        vocab_size=120, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False
    )
    backend = _trained(
        models.Unigram(),
        unigram,
        normalizer=normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
        decoder=decoders.Metaspace(),
    )
    backend.add_tokens(["TOOL"])
    _write(
        folder, backend, {"eos_token": "</s>", "extra_special_tokens": ["<|call|>"], "image_token": "<img>"}
    )
    _json(folder / "config.json", {"model_type": "deepseek_v3", "eos_token_id": 5})


def deepseek_v2(folder: Path) -> None:
    """As DeepSeek-V2: byte-level after a split of line breaks."""
    splits = [(r"[\r\n]", "isolated"), (r"\s?\p{L}+", "isolated"), (r"\s?\p{P}+", "isolated")]
    steps = [pre_tokenizers.Split(Regex(pattern), behavior) for pattern, behavior in splits]
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    names = ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"]
    backend = _trained(
        models.BPE(),
        _bpe(340, names, pre_tokenizers.ByteLevel.alphabet()),
        pre_tokenizer=pre_tokenizers.Sequence(
            [*steps, pre_tokenizers.Digits(individual_digits=True), to_bytes]
        ),
        decoder=decoders.ByteLevel(),
    )
    backend.add_tokens(["<think>", "<｜User｜>"])
    _bos_first(backend, names[0])
    tokens = {"bos_token": names[0], "eos_token": "<|EOT|>"}  # not the token of DeepSeek's name
    _write(folder, backend, tokens | {"additional_special_tokens": ["<|EOT|>"]})


def deepseek_v3(folder: Path) -> None:
    """With the pre-tokenizer of the tokenizers that we train; a tokenizer_config.json that names nothing."""
    _write(folder, _byte_level(["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"], byte_level.words()), {})


def qwen(folder: Path) -> None:
    """Llama 3's pattern with single digits; several templates by name."""
    backend = _byte_level(["<|endoftext|>"], _in_one_pattern(LLAMA_3.replace("{1,3}", "")))
    backend.add_tokens(["<think>", "TOOL"])
    _write(
        folder,
        backend,
        {"eos_token": "<|endoftext|>", "chat_template": [{"name": "default", "template": CHATML}]},
    )


_MAKERS = (
    *(chat_model, bos_model, metaspace, metaspace_words, llama_2, sentencepiece, qwen),
    *(deepseek_v2, deepseek_v3),
)
FAMILY: dict[str, Callable[[Path], None]] = {maker.__name__: maker for maker in _MAKERS}


def make(name: str, folder: Path) -> Path:
    folder.mkdir(parents=True)
    FAMILY[name](folder)
    return folder


def _write(folder: Path, backend: Tokenizer, config: dict[str, Any]) -> None:
    backend.save(str(folder / "tokenizer.json"))
    _json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"} | config)


def _json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")
