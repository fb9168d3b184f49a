"""A small real corpus: a few modules of the standard library, copied into a folder of their own."""

import shutil
import sysconfig
from pathlib import Path

import pytest

from deepseek_jax import data
from deepseek_jax.config import DataConfig

MODULES = ("abc", "bisect", "colorsys", "copy", "fnmatch", "keyword", "linecache", "quopri", "stat")


@pytest.fixture(scope="session")
def module_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("modules")
    for name in MODULES:
        shutil.copy(Path(sysconfig.get_path("stdlib")) / f"{name}.py", folder)
    return folder


@pytest.fixture(scope="session")
def texts(module_folder):
    return [path.read_text(encoding="utf-8") for path in sorted(module_folder.glob("*.py"))]


@pytest.fixture(scope="session")
def tokenizer(texts):
    return data.train_tokenizer(texts, vocab_size=512)


@pytest.fixture(scope="session")
def settings(module_folder, tmp_path_factory):
    """Makes the settings of a small run; all runs of the session share one cache."""
    cache_dir = str(tmp_path_factory.mktemp("cache"))

    def make(**changes):
        defaults = {
            "source": str(module_folder / "*.py"),
            "validation_fraction": 0.2,
            "vocab_size": 512,
            "seq_len": 64,
            "fim_rate": 0.5,
            "split_punctuation_rate": 0.3,
            "seed": 7,
            "cache_dir": cache_dir,
        }
        return DataConfig(**(defaults | changes))

    return make
