"""Every test process has eight CPU devices, compiles fast, and compiles each program once.

Tests that want several devices name them; what names none runs on the first, as it would alone.
"""

import os

import jax
import pytest

# The programs are tested, not the compiler, which takes most of the time. Unoptimised and without the fusion
# emitters, which later versions cannot switch off, they compile in half of it. In the environment: for the processes
# that tests start, too.
UNOPTIMISED = "--xla_backend_optimization_level=0"
if jax.__version_info__ < (0, 11):
    UNOPTIMISED += " --xla_cpu_use_fusion_emitters=false"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {UNOPTIMISED}".strip()

jax.config.update("jax_num_cpu_devices", 8)
# An array of fewer dims is broadcast where the code says so, or it is a mistake.
jax.config.update("jax_numpy_rank_promotion", "raise")

# Minutes to half a minute each. `make test` gives a whole file to one of two workers, since its tests share what they
# compile; a long one that begins last would leave the other worker idle.
SLOWEST_FIRST = (
    "test_distributed.py",
    "test_parity_logits.py",
    "test_loop.py",
    "test_notebooks.py",
    "test_step.py",
    "test_overlap.py",
    "test_experts_step.py",
    "test_drafting.py",
    "test_fp8_weights.py",
    "test_over_mesh.py",
    "test_generation_over_mesh.py",
    "test_zero.py",
    "test_golden.py",
)


def pytest_collection_modifyitems(items):
    rank = {name: place for place, name in enumerate(SLOWEST_FIRST)}
    items.sort(key=lambda item: rank.get(item.path.name, len(rank)))


@pytest.fixture(scope="session", autouse=True)
def compiled_once(tmp_path_factory):
    """A compilation cache for the session: tests and the processes that they start share their programs."""
    settings = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0.1,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    for name, value in settings.items():
        jax.config.update(name, value)
        os.environ[name.upper()] = str(value)
