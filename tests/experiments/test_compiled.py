"""The compilation cache of the commands: on by default, off by wish, and never in the way."""

import os
import time

import pytest

from experiments import compiled


@pytest.fixture
def environment(tmp_path, monkeypatch):
    """As in a shell: none of the settings of the tests."""
    for name in [name for name in os.environ if name.startswith(("JAX_", "DEEPSEEK_JAX_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(os, "environ", dict(os.environ) | {"XDG_CACHE_HOME": str(tmp_path / "cache")})
    monkeypatch.setattr(compiled.sys, "modules", {})  # a process without JAX
    return os.environ


def test_the_folder_and_what_children_inherit(environment, tmp_path):
    folder = compiled.keep()
    assert folder.is_dir() and folder.parent == tmp_path / "cache" / "deepseek_jax" / "compiled"
    assert environment["JAX_COMPILATION_CACHE_DIR"] == str(folder)
    assert environment["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] == "-1"


def test_what_is_set_already_holds(environment):
    environment["JAX_COMPILATION_CACHE_DIR"] = "/elsewhere"
    assert compiled.keep() is None and environment["JAX_COMPILATION_CACHE_DIR"] == "/elsewhere"


def test_off_and_another_folder(environment, tmp_path):
    environment["DEEPSEEK_JAX_CACHE"] = "off"
    assert compiled.keep() is None and "JAX_COMPILATION_CACHE_DIR" not in environment
    environment["DEEPSEEK_JAX_CACHE"] = str(tmp_path / "mine")
    assert compiled.keep().parent == tmp_path / "mine" / "compiled"


def test_a_folder_that_cannot_be_made(environment, tmp_path):
    (tmp_path / "cache").write_text("a file, as a read-only home refuses the folder")
    assert compiled.keep() is None


def test_old_programs_are_cleared(environment):
    folder = compiled.keep()
    for name, days in (("old", 31), ("new", 29)):
        (folder / name).touch()
        os.utime(folder / name, (time.time() - days * 86400,) * 2)
    compiled.keep()
    del environment["JAX_COMPILATION_CACHE_DIR"]
    compiled.keep()
    assert [path.name for path in folder.iterdir()] == ["new"]
