import collections

import numpy as np
import pytest

from deepseek_jax.data.fim import choose_documents, fim_documents, fim_prompt, split_document


def test_psm_form_is_exact(tokenizer, texts):
    indices = list(range(len(texts)))
    for i, ids in zip(indices, fim_documents(texts, indices, tokenizer, seed=3, epoch=2), strict=True):
        prefix, middle, suffix = split_document(texts[i], seed=3, epoch=2, index=i)
        assert prefix + middle + suffix == texts[i]
        # The form is spelled with the released names: begin, prefix, hole, suffix, end, middle, eos.
        assert tokenizer.decode(ids) == (
            f"<｜fim▁begin｜>{prefix}<｜fim▁hole｜>{suffix}<｜fim▁end｜>{middle}<｜end▁of▁sentence｜>"
        )
        counts = collections.Counter(ids.tolist())
        names = ("fim_begin", "fim_hole", "fim_end", "eos")
        assert [counts[tokenizer.special_id(name)] for name in names] == [1, 1, 1, 1]
        prompt = fim_prompt(prefix, suffix, tokenizer)
        assert ids[: len(prompt)].tolist() == prompt
        assert tokenizer.decode(ids[len(prompt) : -1]) == middle


def test_cuts_cover_every_character_boundary_evenly():
    text = "abcd"
    cuts = [split_document(text, seed=0, epoch=0, index=i) for i in range(4000)]
    pairs = collections.Counter((len(prefix), len(prefix) + len(middle)) for prefix, middle, _ in cuts)
    # Two independent cuts among 5 places: 15 ordered pairs, the unequal ones twice as likely.
    assert set(pairs) == {(i, j) for i in range(5) for j in range(i, 5)}
    for (i, j), count in pairs.items():
        expected = 4000 / 25 * (1 if i == j else 2)
        assert abs(count - expected) < 5 * np.sqrt(expected)


def test_cuts_are_characters_not_bytes(tokenizer):
    text = "日本語🙂" * 50
    for i in range(20):
        assert "".join(split_document(text, 0, 0, i)) == text
        assert "\ufffd" not in tokenizer.decode(fim_documents([text], [i], tokenizer, 0, 0)[0])


def test_choice_has_the_rate_and_is_drawn_anew_each_epoch():
    first, again, other = (choose_documents(20_000, 0.1, seed=5, epoch=epoch) for epoch in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    for chosen in (first, other):
        assert abs(len(chosen) - 2000) < 5 * np.sqrt(2000 * 0.9)
    # Independent epochs share rate * rate of the documents.
    assert len(np.intersect1d(first, other)) == pytest.approx(200, abs=5 * np.sqrt(200))
    assert len(choose_documents(100, 0.0, 0, 0)) == 0 and len(choose_documents(100, 1.0, 0, 0)) == 100
    assert split_document("some text here", 1, 0, 0) != split_document("some text here", 1, 1, 0)
