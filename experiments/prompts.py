"""Reads prompts from files and writes completions as JSON lines."""

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Record = dict[str, Any]


def read_prompts(path: str) -> list[Record]:
    """Reads a record for each prompt, as it is to be written again.

    A .jsonl file has an object on each line, with "prompt" (text, or token ids) or "messages" (a conversation), and any
    other keys. Any other file is text, with one prompt on each line. Empty lines are left out.

    Raises:
        ValueError: no prompt, or a line that is none; names the file and the line.
    """
    raw = Path(path).read_bytes()
    lines = ((f"{path}, line {i}", line) for i, line in enumerate(raw.splitlines(), start=1) if line.strip())
    records = [_json(line, where) if path.endswith(".jsonl") else _text(line, where) for where, line in lines]
    if not records:
        raise ValueError(f"{path} holds no prompts")
    return records


def _text(line: bytes, where: str) -> Record:
    try:
        return {"prompt": line.decode("utf-8")}
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} is not UTF-8 text: {error}") from error


def _json(line: bytes, where: str) -> Record:
    from deepseek_jax.json_files import parse_object

    record = parse_object(line, where)
    prompt, messages = record.get("prompt"), record.get("messages")
    if (prompt is None) == (messages is None):
        raise ValueError(f'{where} needs one of "prompt" and "messages", and has {sorted(record)}')
    ids = isinstance(prompt, list) and all(type(x) is int for x in prompt)
    if prompt is not None and not (isinstance(prompt, str) or ids):
        raise ValueError(f'{where}: "prompt" must be text or a list of token ids')
    if messages is not None and not (
        isinstance(messages, list) and all(isinstance(m, dict) for m in messages)
    ):
        raise ValueError(f'{where}: "messages" must be a list of objects with "role" and "content"')
    return record


def for_model(model: Any, records: list[Record], max_new_tokens: int) -> list[Any]:
    """Returns each record's prompt as `Model.generate` takes it: text, or ids. Raises ValueError that names the first one
    which does not fit the model."""
    positions, found = model.config.max_position_embeddings, []
    for i, record in enumerate(records, start=1):
        try:
            ids = _ids(model, record)
        except ValueError as error:
            raise ValueError(f"prompt {i}: {error}") from error
        if not ids:
            raise ValueError(f"prompt {i} is empty")
        if len(ids) + max_new_tokens > positions:
            raise ValueError(
                f"prompt {i} has {len(ids)} tokens: with --max_new_tokens={max_new_tokens} that exceeds the model's "
                f"{positions} positions"
            )
        found.append(ids if record.get("prompt") is None else record["prompt"])
    return found


def _ids(model: Any, record: Record) -> list[int]:
    if isinstance(record.get("prompt"), list):
        return record["prompt"]
    if model.tokenizer is None:
        raise ValueError("this checkpoint has no tokenizer.json: its prompts are token ids, in a .jsonl file")
    if "messages" in record and record["messages"] is not None:
        return model.tokenizer.encode_chat(record["messages"])
    return model.tokenizer.encode_prompt(record["prompt"])


@contextlib.contextmanager
def writing(path: str, logprobs: bool) -> Iterator[Callable[[Record, Any], None]]:
    """Gives a function that writes a completion as a line of JSON: the prompt's record with "completion",
    "finish_reason", and token by token, if asked for, "tokens", "logprobs" and "sampled_logprobs"
    (`deepseek_jax.inference.offline.Completion`). Each is in the file as soon as it is written. Raises ValueError for a file
    that has something in it already."""
    if Path(path).is_file() and Path(path).stat().st_size:
        raise ValueError(f"{path} exists: name another file, or remove it")
    with open(path, "w", encoding="utf-8") as file:

        def write(record: Record, done: Any) -> None:
            new: Record = {"completion": done.text, "finish_reason": done.finish_reason}
            if done.text is None or logprobs:
                new["tokens"] = done.tokens
            if logprobs:
                new |= {"logprobs": done.logprobs, "sampled_logprobs": done.sampled_logprobs}
            file.write(json.dumps(record | new, ensure_ascii=False) + "\n")
            file.flush()

        yield write
