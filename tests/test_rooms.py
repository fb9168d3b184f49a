"""Imports go one way: a room of the library imports rooms of lower floors only, and no files import each other.

A room is a folder or a file of `deepseek_jax`. What a function imports when it runs counts as well: an import that waits
would only hide a circle.
"""

import ast
import graphlib
import re
import statistics
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# From the ground up.
FLOORS = (
    ("pallas_kernels",),
    ("checks", "now"),
    ("json_files", "model_config", "precision"),
    ("balancing", "config"),
    ("data",),
    ("model",),
    ("parallel",),
    ("checkpoints",),
    ("hf",),
    ("training",),
    ("serving",),
    ("inference",),
    ("evaluation",),
    ("posttraining",),
    ("__init__",),
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def modules(*packages: str) -> dict[str, Path]:
    """Name -> file of all modules of the packages; a package's name is its __init__.py's."""
    files = [file for package in packages for file in sorted((ROOT / package).rglob("*.py"))]
    return {".".join(f.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): f for f in files}


def imported(file: Path, known: set[str]) -> set[str]:
    """Modules that a file imports, anywhere in it: of `from a import b`, a.b where that is a module of `known`."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = file.relative_to(ROOT).parts[: -node.level] if node.level else ()
            module = ".".join((*package, *filter(None, (node.module,))))
            names = {f"{module}.{alias.name}" for alias in node.names}
            found |= names & known | ({module} if names - known else set())
    return found


def room_of(module: str) -> str:
    """deepseek_jax.model.mla -> model; pallas_kernels.groups -> pallas_kernels; jax.numpy -> jax"""
    package, *rest = module.split(".")
    return package if package != "deepseek_jax" else rest[0] if rest else "__init__"


LIBRARY = modules("deepseek_jax")
ALL = modules("deepseek_jax", "pallas_kernels", "configs", "experiments")
IMPORTS = {name: imported(file, set(ALL)) for name, file in ALL.items()}


def test_every_room_has_a_floor():
    assert {room_of(name) for name in LIBRARY} == set(FLOOR) - {"pallas_kernels"}


@pytest.mark.parametrize("room", sorted(set(FLOOR) - {"pallas_kernels"}))
def test_a_room_imports_lower_floors_only(room):
    upwards = [
        f"{name} imports {other}"
        for name in LIBRARY
        for other in IMPORTS[name]
        if room_of(name) == room != room_of(other) and FLOOR.get(room_of(other), -1) >= FLOOR[room]
    ]
    assert not upwards


def test_no_files_import_each_other():
    """`prepare` raises CycleError, which names the files."""
    graphlib.TopologicalSorter({name: IMPORTS[name] & set(ALL) for name in ALL}).prepare()


OUTSIDE = {
    "pallas_kernels": {"deepseek_jax", "configs", "experiments", "tests"},
    "deepseek_jax": {"configs", "experiments", "tests"},
    "configs": {"experiments", "tests"},
    "experiments": {"tests"},
}


@pytest.mark.parametrize("package", OUTSIDE)
def test_a_package_knows_nothing_of_those_above_it(package):
    found = {
        f"{name} imports {other}"
        for name in modules(package)
        for other in IMPORTS[name]
        if other.split(".")[0] in OUTSIDE[package]
    }
    assert not found


def test_the_library_leans_on_no_test_kit():
    assert not {
        name for name in LIBRARY for other in IMPORTS[name] if other.startswith("pallas_kernels.testing")
    }


def test_an_import_inside_a_function_counts(tmp_path):
    file = tmp_path / "late.py"
    file.write_text("def f():\n    from deepseek_jax import hf\n    from deepseek_jax.config import Config\n")
    assert imported(file, set(ALL)) == {"deepseek_jax.hf", "deepseek_jax.config"}


def test_no_test_imports_another_test():
    found = {
        f"{file.relative_to(ROOT)} imports {other}"
        for file in sorted((ROOT / "tests").rglob("*.py"))
        for other in imported(file, set())
        if other.startswith("tests.") and other.rpartition(".")[2].startswith("test_")
    }
    assert not found


# --- rooms that one can live in -------------------------------------------------------------------------------------


def functions(file: Path) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    return [
        n
        for n in ast.walk(ast.parse(file.read_text()))
        if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)
    ]


def arguments(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    a = function.args
    names = [arg.arg for arg in (*a.posonlyargs, *a.args, *a.kwonlyargs)]
    return len(names) - (names[:1] in (["self"], ["cls"]))


def test_no_function_takes_more_than_nine_arguments():
    assert not [
        f"{name}.{f.name} takes {arguments(f)}"
        for name, file in ALL.items()
        for f in functions(file)
        if arguments(f) > 9
    ]
    (forward,) = (f for f in functions(ALL["deepseek_jax.model.transformer"]) if f.name == "forward")
    assert arguments(forward) <= 7


def test_no_file_is_long_and_most_are_short():
    lines = {name: len(file.read_text().splitlines()) for name, file in ALL.items()}
    assert max(lines.values()) <= 400, max(lines, key=lines.__getitem__)
    assert statistics.median(lines.values()) <= 130


def test_the_model_asks_no_type_what_to_do():
    """Weights bring their products along, dispatchers their experts. Whether something is an array, or a `Param` of a
    tree, may be asked."""
    asks = {
        f"{name}: {what}"
        for name, file in modules("deepseek_jax/model").items()
        for what in re.findall(r"isinstance\([^()]*\)", file.read_text())
        if not re.search(r", (Param|jax\.Array|jax\.core\.Tracer)\)", what)
    }
    assert not asks


def test_files_of_tests_have_names_of_their_own():
    """pytest imports them by these."""
    names = [file.name for file in (ROOT / "tests").rglob("test_*.py")]
    assert not {name for name in names if names.count(name) > 1}
