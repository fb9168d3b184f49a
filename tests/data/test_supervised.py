"""Conversations as batches: what is learned, what is packed with what, what is refused."""

import json

import numpy as np
import pytest

from deepseek_jax.data import supervised
from deepseek_jax.data.best_fit import best_fit

QUESTION = {"role": "user", "content": "What is MLA?"}


def conversation(i: int) -> dict:
    answer = {"role": "assistant", "content": f"<think>{i}</think>" + "It is attention. " * (i % 7 + 1)}
    return {"messages": [{"role": "user", "content": f"What is MLA? {i}"}, answer]}


@pytest.fixture
def write(tmp_path):
    def write(name, rows):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return str(path)

    return write


@pytest.fixture
def load(tokenizer, tmp_path):
    opened = []

    def load(*sources, seq_len=255, process=(0, 1), **settings):
        cfg = supervised.SupervisedConfig(sources=sources, **settings)
        opened.append(supervised.load(cfg, tokenizer, seq_len, tmp_path / "cache", *process))
        return opened[-1]

    yield load
    for item in opened:
        item.train.close()


def test_windows_hold_whole_conversations(write, load, tokenizer):
    data = load(write("a.jsonl", map(conversation, range(300))), validation_fraction=0.1)
    batch = data.train.take(4)
    assert {name: (x.shape, x.dtype.name) for name, x in batch.items()} == {
        "tokens": ((4, 256), "int32"),
        "segments": ((4, 256), "int32"),
        "positions": ((4, 256), "int32"),
        "loss_mask": ((4, 256), "bool"),
        "padding": ((4, 256), "bool"),
    }
    for row in range(4):
        for segment in range(1, batch["segments"][row].max() + 1):
            here = batch["segments"][row] == segment
            ids = batch["tokens"][row][here]
            if batch["padding"][row][here].all():
                continue
            assert (batch["positions"][row][here] == np.arange(len(ids))).all()
            said = batch["loss_mask"][row][here]
            i = int(tokenizer.decode(ids[said]).split("</think>")[0].removeprefix("<think>"))
            want = conversation(i)["messages"]
            prompt = tokenizer.encode_chat(want[:1])
            answer = [*tokenizer.encode(want[1]["content"]), tokenizer.eos_id]
            assert ids.tolist() == prompt + answer
            assert said.tolist() == [False] * len(prompt) + [True] * len(answer)


def test_best_fit():
    windows = best_fit([5, 3, 3, 2, 7, 5], 10)
    assert windows == [[4, 1], [0, 5], [2, 3]]
