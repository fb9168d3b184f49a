"""`deepseek_jax.load(path) -> Model`: from both kinds of folder; logits, scores, text, and how often it compiles."""

import json

import jax
import numpy as np
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers.processors import TemplateProcessing

import deepseek_jax
from deepseek_jax import hf
from deepseek_jax.data.chat import ChatTemplate
from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.inference import model as model_file
from deepseek_jax.inference import scoring
from deepseek_jax.inference.scoring import SMALLEST
from deepseek_jax.model.decoding import prepare
from deepseek_jax.model.modules import DeepSeekV3
from tests.data.family import make
from tests.inference.checkpoint import CFG, save_checkpoint, save_run, tokenizer
from tests.oracle.tiny import weights

NEW = 4
IDS = np.random.default_rng(5).integers(0, CFG.vocab_size, 80).tolist()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("model") / "checkpoint")


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    return save_run(tmp_path_factory.mktemp("model") / "run")


@pytest.fixture(scope="module")
def model(folder):
    return deepseek_jax.load(folder)


def equal(a, b) -> bool:
    return all(jax.tree.leaves(jax.tree.map(lambda x, y: np.array_equal(x, y), a, b)))


def test_one_compilation_per_size(model):
    """Comes first, so that the tests below find these programs compiled."""
    scoring._logits.clear_cache()
    for length in (2, 7, SMALLEST):
        model.logits(IDS[:length])
        model.score(IDS[:length])
    assert scoring._logits._cache_size() == 1
    for length in (SMALLEST + 2, 80):
        model.score(IDS[:length])
        model.logits(IDS[:length])
    assert scoring._logits._cache_size() == 2


def test_a_hugging_face_folder(model):
    params, bias = weights(CFG, 0)
    assert model.config == CFG
    assert equal(model.params, params) and equal(model.balance_bias, bias)
    assert model.tokenizer.fingerprint == tokenizer().fingerprint


@pytest.mark.parametrize(
    ("choice", "seed", "factor"), [({}, 2, 1), ({"step": 1}, 1, 1), ({"ema": True}, 2, 0.5)]
)
def test_a_training_runs_folder(run_folder, choice, seed, factor):
    params, bias = weights(CFG, seed)
    model = deepseek_jax.load(run_folder, **choice)
    assert model.config == CFG and model.tokenizer is not None
    assert equal(model.params, jax.tree.map(lambda x: np.float32(factor) * x, params))
    assert equal(model.balance_bias, bias)


def test_dtype_of_a_hugging_face_folder(folder):
    model = deepseek_jax.load(folder, dtype="bfloat16")
    assert model.config.dtype == "bfloat16"
    assert {x.dtype.name for x in jax.tree.leaves(model.params)} == {"bfloat16"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"path": None}, "path=None should be a path"),
        ({"path": 5}, "path=5 should be a path"),
        ({"step": "5"}, "step='5' should be a number of steps, or None"),
        ({"dtype": 16}, "dtype=16 is not one of"),
        ({"mesh": {"node": 2}}, r"mesh=\{'node': 2\} should be a MeshConfig, or None"),
    ],
)
def test_arguments_of_another_type(folder, arguments, message):
    with pytest.raises(ValueError, match=message):
        deepseek_jax.load(**{"path": folder} | arguments)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda _: hf.load(None), "path=None should be a path"),
        (lambda _: hf.save(5, CFG, {}, None), "path=5 should be a path"),
        (lambda _: hf.convert.to_hf(None, "x"), "source=None should be a path"),
        (lambda _: Tokenizer.load(b"x"), "path=b'x' should be a path"),
        (lambda model: model.generate(None), "None is neither text nor token ids"),
        (lambda model: model.generate([1.5]), "1.5 is neither text nor token ids"),
        (lambda model: model.score([None, [1, 2]]), "None is neither text nor token ids"),
        (lambda model: model.generate(IDS[:3], "5"), "max_new_tokens='5' must be an integer"),
        (lambda model: model.generate(IDS[:3], 5, stop=5), r"stop=\(5,\): stop strings must be text"),
        (lambda model: model.generate(IDS[:3], 5, stop_ids=5), "stop_ids=5 must be token ids"),
        (lambda model: model.generate(IDS[:3], 5, temperature="hot"), "temperature='hot' must be a number"),
        (lambda model: model.generate(IDS[:3], 5, seed="x"), "seed='x' must be an integer, or one for each"),
    ],
)
def test_what_is_of_another_type_is_named(model, call, message):
    with pytest.raises(ValueError, match=message):
        call(model)


def test_a_folder_that_is_neither(tmp_path):
    with pytest.raises(ValueError, match=r"holds neither config\.json .* nor checkpoints/"):
        deepseek_jax.load(tmp_path)


def test_logits_are_the_modules(model):
    tokens = np.array([IDS], np.int32)
    want, _ = jax.jit(DeepSeekV3(CFG).apply)(
        {"params": model.params}, tokens, balance_bias=model.balance_bias
    )
    got = model.logits(IDS)
    assert got.dtype == np.float32 and got.shape == (80, CFG.vocab_size)
    # Padding changes the shapes of the matrix products, so the order of sums: float32 rounding, no more.
    np.testing.assert_allclose(got, want[0], atol=2e-5 * np.abs(want).max(), rtol=0)


@pytest.mark.parametrize("length", [2, SMALLEST, SMALLEST + 1, 80])
def test_score_is_log_softmax_of_the_logits(model, length):
    ids = IDS[:length]
    logits = model.logits(ids).astype(np.float64)[:-1]
    top = logits.max(-1, keepdims=True)
    log_p = logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))
    got = model.score(ids)
    assert got.dtype == np.float32 and got.shape == (length - 1,)
    np.testing.assert_allclose(got, log_p[np.arange(length - 1), ids[1:]], atol=5e-5)


def test_text_is_what_the_tokenizer_makes_of_it(model):
    text = "<｜User｜>the keys"
    ids = model.tokenizer.encode(text, allow_special=True)
    assert ids[0] == model.tokenizer.user_id
    assert np.array_equal(model.logits(text), model.logits(ids))
    assert np.array_equal(model.score(text), model.score(ids))


def test_generate_gives_back_the_kind_it_was_given(model):
    text, ids = "the keys", tokenizer().encode("the rest of it")
    rows = model.generate([tokenizer().encode(text), ids], NEW)
    assert all(isinstance(token, int) for row in rows for token in row)
    words = tokenizer().decode(rows[0], skip_special=True)
    assert model.generate([text, ids], NEW) == [words, rows[1]]
    assert model.generate([text], NEW) == [words] and model.generate(text, NEW) == words
    assert model.generate(ids, NEW) == rows[1] == model.generate(np.array(ids), NEW)
    assert model.generate(jax.numpy.array(ids), NEW) == rows[1]
    with pytest.raises(ValueError, match="did you mean 'temperature'"):
        model.generate(ids, NEW, temprature=1.0)


def test_generate_stops_and_samples(model):
    ids = IDS[:3]
    greedy = model.generate(ids, NEW)
    assert (
        len(greedy) > 2
        and model.generate(ids, NEW, stop_ids=[greedy[2]]) == greedy[: greedy.index(greedy[2])]
    )
    hot = {tuple(model.generate(ids, NEW, temperature=5.0, top_p=0.9, seed=seed)) for seed in (0, 0, 1)}
    assert len(hot) == 2


def test_lists_of_texts(model):
    texts = ["the keys", IDS[:5], "the rest of it"]
    for ask in (model.score, model.logits):
        for got, text in zip(ask(texts), texts, strict=True):
            np.testing.assert_array_equal(got, ask(text))
    assert [len(row) for row in model.score([np.array(IDS[:3]), IDS])] == [2, len(IDS) - 1]


def test_what_a_model_says_of_itself(model):
    assert repr(model) == (
        f"Model(2 layers (1 with 8 experts); {CFG.num_params() / 1e3:.3g}k parameters, "
        f"{CFG.num_active_params() / 1e3:.3g}k active; float32; 128 positions; "
        f"tokenizer of {tokenizer().vocab_size} ids)"
    )
    over = deepseek_jax.Model(CFG, model.params, mesh=deepseek_jax.MeshConfig(data=1, node=2, local=4))
    assert repr(over).endswith("; no tokenizer; over data=1, node=2, local=4, tensor=1)")


def test_parameters_are_prepared_once(folder, monkeypatch):
    model, made = deepseek_jax.load(folder), []
    monkeypatch.setattr(model_file, "prepare", lambda *args: made.append(args) or prepare(*args))
    first = model.generate(IDS[:3], NEW)
    model.generate(IDS[:3], NEW, speculative=True)
    "".join(model.stream("the keys", NEW))
    assert len(made) == 1
    model.params = jax.tree.map(lambda x: -x, model.params)
    assert model.generate(IDS[:3], NEW) != first and len(made) == 2


def test_settings_reach_the_sampler(model):
    """Each changes the text of a seed, and is refused where it makes no sense."""
    hot = {"temperature": 3.0}
    choices = [
        hot,
        hot | {"top_k": 2},
        hot | {"top_p": 0.3},
        hot | {"min_p": 0.9},
        {"repetition_penalty": 5.0},
        {"frequency_penalty": -2.0},
        {"logit_bias": {7: 100.0}},
    ]
    rows = [tuple(model.generate(IDS[:3], 12, seed=4, stop_ids=(), **options)) for options in choices]
    assert len(set(rows)) == len(choices) and set(rows[-1]) == {7}


def test_completions_with_log_probabilities(model):
    """They are those of `score`; the reason is the stop token or the length."""
    done = model.generate(["the keys", "the rest"], NEW, logprobs=True)
    for prompt, row in zip(("the keys", "the rest"), done, strict=True):
        ids = [*tokenizer().encode(prompt), *row.tokens]
        np.testing.assert_allclose(row.logprobs, model.score(ids)[-len(row.tokens) :], atol=1e-4)
        assert row.text == model.generate(prompt, NEW) and row.sampled_logprobs == [0.0] * len(row.tokens)
    (length,) = model.generate([IDS[:3]], NEW, stop_ids=(), logprobs=True)
    assert (len(length.tokens), length.finish_reason) == (NEW, "length")
    stopped = model.generate(IDS[:3], NEW, stop_ids=[length.tokens[1]], logprobs=True)
    assert (stopped.tokens, stopped.finish_reason) == (length.tokens[:1], "stop")


def test_pieces_are_the_text(model):
    options = {"temperature": 2.0, "seed": 3, "stop_ids": ()}
    pieces = list(model.stream("the keys", 40, **options))
    assert "".join(pieces) == model.generate("the keys", 40, **options) and len(pieces) > 3
    messages = [{"role": "user", "content": "the keys"}]
    assert "".join(model.stream_chat(messages, 40, **options)) == model.chat(messages, 40, **options)


def test_stop_strings_end_their_row_only(model):
    """Also across tokens, in a batch, streamed, and with drafts; the others go on."""
    options = {"temperature": 2.0, "seed": 3, "stop_ids": ()}
    free = model.generate(["the keys", "the rest"], 40, **options)
    three = (free[0][i : i + 3] for i in range(8, len(free[0])))
    stop = next(text for text in three if text.isascii() and text not in free[1])
    want = [free[0][: free[0].index(stop)], free[1]]
    assert model.generate(["the keys", "the rest"], 40, stop=stop, **options) == want
    assert "".join(model.stream("the keys", 40, stop=["\0", stop], **options)) == want[0]
    row = model.generate("the keys", 40, stop=[stop], logprobs=True, **options)
    assert (row.text, row.finish_reason) == (want[0], "stop")
    assert len(row.logprobs) == len(row.tokens) < 40
    assert stop in tokenizer().decode(row.tokens) and stop not in tokenizer().decode(row.tokens[:-1])
    greedy = model.generate("the keys", 40, stop_ids=())
    stop = greedy[5:8]
    assert (
        model.generate("the keys", 40, stop_ids=(), stop=stop, speculative=True)
        == greedy[: greedy.index(stop)]
    )


def test_speculative_generation_and_its_stats(folder):
    model = deepseek_jax.load(folder)
    assert model.last_stats is None
    assert model.generate(["the keys"], NEW, speculative=True) == model.generate(["the keys"], NEW)
    assert 2 <= model.last_stats.drafted <= 3  # three tokens after the first, one or two a step


def test_chat_is_generation_after_the_template(model):
    messages = [{"role": "user", "content": "the keys"}]
    prompt = ChatTemplate().render(messages)
    assert model.chat(messages, NEW) == model.generate(prompt, NEW)
    messages += [{"role": "assistant", "content": "rest"}, {"role": "user", "content": "the keys"}]
    assert model.chat(messages, NEW) == model.generate(ChatTemplate().render(messages), NEW)


def test_the_folders_own_template(tmp_path):
    folder = save_checkpoint(tmp_path / "checkpoint")
    (folder / "chat_template.jinja").write_text("{{ messages[-1].content }}, and", encoding="utf-8")
    model = deepseek_jax.load(folder)
    assert model.chat([{"role": "user", "content": "the keys"}], NEW) == model.generate("the keys, and", NEW)


def test_the_folders_stops(tmp_path):
    """generation_config.json's list, whether there is a tokenizer or not; else config.json's and the tokenizer's."""
    folder = save_checkpoint(tmp_path / "checkpoint")
    plain = deepseek_jax.load(folder)
    assert plain.stop_ids == (tokenizer().eos_id,)
    greedy = plain.generate(IDS[:3], NEW, stop_ids=())
    assert len(greedy) == NEW
    (folder / "config.json").write_text(
        json.dumps(json.loads((folder / "config.json").read_text()) | {"eos_token_id": 9})
    )
    assert deepseek_jax.load(folder).stop_ids == (tokenizer().eos_id, 9)
    bare = deepseek_jax.Model(CFG, plain.params, plain.balance_bias).generate(IDS[:3], NEW)
    stops = (greedy[2], bare[2])
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": stops}))
    for row in (greedy, bare):
        loaded = deepseek_jax.load(folder)
        assert loaded.stop_ids == stops
        end = min(row.index(stop) for stop in stops if stop in row)
        assert loaded.generate(IDS[:3], NEW) == row[:end]
        (folder / "tokenizer.json").unlink(missing_ok=True)


def test_a_text_begins_with_the_bos(tmp_path):
    """Where the tokenizer's post-processor puts it; a rendered chat has its own."""
    folder = save_checkpoint(tmp_path / "checkpoint")
    backend = Backend.from_file(str(folder / "tokenizer.json"))
    bos = tokenizer().names["bos_token"]
    backend.post_processor = TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer().bos_id)]
    )
    backend.save(str(folder / "tokenizer.json"))
    model = deepseek_jax.load(folder)
    ids = [tokenizer().bos_id, *tokenizer().encode("the keys")]
    assert np.array_equal(model.logits("the keys"), model.logits(ids))
    assert model.generate("the keys", NEW) == model.tokenizer.decode(
        model.generate(ids, NEW), skip_special=True
    )
    messages = [{"role": "user", "content": "the keys"}]
    turns = model.tokenizer.encode(model.chat_template.render(messages), allow_special=True)
    assert turns[:2] == [tokenizer().bos_id, tokenizer().user_id]
    assert model.chat(messages, NEW) == model.tokenizer.decode(model.generate(turns, NEW), skip_special=True)


def test_a_continuation_keeps_its_space(model, tmp_path):
    """Of a tokenizer that writes a word with the space before it: prompt and continuation are one text."""
    spaced = Tokenizer.load(make("metaspace_words", tmp_path / "metaspace"))
    other = deepseek_jax.Model(CFG, model.params, model.balance_bias, spaced)
    prompt = "the cat"
    ids = spaced.encode_prompt(prompt)
    hot = [{"temperature": 3.0, "seed": seed} for seed in range(30)]
    begins = [spaced.text_after(ids, other.generate(ids, 1, **how)).startswith(" ") for how in hot]
    how = hot[begins.index(True)]
    row, text = other.generate(ids, NEW, **how), other.generate(prompt, NEW, **how)
    assert prompt + text == spaced.decode([*ids, *row], skip_special=True)
    assert text == " " + spaced.decode(row, skip_special=True)
    assert "".join(other.stream(prompt, NEW, **how)) == text
    assert other.generate(prompt, NEW, stop="no such text", **how) == text
    assert "".join(other.stream(ids, NEW, **how)) == text[1:]


def test_switches_and_tools_reach_the_template(tmp_path):
    folder = save_checkpoint(tmp_path / "checkpoint")
    (folder / "chat_template.jinja").write_text("{{ tools[0].name }}{{ ' values' if thinking else ' keys' }}")
    model = deepseek_jax.load(folder)
    messages = [{"role": "user", "content": "x"}]
    got = model.chat(messages, NEW, tools=[{"name": "the"}], chat_template_kwargs={"thinking": True})
    assert got == model.generate("the values", NEW)


def test_a_template_that_is_no_jinja_stops_only_chats(tmp_path):
    folder = save_checkpoint(tmp_path / "checkpoint")
    (folder / "chat_template.jinja").write_text("{% unknown %}")
    model = deepseek_jax.load(folder)
    assert isinstance(model.generate("the keys", NEW), str)
    with pytest.raises(ValueError, match=r"chat template: .*unknown tag 'unknown'"):
        model.chat([{"role": "user", "content": "x"}], NEW)


def test_without_a_tokenizer(model):
    bare = deepseek_jax.Model(CFG, model.params, model.balance_bias)
    assert np.array_equal(bare.logits(IDS), model.logits(IDS))
    with pytest.raises(ValueError, match=r"no tokenizer\.json: pass token ids"):
        bare.generate("text")


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda m: m.logits([]), "at least one token"),
        (lambda m: m.score([3]), "at least two tokens, got 1"),
        (lambda m: m.logits([0, CFG.vocab_size]), rf"ids 0 to {CFG.vocab_size} exceed .*vocab_size={CFG.vocab_size}"),
        (lambda m: m.score([-1, 0]), "ids -1 to 0 exceed"),
        (lambda m: m.logits([1] * 129), "129 tokens exceed max_position_embeddings=128"),
        (lambda m: m.generate([]), "at least one prompt"),
        (lambda m: m.generate(["the", ""], NEW), "at least one token"),
        (lambda m: m.generate("the", NEW, stop=""), "stop strings must be text of at least one character"),
        (lambda m: m.generate(["the", "a"], NEW, seed=[1]), "1 seeds for 2 prompts"),
        (lambda m: m.generate("the", NEW, top_k=-1), "top_k=-1 must be"),
        (lambda m: next(deepseek_jax.Model(CFG, m.params).stream([1], NEW)), r"no tokenizer\.json"),
    ],
)  # fmt: skip
def test_bad_input(model, call, text):
    with pytest.raises(ValueError, match=text):
        call(model)
