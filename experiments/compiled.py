"""Compiled programs are kept between commands, so that each is compiled once and not at every call.

In $XDG_CACHE_HOME/deepseek_jax (else ~/.cache/deepseek_jax), a folder per kind of CPU, for 30 days.
DEEPSEEK_JAX_CACHE names another folder, or "off". JAX's own settings (JAX_COMPILATION_CACHE_DIR,
JAX_ENABLE_COMPILATION_CACHE) come before all of these.
"""

import contextlib
import hashlib
import os
import platform
import sys
import tempfile
import time
from pathlib import Path

_JAX_SETTINGS = ("JAX_COMPILATION_CACHE_DIR", "JAX_ENABLE_COMPILATION_CACHE")
_DAYS = 30
_SETTINGS = {
    "jax_persistent_cache_min_compile_time_secs": 0.3,
    "jax_persistent_cache_min_entry_size_bytes": -1,
}


def keep() -> Path | None:
    """Switches the cache on, in this process and those that it starts; returns its folder, or None without one."""
    if any(name in os.environ for name in _JAX_SETTINGS):
        return None
    folder = _folder()
    if folder is None:
        return None
    settings = {"jax_compilation_cache_dir": str(folder), **_SETTINGS}
    settings = {name: value for name, value in settings.items() if name.upper() not in os.environ}
    os.environ.update({name.upper(): str(value) for name, value in settings.items()})
    if "jax" in sys.modules:  # it has read the environment
        for name, value in settings.items():
            sys.modules["jax"].config.update(name, value)
    return folder


def _folder() -> Path | None:
    """Makes the cache's folder and removes old programs; returns None if it is off or cannot be written."""
    wish = os.environ.get("DEEPSEEK_JAX_CACHE", "")
    if wish.lower() in ("off", "0", "none"):
        return None
    try:
        root = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "deepseek_jax"
        folder = (Path(wish).expanduser() if wish else root) / "compiled" / _cpu()
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (OSError, RuntimeError):  # a read-only or full disk, no home
        return None
    _clear(folder)
    return folder


def _clear(folder: Path) -> None:
    oldest = time.time() - _DAYS * 24 * 3600
    for path in folder.iterdir():
        with contextlib.suppress(OSError):  # another command clears, too
            if path.stat().st_mtime < oldest:
                path.unlink()


def _cpu() -> str:
    """Returns a hash of the CPU's instructions: machines that share a home may not run each other's programs."""
    kinds = [platform.machine()]
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
        kinds += [line for line in file if line.startswith(("flags", "Features"))][:1]
    return hashlib.sha256("".join(kinds).encode()).hexdigest()[:12]
