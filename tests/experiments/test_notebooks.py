"""Both notebooks run from top to bottom, from a fresh kernel in an empty folder; what is stored stays small."""

import os
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parents[2]
NOTEBOOKS = ROOT / "experiments" / "notebooks"
NAMES = ("inference", "deepseek_v3_by_hand")

# Jupyter's own messaging, not ours: it warns of sockets and event loops that close while the kernel stops.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:(jupyter_client|zmq|nbclient|traitlets).*"),
    pytest.mark.filterwarnings("ignore:.*event loop.*:RuntimeWarning:zmq.*"),
    pytest.mark.filterwarnings("ignore:unclosed .*:ResourceWarning"),
]


def read(name: str) -> nbformat.NotebookNode:
    return nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)


@pytest.mark.parametrize("name", NAMES)
def test_runs_from_top_to_bottom(name, tmp_path):
    from nbclient import NotebookClient

    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    env = os.environ | {"PYTHONPATH": path, "TMPDIR": str(tmp_path)}
    notebook = read(name)
    client = NotebookClient(notebook, timeout=240, resources={"metadata": {"path": str(tmp_path)}})
    client.execute(env=env)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 2
    assert not [output.text for output in outputs if output.get("name") == "stderr"]


@pytest.mark.parametrize("name", NAMES)
def test_is_stored_clean(name):
    """Valid, small, readable between the cells, and silent about the machine that ran it."""
    notebook, text = read(name), (NOTEBOOKS / f"{name}.ipynb").read_text(encoding="utf-8")
    nbformat.validate(notebook)
    assert len(text) < 200_000
    assert not [word for word in ("/tmp", "/home", "/root", "/Users", "Traceback") if word in text]
    kinds = [cell.cell_type for cell in notebook.cells]
    assert kinds[0] == "markdown" and kinds.count("markdown") >= kinds.count("code") - 1
    assert all(cell.execution_count is None for cell in notebook.cells if cell.cell_type == "code")
