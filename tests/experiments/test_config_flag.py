"""`--config.KEY=VALUE`: every key can be set, mistakes are named, and each key is documented beside its field."""

import dataclasses

import pytest
from absl import flags

from deepseek_jax.checks import options_of, type_of
from deepseek_jax.config import Config, MeshConfig, ModelConfig, YarnConfig, from_config_dict
from experiments import config_help
from experiments.config_flag import parse, take

TINY = "configs/tiny.py"


def parsed(*arguments) -> Config:
    return parse(arguments, TINY, flags.FlagValues())


@pytest.mark.parametrize(
    ("argument", "section", "key", "value"),
    [
        ("--config.train.steps=3", "train", "steps", 3),
        ("--config.optimizer.peak_lr=1", "optimizer", "peak_lr", 1.0),
        ("--config.data.source=a=b, c", "data", "source", "a=b, c"),
        ("--config.data.tokenizer=x.json", "data", "tokenizer", "x.json"),
        ("--config.data.tokenizer=None", "data", "tokenizer", None),
        ("--config.data.validation=v/*.txt", "data", "validation", "v/*.txt"),
        ("--config.model.q_lora_rank=None", "model", "q_lora_rank", None),
        ("--config.model.q_lora_rank=8", "model", "q_lora_rank", 8),
        ("--config.mesh.zero", "mesh", "zero", True),
        ("--noconfig.mesh.zero", "mesh", "zero", False),
        ("--config.mesh.zero=true", "mesh", "zero", True),
        ("-config.train.steps=4", "train", "steps", 4),
        ("--config.model.rope_scaling.factor=2", "model", "rope_scaling", YarnConfig(factor=2.0)),
        ("--config.model.rope_scaling=None", "model", "rope_scaling", None),
    ],
)
def test_a_key_is_set(argument, section, key, value):
    got = getattr(getattr(parsed(argument), section), key)
    assert got == value and type(got) is type(value)


def test_every_key_whose_default_is_none_can_be_set():
    texts = {str: "x", int: "8"}
    keys = [
        key for key, value, _ in config_help.fields(Config()) if value is None and key != "model.rope_scaling"
    ]
    assert "data.tokenizer" in keys
    for key in keys:
        kind = options_of(type_of(Config, key))[0]
        section, name = key.split(".")
        assert getattr(getattr(parsed(f"--config.{key}={texts[kind]}"), section), name) == kind(texts[kind])


def test_a_value_may_follow_and_other_flags_stay():
    settings, rest = take(["--config", "a.py", "--config.train.steps", "7", "--x=1", "--", "--config.no=1"])
    assert settings == ("a.py", {"train.steps": "7"}) and rest == ["--x=1", "--", "--config.no=1"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config.train.stesp=3"], "unknown config key train.stesp; did you mean train.steps?"),
        (
            ["--config.train.steps.x=3"],
            "unknown config key train.steps.x; train.steps has no keys of its own",
        ),
        (["--config.train.steps=abc"], "--config.train.steps=abc should be an integer"),
        (["--config.train.steps=None"], "--config.train.steps=None should be an integer"),
        (["--config.model.q_lora_rank=x"], "--config.model.q_lora_rank=x should be an integer or None"),
        (["--config.mesh.zero=maybe"], "--config.mesh.zero=maybe should be True or False"),
        (["--config.train=3"], "train is a section; set one of its keys: train.steps"),
        (["--config.train.steps"], "--config.train.steps needs a value"),
        (["--noconfig.train.steps"], "only a switch can be negated"),
        (["--config"], "--config needs a value"),
        (["--config.optimizer.peak_lr=-1"], "optimizer.peak_lr=-1.0 must be positive"),
        (["more"], "unexpected arguments ['more']"),
    ],
)
def test_mistakes(arguments, message):
    with pytest.raises(ValueError) as error:
        parsed(*arguments)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def get_config(:\n", "config.py, line 1: SyntaxError"),
        ("x = 1\n", "config.py has no function get_config()"),
        ("get_config = 3\n", "config.py has no function get_config()"),
        ("def get_config():\n    return 3\n", "should return a ConfigDict, not int"),
        ("def get_config():\n    pass\n", "should return a ConfigDict, not NoneType"),
        (
            "import nothing_like_it\n",
            "config.py, line 1: ModuleNotFoundError: No module named 'nothing_like_it'",
        ),
        (
            "def get_config():\n    return nothing\n",
            "config.py, line 2: NameError: name 'nothing' is not defined",
        ),
        ("def get_config():\n    return {'train': {'stesp': 1}}\n", "did you mean train.steps?"),
        ("def get_config():\n    return {'train': 1}\n", "train=1 should be"),
        ("\0", "config.py"),
    ],
)
def test_broken_files(tmp_path, text, message):
    path = tmp_path / "config.py"
    path.write_text(text)
    with pytest.raises(ValueError) as error:
        parsed(f"--config={path}")
    assert message in str(error.value)


@pytest.mark.parametrize(("path", "error"), [("nope.py", FileNotFoundError), ("configs", IsADirectoryError)])
def test_files_that_cannot_be_read(path, error):
    with pytest.raises(error):
        parsed(f"--config={path}")


def test_configs_are_found_from_elsewhere(tmp_path, monkeypatch):
    want = parsed()
    monkeypatch.chdir(tmp_path)
    assert parsed() == want


# --- what is said of the keys ---------------------------------------------------------------------------------


def test_comments_are_the_documentation():
    assert config_help.docs(ModelConfig)["q_lora_rank"] == "None: full-rank queries (V2-Lite)"
    assert config_help.docs(MeshConfig)["overlap"].startswith("two halves of each device's batch in flight")


def test_every_key_is_documented():
    assert [key for key, _, doc in config_help.fields(Config()) if not doc] == []


def test_help_lists_every_key(capsys):
    with pytest.raises(SystemExit) as end:
        parsed("--config.train.steps=7", "--help")
    out = capsys.readouterr().out
    assert end.value.code == 0
    cfg = dataclasses.replace(from_config_dict({}))
    for key, _, _ in config_help.fields(cfg):
        assert f"  {key} = " in out
    assert "  train.steps = 7" in out and "  data.vocab_size = 2048" in out


def test_print_config_is_what_runs(capsys):
    with pytest.raises(SystemExit) as end:
        parsed("--config.model.rope_scaling.factor=2", "--print_config")
    lines = capsys.readouterr().out.splitlines()
    assert end.value.code == 0
    again = parsed(*(f"--config.{line.replace(' = ', '=', 1)}" for line in lines))
    assert again == parsed("--config.model.rope_scaling.factor=2")
