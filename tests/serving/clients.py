"""Unmodified clients against a server process, by hand:

    python -m tests.serving.clients                              # openai
    python -m tests.serving.clients --peers=ENV/bin/python       # and litellm and lm-eval, of an environment that has them
    python -m tests.serving.clients --guidellm=ENV/bin/guidellm  # and a load generator

lm-eval scores a small task of its own by `local-completions`, token ids by /tokenize; each log-likelihood must be
`Model.score`'s sum to 1e-4. The environments: `pip install litellm "lm-eval[api]"` and `pip install guidellm`.
"""

import argparse
import contextlib
import functools
import json
import os
import subprocess
import tempfile
import traceback
from pathlib import Path

import deepseek_jax
from experiments.served import Server
from tests.serving import openai_client
from tests.serving.running import MODEL, running

# No client may look for a model hub.
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "LITELLM_LOCAL_MODEL_COST_MAP": "True"}

TASK = """
task: tiny
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: 0
target_delimiter: ""
metric_list:
  - metric: acc
"""
QUESTIONS = [
    {"question": "the keys and the values", "choices": [" share the latent", " are apart", " are 42"]},
    {"question": "get_weather(city) returns", "choices": [" null", " true", ' {"wind": 12.5}']},
    {
        "question": "the answer is 42, true or",
        "choices": [" false", " the rest of the keys and of the values", "."],
    },
]


def check_openai(server: Server) -> None:
    """All checks, and what went wrong at the end."""
    client, wrong = openai_client.client_of(server.url), []
    for name, check in openai_client.CHECKS.items():
        try:
            check(client)
        except Exception:
            wrong.append(f"openai: {name}\n{traceback.format_exc()}")
        print(
            f"  openai: {name}{' FAILS' * bool(wrong and wrong[-1].startswith(f'openai: {name}'))}",
            flush=True,
        )
    assert not wrong, "\n".join(wrong)


def check_litellm(server: Server, python: str) -> None:
    script = Path(__file__).with_name("litellm_client.py")
    subprocess.run([python, str(script), server.url, MODEL], env={**os.environ, **OFFLINE}, check=True)
    print("  litellm: sync, stream, async, reasoning, text, error", flush=True)


def check_lm_eval(server: Server, python: str, checkpoint: Path) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "docs.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in QUESTIONS))
        (folder / "tiny.yaml").write_text(TASK.format(file=folder / "docs.jsonl"))
        model = (
            f"model={MODEL},base_url={server.url}/v1/completions,num_concurrent=3,tokenizer_backend=remote"
        )
        command = [python, "-m", "lm_eval", "run", "--model", "local-completions", "--model_args", model]
        command += ["--tasks", "tiny", "--include_path", name, "--log_samples", "--output_path", name]
        subprocess.run(command, env={**os.environ, **OFFLINE}, check=True, stdout=subprocess.DEVNULL)
        (samples,) = folder.rglob("samples_tiny_*.jsonl")
        rows = [json.loads(line) for line in samples.read_text().splitlines()]
    worst = max(_differences(rows, checkpoint))
    assert len(rows) == len(QUESTIONS) and worst <= 1e-4, worst
    print(f"  lm-eval: {len(rows)} questions, log-likelihoods within {worst:.1g} of Model.score", flush=True)


def _differences(rows: list[dict], checkpoint: Path) -> list[float]:
    """Of each log-likelihood of lm-eval from the sum of `Model.score` over the tokens of the choice; lm-eval puts no bos before a text."""
    model, found = deepseek_jax.load(checkpoint), []
    for row in rows:
        for choice, response in zip(row["doc"]["choices"], row["resps"], strict=True):
            question = row["doc"]["question"]
            before, ids = (model.tokenizer.encode(text) for text in (question, question + choice))
            assert ids[: len(before)] == before
            found.append(abs(float(response[0][0]) - float(model.score(ids)[len(before) - 1 :].sum())))
    return found


def check_guidellm(server: Server, guidellm: str, checkpoint: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        command = [
            *(guidellm, "run", "--backend", f"kind=openai_http,target={server.url},model={MODEL}"),
            *("--profile", "kind=poisson,rate=20", "--constraint", "kind=max_requests,count=40"),
            *("--data", "kind=synthetic_text,prompt_tokens=32,output_tokens=16", "--disable-progress"),
            *(
                "--tokenizer",
                f"kind=huggingface_auto,model={checkpoint}",
                "--output",
                f"kind=json,path={folder}/out.json",
            ),
        ]
        before = server.metrics()
        subprocess.run(command, env={**os.environ, **OFFLINE}, check=True, stdout=subprocess.DEVNULL)
        report = json.loads((Path(folder) / "out.json").read_text())
    made = report["benchmarks"][0]["metrics"]["request_totals"]
    tokens = server.metrics()["vllm:generation_tokens_total"] - before["vllm:generation_tokens_total"]
    assert made["errored"] == 0 and made["successful"] == 40, made
    print(
        f"  guidellm: {made['successful']} requests by Poisson arrivals, {tokens:.0f} tokens, no error",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peers", help="interpreter with litellm and lm-eval")
    parser.add_argument("--guidellm", help="the program")
    args = parser.parse_args()
    with running(rows=8) as (server, checkpoint):
        parts = [functools.partial(check_openai, server)]
        if args.peers:
            parts.append(functools.partial(check_litellm, server, args.peers))
            parts.append(functools.partial(check_lm_eval, server, args.peers, checkpoint))
        if args.guidellm:
            parts.append(functools.partial(check_guidellm, server, args.guidellm, checkpoint))
        with contextlib.ExitStack() as stack:  # each runs, whatever the others find
            for part in reversed(parts):
                stack.callback(part)


if __name__ == "__main__":
    main()
