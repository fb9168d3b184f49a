"""Conversations as batches: what is packed with what, in which order, what is refused, and what is left out."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_jax.data import held_out, packing, sample_cache, supervised
from deepseek_jax.data.best_fit import best_fit
from deepseek_jax.data.unigram import unigram_bits_per_byte

ROOM = 64  # tokens of a window


def conversation(i, words=None):
    words = i % 3 + 1 if words is None else words
    answer = {"role": "assistant", "content": f"<think>{i}</think>" + "It is attention. " * words}
    return {"messages": [{"role": "user", "content": f"What is MLA? {i}"}, answer]}


def number_of(tokenizer, ids):
    """Which conversation a segment's tokens are."""
    return int(tokenizer.decode(ids).split("<think>")[1].split("</think>")[0])


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

    def load(*sources, seq_len=ROOM - 1, process=(0, 1), **changes):
        cfg = supervised.SupervisedConfig(sources=sources, **changes)
        opened.append(supervised.load(cfg, tokenizer, seq_len, tmp_path / "cache", *process))
        return opened[-1]

    yield load
    for item in opened:
        item.train.close()


@pytest.fixture
def small_blocks(monkeypatch):
    """An epoch of a few hundred samples has several blocks."""
    for name in ("BLOCK_TOKENS", "BLOCK_WINDOWS"):
        monkeypatch.setattr(f"deepseek_jax.data.best_fit.{name}", 6 * ROOM if name == "BLOCK_TOKENS" else 4)
    monkeypatch.setattr(packing, "BLOCK_TOKENS", 6 * ROOM)


def segments_of(batch):
    """(row, columns) of each segment of a batch that is no padding."""
    for row, (segments, padding) in enumerate(zip(batch["segments"], batch["padding"], strict=True)):
        for segment in np.unique(segments[~padding]):
            yield row, np.flatnonzero((segments == segment) & ~padding)


def numbers(tokenizer, *batches):
    return [number_of(tokenizer, b["tokens"][row][here]) for b in batches for row, here in segments_of(b)]


def test_windows_hold_whole_conversations(write, load, tokenizer):
    batch = load(write("a.jsonl", map(conversation, range(300))), seq_len=255).train.take(4)
    assert {name: (x.shape, x.dtype.name) for name, x in batch.items()} == dict.fromkeys(
        ("tokens", "segments", "positions"), ((4, 256), "int32")
    ) | dict.fromkeys(("loss_mask", "padding"), ((4, 256), "bool"))
    for row, here in segments_of(batch):
        ids, said = batch["tokens"][row][here], batch["loss_mask"][row][here]
        question, answer = conversation(number_of(tokenizer, ids))["messages"]
        prompt = tokenizer.encode_chat([question])
        assert ids.tolist() == [*prompt, *tokenizer.encode(answer["content"]), tokenizer.eos_id]
        assert said.tolist() == [False] * len(prompt) + [True] * (len(ids) - len(prompt))
        assert (batch["positions"][row][here] == np.arange(len(ids))).all() and (np.diff(here) == 1).all()
    # Padding comes last, as a segment of its own, and is no label.
    for tokens, segments, positions, mask, padding in zip(
        *(batch[n] for n in ("tokens", "segments", "positions", "loss_mask", "padding")), strict=True
    ):
        begin = len(padding) - padding.sum()
        assert (
            padding[begin:].all() and not mask[padding].any() and (tokens[padding] == tokenizer.eos_id).all()
        )
        assert (segments[begin:] == segments[begin - 1] + 1).all() and (np.diff(segments) >= 0).all()
        assert (positions[begin:] == np.arange(padding.sum())).all()


def test_an_epoch_has_each_conversation_once(write, load, tokenizer, small_blocks):
    data = load(write("a.jsonl", map(conversation, range(150))), seed=5)
    block_lengths = [
        len(data.train._packers[0].block(0, b)) for b in range(data.train._packers[0].num_blocks)
    ]
    assert len(block_lengths) >= 5
    first = numbers(tokenizer, data.train.take(sum(block_lengths)))
    held = {
        number_of(tokenizer, data.validation.tokens[row][here])
        for row, here in segments_of(data.validation.batch)
    }
    assert sorted(first) == sorted({*range(150)} - held) and first != sorted(first)
    assert held == {i for i in range(150) if held_out.share(f"What is MLA? {i}") < held_out.FRACTION}
    second = numbers(tokenizer, data.train.take(30))
    assert second != first[: len(second)]
    assert (
        numbers(tokenizer, load(write("b.jsonl", map(conversation, range(150))), seed=6).train.take(9))
        != first[:9]
    )


SIZES = [4, 4, 6, 10, 2, 120, 8]


def assert_same(left, right):
    assert left.keys() == right.keys()
    for name in left:
        np.testing.assert_array_equal(left[name], right[name])


def test_resume_is_bitwise_and_processes_read_their_rows(write, load, small_blocks, monkeypatch):
    sources = [
        write("a.jsonl", map(conversation, range(80))) + "=3",
        write("b.jsonl", map(conversation, range(80, 120))) + "=1",
    ]
    stream = load(*sources).train
    states, batches = [], []
    for size in SIZES:
        states.append(json.dumps(stream.state()))
        batches.append(stream.take(size))
    assert json.loads(states[-1])["sources"][1]["epoch"] > 0
    for start in (0, 3, 6):
        resumed = load(*sources).train
        resumed.restore(json.loads(states[start]))
        for size, batch in zip(SIZES[start:], batches[start:], strict=True):
            assert_same(resumed.take(size), batch)
    # Two processes hold the rows of one, and read the samples of no other row.
    read = []
    original = sample_cache.Samples.__getitem__
    monkeypatch.setattr(
        sample_cache.Samples, "__getitem__", lambda self, i: read.append(i) or original(self, i)
    )
    halves = [load(*sources, process=(i, 2)).train for i in (0, 1)]
    for size, batch in zip(SIZES, batches, strict=True):
        parts = []
        for half in halves:
            half._ahead and half._ahead[2].result()
            parts.append(half.take(size))
        assert_same({name: np.concatenate([part[name] for part in parts]) for name in batch}, batch)
    for half in halves:
        half.close()  # which reads ahead
    lone = load(*sources, process=(1, 2)).train
    read.clear()
    taken = lone._read(lone._cursor, 20)[0]
    assert len(read) == sum(1 for _ in segments_of(taken)) and len(taken["tokens"]) == 10
    with pytest.raises(ValueError, match=r"other data: .*seed was 0, is now 1"):
        load(*sources, seed=1).train.restore(json.loads(states[0]))


def test_sources_share_windows_by_weight(write, load, tokenizer):
    a, b = (
        write("a.jsonl", map(conversation, range(60))),
        write("b.jsonl", map(conversation, range(100, 140))),
    )
    batch = load(f"{a}=0.75", f"{b}=0.25").train.take(80)
    of_b = {
        row for row, here in segments_of(batch) if number_of(tokenizer, batch["tokens"][row][here]) >= 100
    }
    of_a = {row for row, here in segments_of(batch) if number_of(tokenizer, batch["tokens"][row][here]) < 100}
    assert (len(of_a), len(of_b)) == (60, 20)
    for sources, error in (
        ((a, b), '"SOURCE=WEIGHT"'),
        ((f"{a}=0", f"{b}=1"), "a positive weight"),
        (("=1",), "no file matches|a source and"),
    ):
        with pytest.raises(ValueError, match=error):
            load(*sources)
    with pytest.raises(ValueError, match=r"sft.sources is empty"):
        load()


def test_long_samples_are_refused_or_cut_and_named(write, load, tokenizer):
    rows = [conversation(i, words=1) for i in range(20)]
    rows[3] = conversation(3, words=40)  # longer than a window
    rows[7] = {"prompt": "why " * 200, "completion": "so"}  # with nothing to learn in the first window
    source = write("a.jsonl", rows)
    lengths = {
        3: len(tokenizer.encode_chat(rows[3]["messages"][:1]))
        + len(tokenizer.encode(rows[3]["messages"][1]["content"]))
        + 1,
        7: len(tokenizer.encode("why " * 200)) + len(tokenizer.encode("so")) + 1,
    }
    refused = load(source)
    text = refused.report.summary()
    assert (
        f"2 longer than 64 tokens, refused: {source}:4 ({lengths[3]} tokens), {source}:8 ({lengths[7]} tokens)"
        in text
    )
    assert 3 not in numbers(tokenizer, refused.train.take(30))
    cut = load(source, too_long="cut")
    text = cut.report.summary()
    assert f"1 longer than 64 tokens, cut: {source}:4" in text
    assert f"1 with nothing to learn in the first 64 tokens, refused: {source}:8" in text
    windows = cut.train.take(30)
    row, here = next(
        (row, here)
        for row, here in segments_of(windows)
        if number_of(tokenizer, windows["tokens"][row][here]) == 3
    )
    assert here.tolist() == list(range(ROOM)) and windows["loss_mask"][row][-1]
    assert cut.report.learned == refused.report.learned + windows["loss_mask"][row].sum()
    assert cut.report.tokens == refused.report.tokens + ROOM
    with pytest.raises(ValueError, match=r"no sample fits the window: raise data.seq_len"):
        load(write("b.jsonl", rows[3:4]))
    for name, value in (("too_long", "skip"), ("learn", "some"), ("validation_fraction", 2.0), ("seed", -1)):
        with pytest.raises(ValueError, match=f"sft.{name}="):
            supervised.SupervisedConfig(**{name: value})


def test_a_row_without_anything_to_learn_ends_the_load(write, load):
    rows = [conversation(0), conversation(1), {"messages": [{"role": "user", "content": "?"}]}]
    source = write("a.jsonl", rows)
    with pytest.raises(ValueError, match=r"a\.jsonl:3: nothing to learn: none of 1 messages"):
        load(source)
    with pytest.raises(
        ValueError, match=r"a\.jsonl:3: nothing to learn"
    ):  # nor is the rest taken the next time
        load(source)


def test_questions_of_validation_are_not_learned(write, load, tokenizer):
    rows = [conversation(i) for i in range(40)]
    again = json.loads(json.dumps(rows[5]))
    again["messages"] = [{"role": "system", "content": "Think."}, *again["messages"]]  # the same question
    train = write("a.jsonl", [*rows, again])
    held = write("held.jsonl", [rows[5], conversation(99)])
    data = load(train, validation=held)
    assert "2 that ask what validation asks, left out" in data.report.summary()
    assert 5 not in numbers(tokenizer, data.train.take(30))
    assert sorted(numbers(tokenizer, data.validation.batch)) == [5, 99]
    # By fraction, two samples of one question are on one side.
    split = load(train, validation_fraction=0.5)
    assert not {*numbers(tokenizer, split.train.take(30))} & {*numbers(tokenizer, split.validation.batch)}

    with pytest.raises(
        ValueError, match=r"validation: no sample is left: .*long.jsonl:1: longer than 64 tokens"
    ):
        load(train, validation=write("long.jsonl", [conversation(7, words=40)]))


def test_validation_counts_labels_and_their_bytes(write, load, tokenizer):
    data = load(write("a.jsonl", map(conversation, range(60))))
    held = data.validation
    want_bytes, labels = 0, []
    for row, here in segments_of(held.batch):
        _, answer = conversation(number_of(tokenizer, held.tokens[row][here]))["messages"]
        want_bytes += len(answer["content"].encode())  # the end token has none
        labels += [*tokenizer.encode(answer["content"]), tokenizer.eos_id]
    assert held.num_bytes == want_bytes
    assert sorted(held.targets[held.counted].tolist()) == sorted(labels)
    assert data.report.learned == data.train_counts_v.sum()
    assert data.unigram() == unigram_bits_per_byte(data.train_counts_v, np.array(labels), want_bytes)


def test_rows_are_encoded_once(write, load, tokenizer, monkeypatch, tmp_path):
    source = write("a.jsonl", map(conversation, range(40)))
    first = load(source).train.take(8)

    def fail(*_):
        raise AssertionError("it was encoded again")

    with monkeypatch.context() as patch:
        patch.setattr(sample_cache, "Conversations", fail)
        assert_same(load(source).train.take(8), first)
        with pytest.raises(AssertionError, match="again"):
            load(source, learn="last")
    # A damaged entry, and one of a file that changed, are made again.
    for entry in (tmp_path / "cache").glob("samples-*/ids"):
        data = bytearray(entry.read_bytes())
        data[3] ^= 1
        entry.write_bytes(data)
    assert_same(load(source).train.take(8), first)
    write("a.jsonl", map(conversation, range(1, 41)))
    assert load(source).train.take(8)["tokens"].tolist() != first["tokens"].tolist()


# --- best fit -----------------------------------------------------------------------------------------------------------


def slow_best_fit(lengths, room):
    """Each sample, from the longest, goes to the fullest window that has room for it."""
    windows = []
    for place in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        left = [room - sum(lengths[i] for i in window) for window in windows]
        fitting = [(free, number) for number, free in enumerate(left) if free >= lengths[place]]
        if fitting:
            windows[min(fitting)[1]].append(place)
        else:
            windows.append([place])
    return windows


@settings(max_examples=100, deadline=None, derandomize=True)
@given(lengths=st.lists(st.integers(1, 20), max_size=30), room=st.integers(20, 40))
def test_best_fit_is_the_textbooks(lengths, room):
    windows = best_fit(lengths, room)
    assert windows == slow_best_fit(lengths, room)
    assert sorted(i for window in windows for i in window) == list(range(len(lengths)))


@pytest.mark.parametrize(("shape", "least"), [("log-normal", 0.995), ("chat and reasoning", 0.99)])
def test_windows_are_full(shape, least):
    """Of lengths as sets of conversations have them. Laid out in order, without a search, windows are 65-80% full."""
    draw = np.random.default_rng(0)
    lengths = np.exp(draw.normal(6.5, 1.0, 4000))
    if shape == "chat and reasoning":
        lengths = np.concatenate([lengths[:2000], draw.uniform(1500, 4000, 1200)])
    room = 4096
    lengths = np.clip(lengths, 8, room).astype(int)
    windows = best_fit(lengths.tolist(), room)
    fill = lengths.sum() / (room * len(windows))
    in_order, left = 0, 0
    for length in lengths:
        in_order += length > left
        left = (room if length > left else left) - length
    assert fill >= least > lengths.sum() / (room * in_order) + 0.1
    assert len(windows) <= math.ceil(lengths.sum() / room / least)
