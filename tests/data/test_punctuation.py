import numpy as np
import pytest

from deepseek_jax.data.punctuation import PunctuationSplitter
from deepseek_jax.data.tokenizer import Tokenizer
from tests.data.family import make


@pytest.fixture(scope="module")
def splitter(tokenizer):
    return PunctuationSplitter(tokenizer)


def test_only_punctuation_with_line_breaks_is_combined(tokenizer, splitter):
    combined = [tokenizer.token(i) for i in splitter.combined]
    assert ":\n" in combined and len(combined) >= 3
    for text in combined:
        assert text.rstrip("\r\n") != text and text.strip()
        assert not any(character.isalnum() for character in text)
    assert "\n" not in combined and "\n\n" not in combined and ":" not in combined


def test_rate_one_separates_all_and_keeps_the_text(tokenizer, splitter, texts):
    ids = np.array(tokenizer.encode(texts[0]), np.uint16)
    split = splitter.split(ids, 1.0, seed=0, epoch=0, index=0)
    assert tokenizer.decode(split) == texts[0]
    assert not np.isin(split, splitter.combined).any()
    expected = []
    for i in ids.tolist():
        text = tokenizer.token(i)
        head = text.rstrip("\n")
        parts = (head, text[len(head) :]) if i in splitter.combined else ()
        expected += [j for part in parts for j in tokenizer.encode(part)] or [i]
    assert split.tolist() == expected and len(split) > len(ids)


def test_rate_is_met_and_drawn_per_seed_epoch_and_document(tokenizer, splitter):
    combined = int(splitter.combined[0])
    ids = np.full(10_000, combined, np.uint16)
    split = splitter.split(ids, 0.3, seed=1, epoch=2, index=3)
    kept = int((split == combined).sum())
    assert abs(kept - 7000) < 5 * np.sqrt(10_000 * 0.21)
    np.testing.assert_array_equal(split, splitter.split(ids, 0.3, seed=1, epoch=2, index=3))
    for key in ((0, 2, 3), (1, 0, 3), (1, 2, 0)):
        other = splitter.split(ids, 0.3, *key)
        assert len(other) != len(split) or (other != split).any()
    np.testing.assert_array_equal(splitter.split(ids, 0.0, 0, 0, 0), ids)


@pytest.mark.parametrize("name", ["metaspace", "metaspace_words"])
def test_no_split_where_the_text_would_change(name, tmp_path):
    """A tokenizer that puts a space before each text would put one before the line break."""
    tokenizer = Tokenizer.load(make(name, tmp_path / name))
    splitter = PunctuationSplitter(tokenizer)
    ids = np.array(tokenizer.encode('Keys:\n "Who?"\n\n'), np.int32)
    assert len(splitter.combined) == 0 and splitter.split(ids, 1.0, 0, 0, 0) is ids
