"""The shape of the code: sizes that can be read, and a docstring on what others use."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import grimp
import pytest

ROOT = Path(__file__).parents[2]
MODULES = sorted(
    path for folder in ("templated", "tests") for path in (ROOT / folder).rglob("*.py")
)
PACKAGE = [path for path in MODULES if path.is_relative_to(ROOT / "templated")]

FUNCTION_LINES = 80
MODULE_LINES = 600
# Modules whose parts are explained in one place.
EXPLAINED = {
    "templated/errors.py",  # the tree in the module's docstring
    "templated/api/handlers.py",  # the table in routes.py, which the OpenAPI document is made of
    "templated/api/function_handlers.py",  # as above
    "templated/api/code_handlers.py",
}

Function = ast.FunctionDef | ast.AsyncFunctionDef


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), filename=str(path))


def _lines(function: Function) -> int:
    return (function.end_lineno or function.lineno) - function.lineno + 1


@pytest.mark.parametrize("path", MODULES, ids=_name)
def test_sizes(path: Path) -> None:
    """No function and no module is too long to be read at once."""
    length = len(path.read_text().splitlines())
    assert length <= MODULE_LINES, f"{_name(path)} has {length} lines"
    functions = [node for node in ast.walk(_tree(path)) if isinstance(node, Function)]
    long = [f"{f.name} at line {f.lineno}: {_lines(f)} lines" for f in functions]
    assert not [text for f, text in zip(functions, long, strict=True) if _lines(f) > FUNCTION_LINES]


@pytest.mark.parametrize("path", PACKAGE, ids=_name)
def test_docstrings(path: Path) -> None:
    """Modules, public classes and public functions of modules say what they are."""
    assert not list(_undocumented(path))


def _undocumented(path: Path) -> Iterator[str]:
    tree = _tree(path)
    # An empty __init__.py only makes a folder a package.
    if tree.body and ast.get_docstring(tree) is None:
        yield _name(path)
    for node in tree.body if _name(path) not in EXPLAINED else ():
        if not isinstance(node, Function | ast.ClassDef) or node.name.startswith("_"):
            continue
        # What `main` does is what the module says of itself.
        if ast.get_docstring(node) is None and node.name != "main":
            yield f"{_name(path)}:{node.lineno}: {node.name}"


def test_exceptions_are_needed() -> None:
    """A module that is gone loses its exception."""
    assert all((ROOT / name).is_file() for name in EXPLAINED)


def test_no_import_circles() -> None:
    """Anywhere, also by imports inside functions and by those that only types need."""
    graph = grimp.build_graph("templated", cache_dir=None)
    needs = {name: graph.find_modules_directly_imported_by(name) for name in graph.modules}
    assert len(needs) > 100
    try:
        TopologicalSorter(needs).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(reversed(error.args[1])))
