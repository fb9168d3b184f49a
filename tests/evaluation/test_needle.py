"""Prompts with a needle, and grids of answers that are known: of a reader of the whole prompt, and of one of its end."""

import jax
import numpy as np
import pytest

from deepseek_jax.checks import build
from deepseek_jax.config import DataConfig
from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.evaluation import needle_picture
from deepseek_jax.evaluation.needle import Hay, NeedleConfig, documents, grid, hay_of, questions, windows
from deepseek_jax.inference import scoring
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.training.evaluation import nats_and_labels
from deepseek_jax.training.feeding import Feed
from deepseek_jax.training.passes import make_eval_step
from tests.golden.config import HERE
from tests.tiny_run import fresh_state, tiny

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


def reader(tokenizer, tokens=0):
    """Is sure of the number behind the last whole needle among the last `tokens` of a prompt (0: of all); without one, any of
    the hundred is as likely."""

    def one(ids, mask):
        end = int(np.flatnonzero(mask)[0])
        said = tokenizer.decode(ids[max(0, end - tokens) * bool(tokens) : end]).split("# key: ")[1:]
        answer = tokenizer.decode(ids[mask]).strip()
        assert len(answer) == 2 and answer.isdigit()
        return np.log(100) if not said else 0.0 if said[-1][:2] == answer else np.inf

    return lambda batch: np.array([one(*row) for row in zip(*batch.values(), strict=True)])


def test_the_number_is_said_once_at_its_depth(asked, tokenizer):
    assert len(asked) == 3 * 3 * 5
    for question in asked:
        value = tokenizer.decode(question.tokens[-question.answer :])
        text = tokenizer.decode(question.tokens[: -question.answer])
        before, needle, after = text.partition(f"# key:{value}\n")
        assert needle and after.endswith("# key:") and after.count("# key:") == 1
        assert [c for c in text if c.isdigit()] == list(value.strip()) and len(value.strip()) == 2
        # a line of hay is at most 16 tokens here
        assert question.length - 16 < len(question.tokens) <= question.length
        first, last = (len(tokenizer.encode(x)) for x in (before, after.removesuffix("# key:")))
        assert -16 < first - question.depth / 100 * (first + last) <= 0.5
        assert question.depth not in (0, 100) or not (last if question.depth else first)


def test_depths_share_hay_and_samples_do_not(asked):
    same = {tuple(q.tokens[-q.answer :]) for q in asked[:5]}
    assert len(same) == 1 and [q.depth for q in asked[:5]] == [0, 25, 50, 75, 100]
    assert sorted(asked[0].tokens) == sorted(asked[4].tokens) != sorted(asked[5].tokens)


def test_what_a_needle_says_behind_its_number_is_no_answer(hay, tokenizer):
    cfg = NeedleConfig(lengths=(64,), samples=1, digits=2, needle="# key: {value} is it\n")
    for question in questions(cfg, hay, tokenizer):
        value = tokenizer.decode(question.tokens[-question.answer :])
        assert value.strip().isdigit()
        assert f"# key:{value} is it\n" in tokenizer.decode(question.tokens)


def test_batches_of_a_length(asked):
    batch = windows(asked, 128)
    assert {name: (x.shape, x.dtype) for name, x in batch.items()} == {
        "tokens": ((15, 129), np.int32),
        "loss_mask": ((15, 129), np.bool_),
    }
    for tokens, mask, row in zip(*batch.values(), [q for q in asked if q.length == 128], strict=True):
        assert tokens[: len(row.tokens)].tolist() == row.tokens and not tokens[len(row.tokens) :].any()
        assert tokens[mask].tolist() == row.tokens[-row.answer :] and not mask[-1]


def test_who_reads_all_finds_all(asked, tokenizer):
    found = grid(CFG, asked, reader(tokenizer))
    assert found.right.shape == (3, 5) and found.mean == 1.0


def test_who_reads_the_end_finds_what_is_near(asked, tokenizer):
    """The last 78 tokens: all of 64; of longer prompts half, or a quarter and less, of the hay. Else chance."""
    found = grid(CFG, asked, reader(tokenizer, 78))
    want = np.array([[1, 1, 1, 1, 1], [0.01, 0.01, 1, 1, 1], [0.01, 0.01, 0.01, 0.01, 1]])
    np.testing.assert_allclose(found.right, want, rtol=1e-12)
    assert found.mean_of(0, 64) == 1.0 and np.isnan(found.mean_of(65, 127))
    np.testing.assert_allclose(found.mean_of(65, 320), (4 + 0.06) / 10, rtol=1e-12)


def test_the_answer_of_a_model(asked):
    """Through the step that evaluates: the probability of the answer's tokens, each given those before it, as float64 has it."""
    cfg = tiny(data={"seq_len": 128}, model={"max_position_embeddings": 160})
    mesh = make_mesh(cfg.mesh, jax.devices()[:1])
    state, rows = fresh_state(cfg), [q for q in asked if q.length == 128][:5]
    found = nats_and_labels(
        make_eval_step(cfg, mesh), state.params, state.balance_bias, windows(rows, 128), Feed(mesh)
    )
    for nats, labels, row in zip(*found, rows, strict=True):
        logits = scoring.all_logits(state.params, cfg.model, row.tokens, state.balance_bias).astype(
            np.float64
        )
        each = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        want = sum(each[-i - 1, row.tokens[-i]] for i in range(1, row.answer + 1))
        assert labels == row.answer
        # logits are sums of 32 products in float32, of size 1 at most
        np.testing.assert_allclose(nats, -want, rtol=0, atol=row.answer * 32 * 2.0**-23)


def test_texts_to_learn_from(hay, tokenizer):
    texts = list(documents(CFG, hay, tokenizer, 4000, 200, seed=0))
    sizes = [len(tokenizer.encode(text)) for text in texts]
    assert max(sizes) <= 200 and min(sizes) >= 50 - 16 and 4000 * 0.8 < sum(sizes) < 4000 + 200
    for text in texts:
        first, *more = (part[:2] for part in text.split("# key: ")[1:])
        assert len(more) >= 1 and set(more) == {first} and first.isdigit()
        assert text.endswith(f"# key: {first}\n")
    assert len({text.split("# key: ")[1][:2] for text in texts}) > 5
    times = [text.count("# key: ") for text in texts]
    assert min(times) == 2 and 8 <= max(times) <= 20
    assert texts == list(documents(CFG, hay, tokenizer, 4000, 200, seed=0))
    assert texts != list(documents(CFG, hay, tokenizer, 4000, 200, seed=1))


def test_hay_of_the_texts_that_are_held_out(tokenizer):
    data = DataConfig(source=str(HERE / "text" / "*.txt"), validation_fraction=0.1)
    held_out, trained = (set(hay_of(data, CFG, tokenizer, side).lines) for side in (True, False))
    assert held_out - trained and trained - held_out
    noise = hay_of(data, NeedleConfig(hay=("the sky is blue", "the grass is green")), tokenizer, True)
    assert noise.lines == ["the sky is blue\n", "the grass is green\n"]
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
    grids = {name: grid(CFG, asked, reader(tokenizer, n)) for name, n in (("all", 0), ("end", 78))}
    needle_picture.draw(grids, tmp_path / "needle.png", ["a note"])
    picture = (tmp_path / "needle.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 10_000
