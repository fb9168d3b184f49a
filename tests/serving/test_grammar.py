"""What may come next in a constrained answer: what the grammar says, its end exactly where it may stop, after reasoning."""

import json

import numpy as np
import pytest

from deepseek_jax.data import Tokenizer, train_tokenizer
from deepseek_jax.serving import asked
from deepseek_jax.serving.asked import calls_spec, check_tools, spec_of, tool_choice
from deepseek_jax.serving.dialects import DIALECTS, END_THINK, THINK
from deepseek_jax.serving.grammar import Grammars, Spec
from tests.data.family import make
from tests.serving import schemas
from tests.serving.answers import TEXT, read, tokenizer
from tests.serving.schemas import allowed, draw

OWN = tokenizer()
SIZE = OWN.vocab_size + 70  # the model's vocabulary is larger


@pytest.fixture(scope="module")
def grammars():
    return Grammars(OWN, SIZE)


def schema_format(schema):
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}}


def go(constraint, ids):
    for i in ids:
        mask = constraint.mask()
        assert mask.shape == ((SIZE + 31) // 32,) and mask.dtype == np.uint32
        assert i in allowed(mask) and constraint.accept(i)
    return constraint


def ends(constraint) -> bool:
    """Whether the answer may end here."""
    both = {bool(mask_bit(constraint, i)) for i in OWN.stop_ids}
    assert len(both) == 1
    return both.pop()


def mask_bit(constraint, i):
    return constraint.mask()[i // 32] >> np.uint32(i % 32) & np.uint32(1)


@pytest.mark.parametrize("seed", range(4))
def test_random_schemas_give_valid_answers(grammars, seed):
    """With drafts that are taken back in between: vllm#43388, vllm#44993 (`{{`)."""
    for case in range(20):
        rng = np.random.default_rng(100 * seed + case)
        schemas.check(schemas.random_schema(rng), OWN, grammars, rng)


def test_an_answer_of_any_object(grammars):
    rng = np.random.default_rng(0)
    for _ in range(5):
        ids = draw(grammars.constraint(spec_of({"response_format": {"type": "json_object"}})), OWN, rng)
        assert isinstance(json.loads(OWN.decode(ids)), dict)


def test_it_ends_exactly_where_the_grammar_may(grammars):
    constraint = grammars.constraint(Spec("regex", "ab(cd)?"))
    for text, may in (("", False), ("a", False), ("b", True), ("c", False), ("d", True)):
        go(constraint, OWN.encode(text))
        assert ends(constraint) == may
    assert constraint.accept(OWN.eos_id)
    assert set(allowed(constraint.mask())) == set(OWN.stop_ids)  # nothing else, where the end is passed over
    assert not constraint.accept(OWN.encode("a")[0])
    constraint.rollback(3)
    assert ends(constraint) and constraint.accept(OWN.encode("c")[0]) and not ends(constraint)
    with pytest.raises(ValueError, match="9 tokens cannot be taken back of 3"):
        constraint.rollback(9)


def test_a_token_that_does_not_fit_changes_nothing(grammars):
    constraint, twin = (grammars.constraint(Spec("lark", 'start: "a" /[0-9]+/')) for _ in range(2))
    for i in [*OWN.encode("a"), *OWN.encode("12")]:
        for wrong in (OWN.eos_id, OWN.id_of(THINK), SIZE - 1, SIZE + 5, -1, OWN.encode("x")[0]):
            assert (
                constraint.accept(wrong) == (wrong == OWN.eos_id and ends(constraint)) or wrong == OWN.eos_id
            )
            if constraint._ended:
                constraint.rollback(1)
        assert (constraint.mask() == twin.mask()).all()
        assert constraint.accept(i) and twin.accept(i)


@pytest.mark.parametrize("special", [True, False])
def test_no_special_token_in_a_text(special):
    own = tokenizer(special)
    constraint = Grammars(own, own.vocab_size).constraint(Spec("regex", r"(.|\n)*"))
    may = set(allowed(constraint.mask()))
    control = {own.id_of(mark) for mark in (THINK, END_THINK, *asked.MARKERS)} | own.control_ids
    assert may & control == set(own.stop_ids)
    assert may - control >= {i for text in TEXT.split() for i in own.encode(text)} - control


def test_it_begins_after_the_reasoning(grammars):
    spec = spec_of(schema_format({"const": "a"}))
    constraint = grammars.constraint(spec, "open")
    thoughts = [*OWN.encode("so {}"), OWN.id_of(THINK), *OWN.encode("<")]
    everything = set(range(OWN.vocab_size)) - set(OWN.stop_ids)
    go(constraint, thoughts)
    assert set(allowed(constraint.mask())) == everything and not constraint.accept(OWN.eos_id)
    go(constraint, [OWN.id_of(END_THINK), *OWN.encode('"a"')])
    assert ends(constraint)
    constraint.rollback(len(OWN.encode('"a"')) + 2)  # into the reasoning, and forth again
    assert set(allowed(constraint.mask())) == everything
    assert ends(go(constraint, [*OWN.encode("<"), OWN.id_of(END_THINK), *OWN.encode('"a"')]))


def test_the_model_may_open_the_reasoning(grammars):
    spec = spec_of(schema_format({"const": "a"}))
    constraint = grammars.constraint(spec, "possible")
    assert ends(
        go(constraint, [OWN.id_of(THINK), *OWN.encode("x"), OWN.id_of(END_THINK), *OWN.encode('"a"')])
    )
    other = go(grammars.constraint(spec, "possible"), OWN.encode('"'))
    assert not mask_bit(other, OWN.id_of(THINK)) and not other.accept(OWN.id_of(THINK))
    assert not mask_bit(grammars.constraint(spec, "none"), OWN.id_of(THINK))


def test_the_tag_in_pieces_ends_the_reasoning_too():
    """A tokenizer without the tags as tokens; what follows the tag in one token is none of the grammar's."""
    own = plain()
    constraint = Grammars(own, own.vocab_size).constraint(Spec("regex", "ab"), "open")
    for i in own.encode("so </think"):
        assert constraint.accept(i)
    closing = [i for i in range(own.vocab_size) if b">" in own.token_bytes(i)]
    further = [i for i in closing if own.token_bytes(i).partition(b">")[2].strip()]
    assert closing and further
    may = set(allowed(constraint.mask()))
    assert not may & {i for i in further if own.token_bytes(i).startswith(b">")}
    assert own.encode(">")[0] in may and constraint.accept(own.encode(">")[0])
    assert {own.token_bytes(i) for i in allowed(constraint.mask())} <= {b"a", b"ab"}


def plain() -> Tokenizer:
    return train_tokenizer(["x>a x>a x>a y>a >a >ab >ab the"] * 3, 300)


@pytest.mark.parametrize("kind", ["metaspace", "llama_2", "chat_model"])
def test_other_kinds_of_tokenizers(kind, tmp_path):
    """Byte tokens, spaces as marks, several stops."""
    own = Tokenizer.load(make(kind, tmp_path / "folder"))
    grammars = Grammars(own, own.vocab_size + 3)
    for seed in range(6):
        rng = np.random.default_rng(seed)
        schemas.check(schemas.random_schema(rng, 1), own, grammars, rng)
    constraint = grammars.constraint(Spec("regex", "the 日本 é"))
    before = own.encode("x")
    ids = []
    while not set(own.stop_ids) & set(allowed(constraint.mask())):
        ids.append(int(allowed(constraint.mask())[-1]))
        assert constraint.accept(ids[-1])
    assert own.text_after(before, ids) == "the 日本 é"


def test_a_grammar_that_gets_too_large_ends_the_answer():
    """Ambiguous, so that its parser has more to remember with every token."""
    constraint = Grammars(OWN, SIZE, largest=40).constraint(
        Spec("lark", 'start: a\na: a a | "x" | "x" a "x"')
    )
    for _ in range(100):
        mask = constraint.mask()
        if constraint.error:
            break
        constraint.accept(OWN.encode("x")[0])
    assert "cannot keep to the form" in constraint.error and "\n" not in constraint.error
    assert set(allowed(mask)) == set(OWN.stop_ids) and constraint.accept(OWN.eos_id)


# --- what is asked --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "good", "bad"),
    [
        ({"structured_outputs": {"json": {"type": "integer"}}}, "42", "x"),
        ({"structured_outputs": {"json": '{"type": "boolean"}'}}, "true", "1"),
        ({"structured_outputs": {"regex": r"\d+/[a-z]"}}, "12/a", "a"),
        ({"structured_outputs": {"choice": ['a "b"', "c\n"]}}, 'a "b"', "b"),
        ({"structured_outputs": {"grammar": 'start: "x" | "(" start ")"'}}, "((x))", ")"),
        ({"structured_outputs": {"json_object": True}}, "{}", "["),
        ({"guided_json": {"enum": [1]}}, "1", "2"),
        ({"guided_regex": "a+"}, "aa", "b"),
        ({"guided_choice": ["yes", "no"]}, "no", "x"),
        ({"guided_grammar": 'start: "q"'}, "q", "r"),
        (schema_format({"type": "null"}), "null", "1"),
    ],
)
def test_forms_that_are_asked_for(grammars, body, good, bad):
    constraint = grammars.constraint(spec_of(body))
    assert not constraint.accept(OWN.encode(bad)[0])
    for i in OWN.encode(good):
        assert constraint.accept(i)
    assert ends(constraint)


@pytest.mark.parametrize("body", [{}, {"response_format": None}, {"response_format": {"type": "text"}}])
def test_any_form(body):
    assert spec_of(body) is None


@pytest.mark.parametrize(
    ("body", "error"),
    [
        ({"response_format": "json"}, "response_format='json' must have a type"),
        ({"response_format": {"type": "xml"}}, "must have a type of text, json_object or json_schema"),
        ({"response_format": {"type": "json_schema"}}, "needs a schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": 3}}}, "needs a schema"),
        ({"structured_outputs": [1]}, "must be an object"),
        ({"structured_outputs": {"xml": "x"}}, "structured_outputs.xml is not known"),
        ({"structured_outputs": {"regex": 3}}, "regex=3 must be a text"),
        ({"structured_outputs": {"choice": "yes"}}, "choice='yes' must be a list of texts"),
        ({"structured_outputs": {"json": "{"}}, "is no JSON"),
        ({"structured_outputs": {"json": "3"}}, "must be an object"),
        ({"guided_regex": "a", "response_format": {"type": "json_object"}}, "one form"),
        ({"guided_regex": "("}, "regex cannot be used: .*unclosed group"),
        ({"guided_grammar": "start: foo"}, 'lark cannot be used: .*unknown name: "foo"'),
        (schema_format({"type": "foo"}), "json_schema cannot be used: Invalid type: foo"),
        (schema_format({"not": {}}), 'json_schema cannot be used: Unimplemented keys: \\["not"\\]'),
        (schema_format({"type": "integer", "minimum": 5, "maximum": 3}), "Unsatisfiable"),
        (schema_format({"$ref": "#/nope"}), "does not exist"),
        (schema_format(False), "json_schema cannot be used"),
        ({"guided_regex": "[x&&y]"}, "regex cannot be used"),
        # the process would end: 64 bits overflow in llguidance
        (schema_format({"enum": ["a", -(2**63)]}), "-9223372036854775808 is -2\\^63 or below"),
        (
            schema_format({"type": "object", "properties": {"a": {"const": -(2**63) + 512}}}),
            "or below, once rounded",
        ),
        (schema_format({"type": "integer", "minimum": -1e19, "maximum": -1e19}), "-1e\\+19 is"),
        (
            {"guided_grammar": 'start: %json {"enum": [-9223372036854775807]}'},
            "lark cannot be used: -9223372036854775807",
        ),
    ],
)
def test_what_cannot_be_asked_is_one_clear_line(grammars, body, error):
    with pytest.raises(ValueError, match=error) as raised:
        grammars.constraint(spec_of(body))
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 400


def test_a_schema_is_compiled_once(grammars):
    schema = {
        "type": "object",
        "properties": {"b": {"type": "null"}, "a": {"type": "null"}},
        "required": ["b"],
    }
    specs = [spec_of(schema_format(dict(schema))) for _ in range(2)]
    assert specs[0] == specs[1] and specs[0] != spec_of(schema_format({"required": ["b"]} | schema))
    grammars.constraint(specs[0])
    known = grammars._compiled[specs[0]]
    first, second = (grammars.constraint(spec) for spec in specs)
    assert grammars._compiled[specs[0]] is known
    assert first.accept(OWN.encode("{")[0]) and not second.accept(OWN.encode("b")[0])


# --- calls of tools -------------------------------------------------------------------------------------------------

TOOLS = [
    {"type": "function", "function": {"name": "get_weather", "parameters": {
        "type": "object", "properties": {"days": {"type": "integer"}}, "required": ["days"], "additionalProperties": False}}},
    {"type": "function", "function": {"name": "now"}},
    {"type": "function", "function": {"name": "odd", "parameters": {"not": {}}}},
]  # fmt: skip


@pytest.mark.parametrize("dialect", ["v3", "v3.1"])
def test_required_calls_are_calls(grammars, dialect):
    functions = check_tools(TOOLS)
    for own, many in ((OWN, True), (OWN, False), (plain_marked(), True)):
        mine = grammars if own is OWN else Grammars(own, own.vocab_size)
        spec = calls_spec(list(functions.values()), DIALECTS[dialect], own, mine, many)
        for seed in range(6):
            ids = draw(mine.constraint(spec), own, np.random.default_rng(seed))
            reply, _ = read(ids, dialect=dialect, own=own, tools=True)
            assert reply.content == "" and reply.calls and {c.name for c in reply.calls} <= set(functions)
            assert many or len(reply.calls) == 1
            days = [json.loads(c.arguments)["days"] for c in reply.calls if c.name == "get_weather"]
            assert all(isinstance(x, int) for x in days)


def plain_marked() -> Tokenizer:
    """Its markers are no tokens."""
    return train_tokenizer(["the <｜tool▁call▁begin｜> of"], 300)


def test_a_named_call(grammars):
    functions = check_tools(TOOLS)
    kind, names = tool_choice({"type": "function", "function": {"name": "now"}}, functions)
    assert (kind, names) == ("required", ["now"])
    spec = calls_spec([functions[name] for name in names], DIALECTS["v3"], OWN, grammars, many=False)
    reply, _ = read(draw(grammars.constraint(spec), OWN, np.random.default_rng(0)), dialect="v3", tools=True)
    assert [c.name for c in reply.calls] == ["now"] and reply.finish_reason == "tool_calls"


def test_choices():
    functions = check_tools(TOOLS)
    assert tool_choice(None, functions) == tool_choice("auto", functions) == ("auto", list(functions))
    assert tool_choice(None, {}) == tool_choice("none", functions) == ("none", [])
    assert tool_choice("required", functions) == ("required", list(functions))


@pytest.mark.parametrize(
    ("tools", "choice", "error"),
    [
        ({}, None, "tools={} must be a list"),
        ([{"type": "x"}], None, r"tools\[0\]"),
        ([{"type": "function", "function": {"name": "a b"}}], None, "must be a word"),
        ([{"type": "function", "function": {"name": "a", "parameters": 3}}], None, "must be a JSON schema"),
        ([*TOOLS, TOOLS[0]], None, "stands there twice"),
        ([], "required", "needs tools"),
        (TOOLS, "any", "tool_choice='any' must be"),
        (TOOLS, {"type": "function", "function": {"name": "x"}}, "names 'x', which is not one of"),
    ],
)
def test_wrong_tools(tools, choice, error):
    with pytest.raises(ValueError, match=error):
        tool_choice(choice, check_tools(tools))


def test_a_strict_schema_is_not_given_up(grammars):
    odd = check_tools(TOOLS)["odd"] | {"strict": True}
    with pytest.raises(ValueError, match="Unimplemented"):
        calls_spec([odd], DIALECTS["v3"], OWN, grammars)
    with pytest.raises(ValueError, match="no tool calls"):
        calls_spec([odd], DIALECTS["none"], OWN, grammars)
