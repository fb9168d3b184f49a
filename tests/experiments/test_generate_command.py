"""`python -m experiments.generate`: prompts from files, JSON lines, chat, and how it ends."""

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from absl.testing import flagsaver

import deepseek_jax
from experiments import generate, prompts
from tests.inference.checkpoint import save_checkpoint

ROOT = Path(__file__).parents[2]
HOT = ["--temperature=2.0", "--top_k=200", "--seed=5", "--max_new_tokens=4"]
SETTINGS = {"temperature": 2.0, "top_k": 200}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("command") / "checkpoint", seed=1)


@pytest.fixture(scope="module")
def model(folder):
    return deepseek_jax.load(folder)


def run(folder, *arguments):
    """In this process; (standard output's owner reads it)."""
    with flagsaver.flagsaver():
        return generate.main([f"--checkpoint={folder}", *arguments])


# --- files ------------------------------------------------------------------------------------------------------


def test_prompts_of_a_text_file(tmp_path):
    (tmp_path / "a.txt").write_text("import os\n\n  def é(x):\n{}\n", encoding="utf-8")
    got = prompts.read_prompts(str(tmp_path / "a.txt"))
    assert [record["prompt"] for record in got] == ["import os", "  def é(x):", "{}"]


@pytest.mark.parametrize(
    ("name", "raw", "message"),
    [
        ("a.txt", b"\n \n", "holds no prompts"),
        ("a.txt", b"a\n\xff\n", "a.txt, line 2 is not UTF-8"),
        ("a.jsonl", b'{"prompt": "a"}\n{"prompt": }\n', "a.jsonl, line 2 is not valid JSON"),
        ("a.jsonl", b"3\n", "line 1 does not hold a JSON object"),
        ("a.jsonl", b'{"text": "a"}', r"""line 1 needs one of "prompt" and "messages", and has \['text'\]"""),
        ("a.jsonl", b'{"prompt": "a", "messages": []}', "needs one of"),
        ("a.jsonl", b'{"prompt": [1, 2.5]}', "must be text or a list of token ids"),
        (
            "a.jsonl",
            b'{"custom_id": "a", "url": "/v1/x", "body": {}}',
            r"line 1: \"url\" is '/v1/x' and must be one of",
        ),
        ("a.jsonl", b'{"messages": "hi"}', 'must be a list of objects with "role"'),
    ],
)
def test_files_that_hold_no_prompts(tmp_path, name, raw, message):
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(ValueError, match=message):
        prompts.read_prompts(str(tmp_path / name))


def test_a_file_of_prompts_and_a_file_of_completions(folder, model, tmp_path, capsys):
    """Text, ids and a conversation; each record comes back, its i-th with the seed + i. Called again, the command goes on."""
    records = [
        {"prompt": "the keys", "id": 7},
        {"prompt": model.tokenizer.encode("the rest")},
        {"messages": [{"role": "user", "content": "the keys"}], "note": "木"},
    ]
    path, out = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))
    more = ["--logprobs", f"--input={path}", f"--output={out}"]
    assert run(folder, *HOT, *more) == 0
    assert "3 completions in" in capsys.readouterr().out
    got = sorted(map(json.loads, out.read_text(encoding="utf-8").splitlines()), key=lambda row: row["index"])
    texts = prompts.for_model(model, records, 4)
    assert texts[:2] == [records[0]["prompt"], records[1]["prompt"]]
    for i, (record, new) in enumerate(zip(records, got, strict=True)):
        want = model.generate(texts[i], 4, seed=5 + i, logprobs=True, **SETTINGS)
        done = {"completion": want.text, "finish_reason": want.finish_reason, "tokens": want.tokens}
        assert {name: new[name] for name in (*record, *done)} == record | done
        assert new["logprobs"] == pytest.approx(want.logprobs, abs=1e-4) and len(new["sampled_logprobs"]) == 4
    whole = out.read_bytes().splitlines(keepends=True)
    out.write_bytes(whole[1] + whole[0][:-9])  # killed while it wrote a line
    assert run(folder, *HOT, *more) == 0
    again = sorted(
        map(json.loads, out.read_text(encoding="utf-8").splitlines()), key=lambda row: row["index"]
    )
    assert [row["tokens"] for row in again] == [row["tokens"] for row in got]
    assert "1 of 3 are in" in capsys.readouterr().err
    out.write_bytes(whole[0] * 2)
    with pytest.raises(ValueError, match=r"out.jsonl, line 2 is no answer to these prompts"):
        run(folder, *HOT, *more)
    (tmp_path / "long.txt").write_text("a\n" + "long " * 100)
    with pytest.raises(
        ValueError, match=r"prompt 2 has \d+ tokens: with --max_new_tokens=4 that exceeds the model's 128"
    ):
        run(folder, *HOT, f"--input={tmp_path / 'long.txt'}")


def test_rows_of_a_batch_file(folder, tmp_path, capsys):
    """The server's own answers, whatever model the rows name; one that is refused says why in its line."""
    body = {"model": "another", "prompt": "the keys", "max_tokens": 3, "temperature": 0}
    chat = {"messages": [{"role": "user", "content": "the"}], "max_tokens": 2, "seed": 1, "n": 2}
    rows = [
        {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": body},
        {"custom_id": "b", "method": "POST", "url": "/v1/chat/completions", "body": chat},
        {"custom_id": "c", "method": "POST", "url": "/v1/completions", "body": body | {"max_tokens": -1}},
    ]
    path, out = tmp_path / "rows.jsonl", tmp_path / "answers.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    assert run(folder, f"--input={path}", f"--output={out}") == 0
    assert "1 rows were refused" in capsys.readouterr().err
    got = {row["custom_id"]: row["response"] for row in map(json.loads, out.read_text().splitlines())}
    assert {id: answer["status_code"] for id, answer in got.items()} == {"a": 200, "b": 200, "c": 400}
    assert got["a"]["body"]["usage"]["completion_tokens"] == 3
    assert [choice["index"] for choice in got["b"]["body"]["choices"]] == [0, 1]
    assert got["c"]["body"]["error"]["param"] == "max_tokens"
    with pytest.raises(ValueError, match=r"give --output=FILE"):
        run(folder, f"--input={path}")
    path.write_text(json.dumps(rows[0]) + "\n" + json.dumps({"prompt": "a"}))
    with pytest.raises(ValueError, match=r'1 of 2 rows have a "custom_id"'):
        run(folder, f"--input={path}", f"--output={out}")


def test_one_prompt_and_several_on_the_terminal(folder, model, capsys):
    want = model.generate("the keys", 4, seed=5, **SETTINGS)
    assert run(folder, *HOT, "--prompt=the keys") == 0
    assert capsys.readouterr().out == f"the keys{want}\n{generate.LINE}\n"
    stop = want[1:3]
    assert run(folder, *HOT, "--prompt=the keys", f"--stop={stop}") == 0
    assert capsys.readouterr().out.startswith(f"the keys{want[: want.index(stop)]}\n")
    assert run(folder, *HOT, "--prompt=the keys", "--prompt=the rest", "--logprobs") == 0
    out = capsys.readouterr().out
    other = model.generate("the rest", 4, seed=6, **SETTINGS)
    assert out.startswith(f"the keys{want}\n") and f"the rest{other}\n" in out
    assert len(out.splitlines()) >= 2 * (1 + 4 + 1)  # text, a line for each token, the reason


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], r"give --prompt=TEXT, --input=FILE or --chat"),
        (["--chat", "--prompt=a"], r"--chat takes its turns from standard input"),
        ([*HOT, "--prompt=a", "--prompt="], "prompt 2 is empty"),
        ([*HOT, "--prompt=a", "--top_k=-2"], "top_k=-2 must be"),
    ],
)
def test_mistakes(folder, arguments, message):
    with pytest.raises(ValueError, match=message):
        run(folder, *arguments)


# --- chat -------------------------------------------------------------------------------------------------------


def replies_by_hand(model, lines, system=()):
    messages, replies = list(system), []
    for turn, line in enumerate(lines):
        messages.append({"role": "user", "content": line})
        replies.append(model.chat(messages, 4, seed=5 + turn, **SETTINGS))
        messages.append({"role": "assistant", "content": replies[-1]})
    return replies


def test_a_chat_has_roles_and_a_seed_for_each_turn(folder, model, capsys, monkeypatch):
    """Replies alone on standard output, the roles on standard error; an empty line ends it."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\nhello\n\nnot a turn\n"))
    assert run(folder, "--chat", "--system=the rest", *HOT) == 0
    out, err = capsys.readouterr()
    want = replies_by_hand(model, ["hello", "hello"], [{"role": "system", "content": "the rest"}])
    assert out == "".join(f"{reply}\n" for reply in want) and want[0] != want[1]
    assert err == "user> assistant> user> assistant> user> "


def test_ctrl_c_ends_a_reply_and_not_the_chat(folder, model, capsys, monkeypatch):
    whole, calls = deepseek_jax.Model.stream, []

    def stream(self, ids, *args, **kwargs):
        calls.append(ids)
        yield "half "
        if len(calls) == 1:
            raise KeyboardInterrupt
        yield from whole(self, ids, *args, **kwargs)

    monkeypatch.setattr(deepseek_jax.Model, "stream", stream)
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\nmore\n"))
    assert run(folder, "--chat", *HOT) == 0
    assert capsys.readouterr().out.startswith("half \nhalf ")
    turns = [("user", "hello"), ("assistant", "half "), ("user", "more")]
    want = model.tokenizer.encode_chat([{"role": role, "content": text} for role, text in turns])
    assert calls[1] == want


@pytest.fixture
def interruptible():
    """Processes started here heed SIGINT, also where a shell has put the tests into the background and it is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_shows_no_traceback(folder, interruptible):
    """Sent while the programs compile, after the prompt is on the screen."""
    command = [
        sys.executable,
        "-m",
        "experiments.generate",
        f"--checkpoint={folder}",
        *HOT,
        "--max_new_tokens=100",  # so many that it cannot be done before the signal, however late that comes
        "--prompt=the keys",
    ]
    environment = os.environ | {"DEEPSEEK_JAX_CACHE": "off", "JAX_PLATFORMS": "cpu"}
    for _ in range(
        3
    ):  # Python loses a signal that meets a callback of JAX's garbage collection: rarely, not thrice
        with subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        ) as process:
            assert process.stdout.read(8) == "the keys"
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=120)
        if process.returncode:
            break
    assert (
        process.returncode == 130 and err.splitlines()[-1] == "error: interrupted" and "Traceback" not in err
    ), (out, err)
