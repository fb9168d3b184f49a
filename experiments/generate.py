"""Generate text from a training run or a Hugging Face folder:

    python -m experiments.generate --checkpoint=runs/tiny --prompt="import os"
    python -m experiments.generate --checkpoint=runs/tiny --prompt="import os" --temperature=0.8 --top_p=0.95 --stop="def "
    python -m experiments.generate --checkpoint=runs/tiny --input=prompts.jsonl --output=completions.jsonl
    python -m experiments.generate --checkpoint=FOLDER --chat
    python -m experiments.generate --checkpoint=FP8_FOLDER --prompt="import os" --keep_fp8
    python -m experiments.generate --checkpoint=runs/tiny --prompt="import os" --mesh=node=2,local=4

The text of a single prompt appears while it is generated. A file of prompts is text, one on each line, or JSON lines
(.jsonl) with "prompt" or "messages", or rows of an OpenAI batch file, which bring their own settings. All of them run
together, as many as fit, and `--output` gets a JSON line for each as soon as it is whole; called again, the command goes on
with those that are missing. Prompt i of several is drawn with the seed `--seed` + i, counted from 0, turn i of a chat likewise.

`--mesh` spreads the experts over devices: sizes of the mesh axes data, node, local and tensor, and any other key of
`config.mesh` that says how tokens travel (experts, dispatch, combine, receive). On CPU, as many devices are made.
"""

import asyncio
import contextlib
import itertools
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import tqdm
from absl import flags

from experiments import command_line, prompts
from experiments.devices import cpu_devices
from experiments.mesh_flag import named_by_the_flag, parse_mesh

_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Folder of a run or of Hugging Face.", required=True)
_PROMPT = flags.DEFINE_multi_string("prompt", [], "Text to continue; repeat for a batch.")
_FILE = flags.DEFINE_string("input", None, "Prompts of a file: lines of text, or JSON lines (.jsonl).")
_OUT = flags.DEFINE_string(
    "output", None, "File for the completions, as JSON lines; gone on with if it exists."
)
_STEP = flags.DEFINE_integer("step", None, "Checkpoint step; default: the newest.")
_TOKENS = flags.DEFINE_integer("max_new_tokens", 128, "New tokens per prompt.")
_TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "0 is greedy.")
_TOP_P = flags.DEFINE_float("top_p", 1.0, "Only the likeliest tokens with this probability in all; 1: all.")
_TOP_K = flags.DEFINE_integer("top_k", 0, "Only the k most likely tokens; 0: all.")
_MIN_P = flags.DEFINE_float("min_p", 0.0, "Only tokens this times as likely as the most likely one; 0: all.")
_PENALTY = flags.DEFINE_float("repetition_penalty", 1.0, "Above 1: tokens seen before are less likely.")
_STOP = flags.DEFINE_multi_string("stop", [], "Text that ends a completion and is cut; repeat for more.")
_SEED = flags.DEFINE_integer("seed", 0, "Seed of sampling.")
_LOGPROBS = flags.DEFINE_bool("logprobs", False, "Log-probabilities (nats) of the tokens, too.")
_SPECULATIVE = flags.DEFINE_bool("speculative", False, "Draft with the MTP module.")
_CHAT = flags.DEFINE_bool("chat", False, "Talk: one line of input is one turn; an empty line ends.")
_SYSTEM = flags.DEFINE_string("system", None, "The system's message at the beginning of a chat.")
_MESH = flags.DEFINE_string("mesh", "", "Mesh of devices, such as node=2,local=4; empty: one device.")
_FP8 = flags.DEFINE_bool("keep_fp8", False, "Multiply the FP8 weights of a Hugging Face folder as they are.")
_EMA = flags.DEFINE_bool("ema", False, "Use the averaged parameters.")

LINE = "-" * 75


def _options() -> dict[str, Any]:
    given = (_TEMPERATURE, _TOP_P, _TOP_K, _MIN_P, _PENALTY, _STOP, _SPECULATIVE)
    return {flag.name: flag.value for flag in given}


# --- completions ----------------------------------------------------------------------------------------------------


def _records() -> list[prompts.Record]:
    if _CHAT.value:
        raise ValueError(
            "--chat takes its turns from standard input: leave out --prompt, --input and --output"
        )
    given = [{"prompt": text} for text in _PROMPT.value]
    return given + (prompts.read_prompts(_FILE.value) if _FILE.value is not None else [])


def _show(before: str, file: Any, pieces: Iterator[str], shown: list[str]) -> None:
    """Prints text as it comes and appends it to `shown`; then ends the line, also at Ctrl-C.

    It writes `before` to `file` when the first piece has come: until then, the line shows what the command does.
    """
    first = next(pieces, "")
    print(before, end="", file=file, flush=True)
    try:
        for piece in itertools.chain((first,), pieces):
            shown.append(piece)
            print(piece, end="", flush=True)
    finally:
        print(flush=True)


def _completions(model: Any, texts: list[Any], which: Sequence[int]) -> Iterator[tuple[int, Any]]:
    """Yields the number and the `Completion` of each of these texts as soon as it is whole."""
    seeds = [_SEED.value + i for i in which]
    for n, done in model.completions([texts[i] for i in which], _TOKENS.value, seed=seeds, **_options()):
        yield which[n], done


def _print(model: Any, record: prompts.Record, done: Any) -> None:
    if done.text is None:
        print(record["prompt"], done.tokens)
    else:
        print(record["prompt"] + done.text if isinstance(record.get("prompt"), str) else done.text)
    if _LOGPROBS.value:
        for token, own, sampled in zip(done.tokens, done.logprobs, done.sampled_logprobs, strict=True):
            text = "" if model.tokenizer is None else repr(model.tokenizer.token(token))
            print(f"{token:>8} {own:9.4f} {sampled:9.4f}  {text}")
    print(f"{LINE} {done.finish_reason}", flush=True)


def _complete(model: Any, records: list[prompts.Record]) -> None:
    if _OUT.value is not None:
        _to_file(model, records, _OUT.value)
        return
    if prompts.is_batch(records):
        raise ValueError("rows of a batch file are answered in a file: give --output=FILE")
    texts = prompts.for_model(model, records, _TOKENS.value)
    if len(texts) == 1 and model.tokenizer is not None and not _LOGPROBS.value:
        pieces = model.stream(texts[0], _TOKENS.value, seed=_SEED.value, **_options())
        _show(_PROMPT.value[0] if _PROMPT.value else "", sys.stdout, pieces, [])
        print(LINE)
    else:
        found = dict(_completions(model, texts, range(len(texts))))
        for i, record in enumerate(records):
            _print(model, record, found[i])
    _say_drafts(model)


def _to_file(model: Any, records: list[prompts.Record], path: str) -> None:
    """Answers those that have no answer yet."""
    output, batch = prompts.Output(path, records), prompts.is_batch(records)
    texts = [] if batch else prompts.for_model(model, records, _TOKENS.value)
    left = [i for i in range(len(records)) if i not in output.done]
    if len(left) < len(records):
        print(f"{len(output.done)} of {len(records)} are in {path} already", file=sys.stderr)
    bar = tqdm.tqdm(total=len(records), initial=len(output.done), unit=" answers", disable=None)
    with output.writing(), bar:
        if batch and left:
            failed = asyncio.run(_answer_batch(model, [records[i] for i in left], left, output, bar))
            if failed:
                print(f"{failed} rows were refused: their lines say why", file=sys.stderr)
        for i, done in _completions(model, texts, left) if left and not batch else ():
            output.write(i, prompts.answer_of(i, records[i], done, _LOGPROBS.value))
            bar.update()
    print(f"{len(records)} completions in {path}")
    _say_drafts(model)


async def _answer_batch(
    model: Any, rows: list[Any], which: list[int], output: prompts.Output, bar: Any
) -> int:
    """Answers rows of an OpenAI batch by the server's endpoints; returns how many of them were refused."""
    from deepseek_jax.serving.build import cold
    from deepseek_jax.serving.engine import Engine
    from deepseek_jax.serving.options import Options
    from deepseek_jax.serving.server.app import application
    from deepseek_jax.serving.server.rows import answered
    from deepseek_jax.serving.server.service import Service, Settings, served
    from deepseek_jax.serving.thread import EngineThread

    if model.tokenizer is None:
        raise ValueError(f"{_CHECKPOINT.value} has no tokenizer.json: rows of a batch need one")
    options = Options(drafts=_SPECULATIVE.value, waiting=2**30)
    service = Service(Settings("model", waiting=2**30, waiting_tokens=2**40))
    service.begin(served(EngineThread(Engine(cold(model, options), options)), model.tokenizer))
    failed = 0
    try:
        async for n, answer in answered(application(service), rows, 4 * options.rows):
            output.write(which[n], answer)
            failed += answer["response"]["status_code"] != 200
            bar.update()
    finally:
        service.close()
    return failed


def _say_drafts(model: Any) -> None:
    if model.last_stats is not None:
        stats = model.last_stats
        print(f"drafts accepted: {stats.acceptance:.1%}, {stats.tokens_per_step:.2f} tokens per step")


# --- chat -----------------------------------------------------------------------------------------------------------


def _turns() -> Iterator[str]:
    """Yields lines of standard input up to an empty one. Roles go to standard error, so that a pipe gets the replies."""
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (makes the line editable)
        print("An empty line ends the chat; Ctrl-C ends a reply.", file=sys.stderr)
    while True:
        print("user> ", end="", file=sys.stderr, flush=True)
        try:
            line = input().strip()
        except EOFError:
            line = ""
        if not line:
            return
        yield line


def _chat(model: Any) -> None:
    messages = [] if _SYSTEM.value is None else [{"role": "system", "content": _SYSTEM.value}]
    for turn, line in enumerate(_turns()):
        messages.append({"role": "user", "content": line})
        ids, positions = model.tokenizer.encode_chat(messages), model.config.max_position_embeddings
        if len(ids) >= positions:
            messages.pop()
            print(
                f"with this turn the chat has {len(ids)} tokens, and the model has {positions} positions: shorten the turn, or "
                "end the chat with an empty line and begin anew",
                file=sys.stderr,
                flush=True,
            )
            continue
        room = min(_TOKENS.value, positions - len(ids))
        reply: list[str] = []
        with contextlib.suppress(KeyboardInterrupt):
            pieces = model.stream(ids, room, seed=_SEED.value + turn, **_options())
            _show("assistant> ", sys.stderr, pieces, reply)
        messages.append({"role": "assistant", "content": "".join(reply)})


# --- the command ----------------------------------------------------------------------------------------------------


def main(argv: Sequence[str]) -> int:
    command_line.parse_flags(argv)
    asked = _PROMPT.value or _FILE.value is not None or _OUT.value is not None
    records = _records() if asked else []
    if not records and not _CHAT.value:
        raise ValueError("give --prompt=TEXT, --input=FILE or --chat")
    mesh = parse_mesh(_MESH.value)
    if mesh is not None:
        cpu_devices(max(1, mesh.data) * mesh.node * mesh.local * mesh.tensor)
    import deepseek_jax

    with named_by_the_flag():
        model = deepseek_jax.load(
            _CHECKPOINT.value, step=_STEP.value, ema=_EMA.value, keep_fp8=_FP8.value, mesh=mesh
        )
    if _CHAT.value and model.tokenizer is None:
        raise ValueError(f"{_CHECKPOINT.value} has no tokenizer.json: a chat needs one")
    _chat(model) if _CHAT.value else _complete(model, records)
    return 0


if __name__ == "__main__":
    command_line.run(main)
