import numpy as np
import pytest
import tokenizers

from deepseek_jax.data import packing
from deepseek_jax.data.encoding import encode_documents
from deepseek_jax.data.packing import EpochPacker, PackedStream
from deepseek_jax.data.token_cache import TokenizedDocuments
from deepseek_jax.data.tokenizer import Tokenizer

SEQ_LEN = 32
LENGTH = SEQ_LEN + 1


@pytest.fixture(scope="module")
def documents(texts, tokenizer):
    short = ["one", "two\n", "three words here"]
    parts = list(encode_documents([*texts, *short], tokenizer))
    ids = np.concatenate(parts).astype(np.uint16)
    starts = np.cumsum([0, *map(len, parts)])
    return TokenizedDocuments(ids, starts, np.bincount(ids, minlength=tokenizer.vocab_size))


def packer(documents, tokenizer, **changes):
    return EpochPacker(documents, tokenizer, **({"seq_len": SEQ_LEN} | changes))


def stream_of(packed):
    """The tokens of a packed stream, checked to be what its overlapping windows say."""
    windows = np.stack([packed[i]["tokens"] for i in range(len(packed))])
    assert windows.dtype == np.int32 and windows.shape[1] == LENGTH
    np.testing.assert_array_equal(windows[:-1, SEQ_LEN:], windows[1:, : LENGTH - SEQ_LEN])
    return np.concatenate([windows[:, :SEQ_LEN].ravel(), windows[-1, SEQ_LEN:]])


def test_windows_tile_the_documents_in_order(documents, tokenizer):
    stream = stream_of(PackedStream(documents, SEQ_LEN))
    np.testing.assert_array_equal(stream, documents.ids[: len(stream)])
    assert 0 <= len(documents.ids) - len(stream) < SEQ_LEN
    assert (documents.ids[documents.starts[1:] - 1] == tokenizer.eos_id).all()


def test_an_epoch_holds_every_document_once_in_another_order(documents, tokenizer):
    whole = packer(documents, tokenizer, seq_len=1)
    epochs = []
    for epoch in (0, 1):
        packed = whole.block(epoch, 0)
        stream = np.array(
            [packed[i]["tokens"][0] for i in range(len(packed))] + [packed[len(packed) - 1]["tokens"][1]]
        )
        epochs.append(
            [part.tolist() for part in np.split(stream, np.flatnonzero(stream == tokenizer.eos_id) + 1)][:-1]
        )
    assert epochs[0] != epochs[1]
    plain = sorted(documents[i].tolist() for i in range(len(documents)))
    assert sorted(epochs[0]) == sorted(epochs[1]) == plain


def test_fim_and_split_change_the_form_not_the_text(documents, tokenizer):
    made = packer(documents, tokenizer, fim_rate=0.5, split_punctuation_rate=1.0, seed=1)
    stream = stream_of(made.block(0, 0))
    np.testing.assert_array_equal(stream, stream_of(made.block(0, 0)))
    assert len(stream) > len(documents.ids)
    plain = {tokenizer.decode(documents[i][:-1]) for i in range(len(documents))}
    parts = tokenizer.decode(stream).split("<｜end▁of▁sentence｜>")[:-1]
    num_fim = 0
    for part in parts:
        if part.startswith("<｜fim▁begin｜>"):
            num_fim += 1
            prefix, rest = part.removeprefix("<｜fim▁begin｜>").split("<｜fim▁hole｜>")
            suffix, middle = rest.split("<｜fim▁end｜>")
            part = prefix + middle + suffix
        assert part in plain
    assert 0 < num_fim < len(parts)
    assert not np.isin(stream, made._splitter.combined).any()
    other = stream_of(made.block(1, 0))
    assert len(stream) != len(other) or (stream != other).any()


def test_blocks_together_are_the_epoch(documents, tokenizer, monkeypatch):
    """Each document is in one block of an epoch, in the one form that seed, epoch and document give it."""
    monkeypatch.setattr(packing, "BLOCK_TOKENS", 2000)
    monkeypatch.setattr(packing, "BLOCK_WINDOWS", 1)
    made = packer(documents, tokenizer, fim_rate=0.4, seed=5)
    assert made.num_blocks == round(len(documents.ids) / 2000) > 4
    for epoch in (0, 1):
        blocks = [made.block(epoch, block) for block in range(made.num_blocks)]
        order = np.concatenate([block._order for block in blocks])
        np.testing.assert_array_equal(np.sort(order), np.arange(len(documents)))
        sizes = [len(block._order) for block in blocks]
        assert max(sizes) - min(sizes) <= 1
        again = made.block(epoch, 2)
        for i in range(len(again)):
            np.testing.assert_array_equal(again[i]["tokens"], blocks[2][i]["tokens"])
    # More blocks than documents there are none.
    monkeypatch.setattr(packing, "BLOCK_TOKENS", 1)
    assert packer(documents, tokenizer, seq_len=1).num_blocks == len(documents)


def test_token_counts_beyond_32_bits(documents, tokenizer):
    """A corpus of a trillion tokens, all of one page of memory: its index alone is looked at."""
    size = 1 << 40
    ids = np.broadcast_to(np.uint16(7), size)
    starts = np.array([0, 3 << 38, (3 << 38) + 5, size])
    huge = TokenizedDocuments(ids, starts, documents.counts_v)
    stream = PackedStream(huge, 4096, segments=True)
    assert len(stream) == (size - 1) // 4096
    window = stream[(3 << 38) // 4096]
    assert window["segments"][:7].tolist() == [1, 1, 1, 1, 1, 2, 2] and window["tokens"].shape == (4097,)
    made = EpochPacker(huge, tokenizer, 4096)
    assert made.num_blocks == 3
    assert sum(len(made.block(0, block)) for block in range(3)) in range(len(stream) - 3, len(stream) + 1)


def test_segments_and_positions(documents, tokenizer):
    packed = packer(documents, tokenizer, segments=True, seed=2).block(0, 0)
    borders = 0
    for i in range(len(packed)):
        window = packed[i]
        segment, position = 1, 0
        for t in range(LENGTH):
            assert (window["segments"][t], window["positions"][t]) == (segment, position)
            position += 1
            if window["tokens"][t] == tokenizer.eos_id:
                segment, position, borders = segment + 1, 0, borders + 1
    assert borders > 3
    assert set(packer(documents, tokenizer).block(0, 0)[0]) == {"tokens"}


def test_errors(documents, tokenizer, texts, tmp_path):
    with pytest.raises(ValueError, match=r"less than one window of \d+ \(seq_len 10000000 .*lower seq_len"):
        packer(documents, tokenizer, seq_len=10_000_000)
    with pytest.raises(IndexError, match="window -1 of"):
        PackedStream(documents, SEQ_LEN)[-1]
    without_fim = Tokenizer(
        tokenizers.Tokenizer.from_str(tokenizer._full.to_str().replace("fim▁hole", "hole"))
    )
    with pytest.raises(ValueError, match=r"no fim_hole token.*fim_rate=0"):
        packer(documents, without_fim, fim_rate=0.1)
    packer(documents, without_fim, fim_rate=0.0)
