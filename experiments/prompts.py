"""Reads prompts from files and writes completions as JSON lines, which go on where they were cut off."""

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

Record = dict[str, Any]


def read_prompts(path: str) -> list[Record]:
    """Reads a record for each prompt, as it is to be written again.

    A .jsonl file has an object on each line, with "prompt" (text, or token ids) or "messages" (a conversation), and any
    other keys; or all of them are rows of an OpenAI batch, with "custom_id", "url" and "body" (`is_batch`). Any other file
    is text, with one prompt on each line. Empty lines are left out.

    Raises:
        ValueError: no prompt, or a line that is none; names the file and the line.
    """
    raw = Path(path).read_bytes()
    lines = ((f"{path}, line {i}", line) for i, line in enumerate(raw.splitlines(), start=1) if line.strip())
    records = [_json(line, where) if path.endswith(".jsonl") else _text(line, where) for where, line in lines]
    if not records:
        raise ValueError(f"{path} holds no prompts")
    _check_ids(path, records)
    return records


def is_batch(records: Sequence[Record]) -> bool:
    """Whether these are rows of an OpenAI batch."""
    return all("custom_id" in record for record in records)


def _check_ids(path: str, records: list[Record]) -> None:
    """Raises ValueError for rows of a batch beside others, and for ids that are not their own."""
    ids = [record["custom_id"] for record in records if "custom_id" in record]
    if ids and len(ids) < len(records):
        raise ValueError(
            f'{path}: {len(ids)} of {len(records)} rows have a "custom_id": give it to all or to none'
        )
    twice = {id for id in ids if ids.count(id) > 1} if len(set(ids)) < len(ids) else ()
    if twice:
        raise ValueError(f'{path}: "custom_id" {min(twice)!r} is that of several rows')


def _text(line: bytes, where: str) -> Record:
    try:
        return {"prompt": line.decode("utf-8")}
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} is not UTF-8 text: {error}") from error


def _json(line: bytes, where: str) -> Record:
    from deepseek_jax.json_files import parse_object

    record = parse_object(line, where)
    if "custom_id" in record:
        from deepseek_jax.serving.server.rows import check_row

        check_row(record, where)
        return record
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


class Output:
    """A file of answers, one on each line, which is gone on with.

    Each answer is in the file as soon as it is written; a line that was cut off is taken away when the file is opened again.

    Attributes:
        done: numbers of the records that have their answer.

    Raises ValueError for a file that holds something else than answers of these records.
    """

    def __init__(self, path: str, records: Sequence[Record]):
        self._path, self._records = path, records
        self._batch = is_batch(records)
        self._places = {record["custom_id"]: i for i, record in enumerate(records)} if self._batch else {}
        self.done: set[int] = set()
        if Path(path).is_file():
            self._read()

    def _read(self) -> None:
        raw = Path(self._path).read_bytes()
        whole = raw[: raw.rfind(b"\n") + 1]
        for n, line in enumerate(whole.splitlines(), start=1):
            i = self._place(line)
            if i is None or i in self.done:
                raise ValueError(
                    f"{self._path}, line {n} is no answer to these prompts: name another file, or remove it"
                )
            self.done.add(i)
        if len(whole) < len(raw):
            os.truncate(self._path, len(whole))

    def _place(self, line: bytes) -> int | None:
        """Which record a line answers."""
        try:
            answer = json.loads(line)
            if self._batch:
                return self._places[answer["custom_id"]]
            i = answer["index"]
            record = self._records[i] if type(i) is int and 0 <= i < len(self._records) else None
            same = record is not None and "completion" in answer and answer == answer | record
            return i if same else None
        except (ValueError, KeyError, TypeError):
            return None

    @contextlib.contextmanager
    def writing(self) -> Iterator["Output"]:
        with open(self._path, "a", encoding="utf-8") as self._file:
            yield self

    def write(self, i: int, answer: Record) -> None:
        self._file.write(json.dumps(answer, ensure_ascii=False) + "\n")
        self._file.flush()
        self.done.add(i)


def answer_of(i: int, record: Record, done: Any, logprobs: bool) -> Record:
    """A completion (`deepseek_jax.inference.offline.Completion`) as it is written: the prompt's record with its "index",
    "completion", "finish_reason", and token by token, if asked for, "tokens", "logprobs" and "sampled_logprobs"."""
    new: Record = {"index": i, "completion": done.text, "finish_reason": done.finish_reason}
    if done.text is None or logprobs:
        new["tokens"] = done.tokens
    if logprobs:
        new |= {"logprobs": done.logprobs, "sampled_logprobs": done.sampled_logprobs}
    return record | new
