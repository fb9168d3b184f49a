"""Prompts with a needle, and grids of answers that are known: of a reader of the whole prompt, and of one of its end."""

import numpy as np
import pytest

from deepseek_jax.checks import build
from deepseek_jax.config import DataConfig
from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.evaluation import needle_picture
from deepseek_jax.evaluation.needle import Hay, NeedleConfig, documents, grid, hay_of, questions
from tests.golden.config import HERE

CFG = NeedleConfig(lengths=(64, 128, 320), samples=3, digits=2)
TEXT = "".join(
    f"def {a}{b}(self):\n    return self.{b}{a}\n\n# said {i}\n"
    for i, (a, b) in enumerate(["no", "at", "be"])
)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.load(HERE / "tokenizer.json")


@pytest.fixture(scope="module")
def hay(tokenizer):
    return Hay([TEXT * 40], CFG, tokenizer)


@pytest.fixture(scope="module")
def asked(hay, tokenizer):
    return questions(CFG, hay, tokenizer)


def reader(tokenizer, tokens=None):
    """Answers with the number behind the last whole needle among the last `tokens` of a prompt."""

    def one(prompt):
        said = tokenizer.decode(prompt[-tokens:] if tokens else prompt).split("# key: ")[1:]
        return tokenizer.encode(f" {said[-1][:2]}" if said else " ?")

    return lambda prompts, room: [one(prompt)[:room] for prompt in prompts]


def test_the_number_is_said_once_at_its_depth(asked, tokenizer):
    assert len(asked) == 3 * 3 * 5
    for question in asked:
        text = tokenizer.decode(question.prompt)
        before, needle, after = text.partition(f"# key: {question.value}\n")
        assert needle and after.endswith("# key:") and after.count("# key:") == 1
        assert [c for c in text if c.isdigit()] == list(question.value)
        # a line of hay is at most 16 tokens here
        tokens = len(question.prompt) + 3  # with the answer
        assert question.length - 16 < tokens <= question.length
        first, last = (len(tokenizer.encode(x)) for x in (before, after.removesuffix("# key:")))
        assert -16 < first - question.depth / 100 * (first + last) <= 0.5
        assert question.depth not in (0, 100) or not (last if question.depth else first)


def test_depths_share_hay_and_samples_do_not(asked):
    same = {q.value for q in asked[:5]}
    assert len(same) == 1 and [q.depth for q in asked[:5]] == [0, 25, 50, 75, 100]
    assert sorted(asked[0].prompt) == sorted(asked[4].prompt) != sorted(asked[5].prompt)


def test_who_reads_all_finds_all(asked, tokenizer):
    found = grid(CFG, asked, tokenizer, reader(tokenizer))
    assert found.right.shape == (3, 5) and found.mean == 1.0


def test_who_reads_the_end_finds_what_is_near(asked, tokenizer):
    """The last 78 tokens: all of 64; of longer prompts half, or a quarter and less, of the hay."""
    found = grid(CFG, asked, tokenizer, reader(tokenizer, 78))
    assert found.right.tolist() == [[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [0, 0, 0, 0, 1]]
    assert found.mean_of(0, 64) == 1.0 and found.mean_of(65, 320) == 0.4 and np.isnan(found.mean_of(65, 127))


def test_what_is_no_answer(asked, tokenizer):
    for text in ("", " ", " x7", "\n7x"):
        found = grid(CFG, asked, tokenizer, lambda prompts, _: [tokenizer.encode(text)] * len(prompts))  # noqa: B023
        assert found.mean == 0.0


def test_texts_to_learn_from(hay, tokenizer):
    texts = list(documents(CFG, hay, tokenizer, 4000, 200, seed=0))
    sizes = [len(tokenizer.encode(text)) for text in texts]
    assert max(sizes) <= 200 and min(sizes) >= 50 - 16 and 4000 * 0.8 < sum(sizes) < 4000 + 200
    for text in texts:
        first, *more = (part[:2] for part in text.split("# key: ")[1:])
        assert len(more) == 3 and set(more) == {first} and first.isdigit()
        assert text.endswith(f"# key: {first}\n")
    assert len({text.split("# key: ")[1][:2] for text in texts}) > 5
    assert texts == list(documents(CFG, hay, tokenizer, 4000, 200, seed=0))
    assert texts != list(documents(CFG, hay, tokenizer, 4000, 200, seed=1))


def test_hay_of_the_texts_that_are_held_out(tokenizer):
    data = DataConfig(source=str(HERE / "text" / "*.txt"), validation_fraction=0.1)
    held_out, trained = (set(hay_of(data, CFG, tokenizer, side).lines) for side in (True, False))
    assert held_out - trained and trained - held_out
    apart = DataConfig(source=data.source, validation=str(HERE / "text" / "*a*.txt"))
    assert hay_of(apart, CFG, tokenizer, True).lines and hay_of(apart, CFG, tokenizer, False).lines


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lengths": (64, -1)}, r"needle.lengths=\(64, -1\) must be tokens in \[0, 16777216\]"),
        ({"depths": (101,)}, r"needle.depths=\(101,\) must be per cent in \[0, 100\]"),
        ({"needle": "# key\n"}, "should be a text without digits"),
        ({"needle": "{value} keys\n"}, "should be a text without digits"),
        ({"needle": "# key 2: {value}\n"}, "should be a text without digits"),
        ({"digits": 0}, "needle.digits=0 must be positive"),
        ({"samples": 0}, "needle.samples=0 must be positive"),
    ],
)
def test_what_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        build(NeedleConfig, values)


def test_no_room_and_no_hay(hay, tokenizer):
    with pytest.raises(ValueError, match=r"needle.lengths: 8 tokens have no room"):
        questions(NeedleConfig(lengths=(8,)), hay, tokenizer)
    with pytest.raises(ValueError, match="the hay has no line without digits"):
        Hay(["7\n\n # key:\n"], CFG, tokenizer)


def test_the_picture(asked, tokenizer, tmp_path):
    grids = {
        name: grid(CFG, asked, tokenizer, reader(tokenizer, n)) for name, n in (("all", None), ("end", 100))
    }
    needle_picture.draw(grids, tmp_path / "needle.png", ["a note"])
    assert (tmp_path / "needle.png").read_bytes().startswith(b"\x89PNG") and (
        tmp_path / "needle.png"
    ).stat().st_size > 10_000
