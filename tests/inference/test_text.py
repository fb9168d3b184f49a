"""Text while it is generated, and stop strings in it."""

import itertools

import pytest

from deepseek_jax.data.streaming import check_stop
from deepseek_jax.inference.text import TextRow
from tests.inference.checkpoint import tokenizer

TEXT = "the keys and the values ± 木 share the latent"


def pieces(text, stop, cut=1):
    """(parts shown, row) of a text that comes `cut` tokens at a time."""
    row, ids = TextRow(tokenizer(), stop), tokenizer().encode(text)
    shown = [row.push(ids[i : i + cut]) for i in range(0, len(ids), cut)]
    return [*shown, row.close()], row


@pytest.mark.parametrize("cut", [1, 2, 7, 100])
def test_without_stop_strings_all_comes_out(cut):
    shown, row = pieces(TEXT, (), cut)
    assert "".join(shown) == row.text == TEXT and not row.ended
    assert row.count == len(tokenizer().encode(TEXT))


@pytest.mark.parametrize(
    ("stop", "want"),
    [
        (["values"], "the keys and the "),
        (["s and"], "the key"),
        (["木"], "the keys and the values ± "),
        (["nothing", "share", "latent"], "the keys and the values ± 木 "),
        (["the"], ""),
        (["absent", "latents"], TEXT),
        (["e values ± 木 s", "va"], "the keys and the "),  # complete first
        (["eys", "keys"], "the "),  # complete together: the longer
    ],
)
def test_text_ends_before_the_first_complete_stop_string(stop, want):
    for cut in (1, 3, 100):
        shown, row = pieces(TEXT, stop, cut)
        assert "".join(shown) == row.text == want
        assert row.ended == (want != TEXT)
        for before, after in itertools.pairwise(itertools.accumulate(shown)):
            assert after.startswith(before)


def test_tokens_are_counted_up_to_the_one_that_completes_it():
    ids = tokenizer().encode(TEXT)
    _, row = pieces(TEXT, ["values"], 100)
    decoded = [tokenizer().decode(ids[:n]) for n in (row.count - 1, row.count)]
    assert ["values" in text for text in decoded] == [False, True]
    assert row.push(ids) == "" and row.close() == "" and row.text == "the keys and the "


def test_only_what_may_begin_a_stop_string_is_held_back():
    row, ids = TextRow(tokenizer(), ["</s>"]), {c: tokenizer().encode(c) for c in "a</sx"}
    assert [row.push(ids[c]) for c in "a</sx</"] == ["a", "", "", "", "</sx", "", ""]
    assert row.close() == "</" and row.text == "a</sx</"


def test_half_a_character_comes_out_at_the_end():
    row, ids = TextRow(tokenizer()), tokenizer().encode("木")
    assert len(ids) == 3 and row.push(ids[:2]) == "" and row.close() == "\ufffd"


def test_empty_stop_strings_are_refused():
    assert check_stop("end") == ("end",) and check_stop([]) == ()
    for stop in ("", ["a", ""], [3]):
        with pytest.raises(ValueError, match="at least one character"):
            check_stop(stop)
