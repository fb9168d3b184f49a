"""What a run shows of itself: held-out documents from their beginning, beside what really follows."""

import numpy as np
import pytest

from deepseek_jax.data import Tokenizer, Validation
from experiments.samples import chosen, continuation, documents, gaps, hole, samples
from tests.golden.config import HERE
from tests.oracle.tiny import weights
from tests.tiny_run import tiny

RECIPE = "Peel the apples, cut them into slices and lay them into the dish. "
TEXTS = [RECIPE * 8, "Salt.", RECIPE * 2 + "Bake for an hour. " * 12, "Sugar and butter. " * 20]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.load(HERE / "tokenizer.json")


@pytest.fixture(scope="module")
def validation(tokenizer):
    """The texts end to end, each with eos, in windows of 64 tokens that overlap by one."""
    ids = [i for text in TEXTS for i in [*tokenizer.encode(text), tokenizer.eos_id]]
    windows = [ids[i : i + 65] for i in range(0, len(ids) - 64, 64)]
    assert len(windows) > 4
    return Validation({"tokens": np.array(windows, np.int32)}, np.full(len(windows), 200))


def test_documents_are_found_from_their_beginning(tokenizer, validation):
    found = documents(validation, tokenizer.eos_id)
    texts = [tokenizer.decode(ids) for ids in found]
    assert len(texts) == len(TEXTS)
    for text, whole in zip(texts, TEXTS, strict=True):
        assert text and whole.startswith(text)
    assert texts[1] == "Salt."  # ends within its window: whole


def test_those_with_room_are_chosen():
    lengths = [3, 70, 20, 65, 80, 90]
    found = [np.arange(n) for n in lengths]
    assert [len(ids) for ids in chosen(found, 2)] == [70, 80]
    assert [len(ids) for ids in chosen(found[:1], 2)] == [3]
    assert chosen([], 3) == []


def test_a_document_is_continued_and_filled(tokenizer):
    ids = np.array(tokenizer.encode(TEXTS[0]))
    gap = continuation(ids, tokenizer, 5)
    assert gap.before == tokenizer.decode(ids[:32]) and TEXTS[0].startswith(gap.before + gap.really)
    assert len(tokenizer.encode(gap.really)) == 5
    assert gap.filled(" X").startswith(gap.before + ">> X\n") and gap.filled("").endswith(gap.really)
    middle = hole(ids, tokenizer)
    assert TEXTS[0].startswith(middle.before + middle.really + middle.after) and min(map(len, middle)) > 20
    assert f"{middle.before}>>X<<{middle.after}" in middle.filled("X")


@pytest.mark.parametrize(("rate", "names"), [(0.1, {"middle"}), (0.0, set())])
def test_the_middle_is_filled_only_if_that_was_trained(tokenizer, validation, rate, names):
    cfg = tiny(data={"fim_rate": rate})
    assert set(gaps(cfg, tokenizer, validation)) == {"continuation_1", "continuation_2"} | names


def test_a_model_fills_them(tokenizer, validation):
    cfg = tiny(train={"sample_tokens": 4})
    params, bias = weights(cfg.model, 0, bias=0.0)
    found = samples(cfg, params, bias, tokenizer, validation)
    assert set(found) == {"continuation_1", "continuation_2", "middle"}
    for name, gap in gaps(cfg, tokenizer, validation).items():
        assert found[name].startswith(f"{gap.before}>>") and found[name].endswith(
            f"--- really:\n{gap.really}"
        )
