"""The resident Python's own way to a handler: it may differ from importlib's in speed alone."""

from __future__ import annotations

import importlib
import inspect
import json
import py_compile
import random
import sys
from collections.abc import Iterator
from importlib.machinery import EXTENSION_SUFFIXES, SourceFileLoader
from pathlib import Path
from types import ModuleType

import pytest

from templated.guest.agent.functions import EMPTY
from templated.guest.runtime.load import LoadError, load, plain
from tests.unit.function_guest import ECHO, Caller, Guest, calling, functions_in
from tests.unit.test_agent_functions import killed

CHECKED, UNCHECKED, TIMES = (
    py_compile.PycInvalidationMode.CHECKED_HASH,
    py_compile.PycInvalidationMode.UNCHECKED_HASH,
    py_compile.PycInvalidationMode.TIMESTAMP,
)


@pytest.fixture
def guest(tmp_path: Path) -> Iterator[Guest]:
    with functions_in(tmp_path) as guest:
        yield guest


@pytest.fixture
def name() -> str:
    """Of a module that no test has loaded before."""
    return f"loaded_{random.getrandbits(64):x}"


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the code, the first of sys.path."""
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def imported(name: str) -> ModuleType:
    """The same by importlib."""
    sys.modules.pop(name, None)
    importlib.invalidate_caches()
    return importlib.import_module(name)


def test_a_module_is_what_importlib_makes_of_it(root: Path, name: str) -> None:
    source = f"# é\nimport {name} as itself\nseen = dict(globals())\n" + ECHO
    (root / f"{name}.py").write_text(source)
    module = plain(name, str(root))
    assert module is sys.modules[name] is module.itself  # type: ignore[union-attr]
    other = imported(name)
    for key in ("__name__", "__file__", "__package__", "__cached__", "__doc__"):
        assert module.seen[key] == getattr(module, key) == getattr(other, key)
    assert set(vars(module)) == set(vars(other))
    ours, theirs = module.__spec__, other.__spec__
    assert ours is not None and theirs is not None
    for key in ("name", "origin", "has_location", "cached", "parent"):
        assert getattr(ours, key) == getattr(theirs, key)
    assert isinstance(ours.loader, SourceFileLoader) and ours.loader is module.__loader__
    assert inspect.getsource(module.handler) == ECHO
    sys.modules[name] = module
    (root / f"{name}.py").write_text("# changed, and longer than before: times may be the same\n")
    assert importlib.reload(module) is module


@pytest.mark.parametrize("case", ["package", "extension", "missing", "dotted", "folder"])
def test_what_is_not_plain_is_left_to_importlib(root: Path, name: str, case: str) -> None:
    if case != "missing":
        (root / f"{name}.py").write_text(ECHO)
    if case == "package":
        (root / name).mkdir()
        (root / name / "__init__.py").write_text("here = 1\n")
    elif case == "extension":
        (root / f"{name}{EXTENSION_SUFFIXES[0]}").write_bytes(b"")
    elif case == "folder":
        (root / name).mkdir()  # a module comes before a namespace: importlib knows that
    assert plain(f"{name}.more" if case == "dotted" else name, str(root)) is None
    if case == "package":
        assert imported(name).here == 1


def test_modules_of_the_standard_library(root: Path) -> None:
    """What is loaded, built in or frozen comes before the code, as with importlib; else the code
    comes first."""
    for name in ("json", "sys", "_frozen_importlib", "zipimport"):
        (root / f"{name}.py").write_text("raise AssertionError\n")
        assert plain(name, str(root)) is None
    with pytest.raises(LoadError, match="missing on module 'json'"):
        load("json.handler", str(root))
    (root / "this.py").write_text(ECHO)
    assert load("this.handler", str(root)).__code__.co_filename == str(root / "this.py")
    del sys.modules["this"]


@pytest.mark.parametrize("mode", [UNCHECKED, CHECKED, TIMES])
@pytest.mark.parametrize("old", [False, True])
def test_compiled_modules_count_as_much_as_for_importlib(
    root: Path, name: str, mode: py_compile.PycInvalidationMode, old: bool
) -> None:
    """One that says that it need not be checked is taken, whatever became of its source."""
    path = root / f"{name}.py"
    path.write_text("value = 1\ndef f():\n    raise KeyError\n")
    py_compile.compile(str(path), dfile="elsewhere.py", invalidation_mode=mode)
    if old:
        path.write_text("value = 22\ndef f():\n    raise KeyError\n")
    module = plain(name, str(root))
    assert module is not None
    other = imported(name)
    assert module.value == other.value == (22 if old and mode is not UNCHECKED else 1)
    assert module.f.__code__.co_filename == other.f.__code__.co_filename == str(path)


def test_a_compiled_module_of_another_python_is_not_taken(root: Path, name: str) -> None:
    path = root / f"{name}.py"
    path.write_text("value = 1\n")
    cached = Path(py_compile.compile(str(path), invalidation_mode=UNCHECKED) or "")
    path.write_text("value = 22\n")
    cached.write_bytes(b"\0\0" + cached.read_bytes()[2:])
    module = plain(name, str(root))
    assert module is not None and module.value == 22


def test_a_module_that_fails_leaves_nothing(root: Path, name: str) -> None:
    (root / f"{name}.py").write_text("raise OSError('at import')\n")
    with pytest.raises(OSError, match="at import"):
        plain(name, str(root))
    assert name not in sys.modules


def test_a_module_may_put_another_in_its_place(root: Path, name: str) -> None:
    (root / f"{name}.py").write_text("import sys, json\nsys.modules[__name__] = json\n")
    assert plain(name, str(root)) is json
    del sys.modules[name]


SIBLINGS = """
import json, other
json.JSONEncoder.default = lambda self, value: sorted(value)
def handler(event, context):
    return [other.value, event, {3, 1, 2}]
"""


def test_a_handler_imports_its_siblings_and_may_change_json(guest: Guest) -> None:
    guest.write("app.py", SIBLINGS)
    guest.write("other.py", "import app\nvalue = app.__name__\n")

    async def body(caller: Caller) -> None:
        await caller.load()
        assert (await caller.invoke(b' {"a": 1} \n')).payload == b'["app", {"a": 1}, [1, 2, 3]]'
        for bad in (b"", b"{", b"[1,]", b"1 2"):
            failed = await caller.invoke(bad)
            assert json.loads(failed.payload)["errorType"] == "Runtime.UnmarshalError"

    calling(guest, body)


def test_large_and_small_requests_in_turn(guest: Guest) -> None:
    """That an answer was taken is said with the next request, however large that is."""
    guest.write("app.py", ECHO)

    async def body(caller: Caller) -> None:
        await caller.load()
        for number, size in enumerate((1, 65_300, 65_500, 1, 3_000_000, 1, 70_000, 1)):
            payload = b'"' + b"x" * size + b'"'
            assert (await caller.invoke(payload, request=f"r-{number}")).payload == payload

    calling(guest, body)


def test_an_answer_counts_once_when_the_runtime_dies_before_it_is_confirmed(guest: Guest) -> None:
    guest.write("app.py", "count = 0\ndef handler(event, context):\n    return event\n")

    async def body(caller: Caller) -> None:
        await caller.load()
        assert (await caller.invoke(b"[1]")).payload == b"[1]"
        await killed(guest)
        answer = await caller.invoke(b"[2]", request="r-2")
        assert not answer.begun and answer.ended == "killed by SIGKILL"

    calling(guest, body)


HEAD = b"POST /2018-06-01/runtime/invocation/r-1/response HTTP/1.1\r\nContent-Length: 2\r\n\r\n"
ASKS = b"GET /2018-06-01/runtime/invocation/next HTTP/1.1\r\n\r\n"


@pytest.mark.parametrize(
    "data",
    [
        HEAD.replace(b"r-1", b"r-2") + b"{}" + ASKS,
        HEAD.replace(b"response", b"error") + b"{}" + ASKS,
        HEAD + b"{ }" + ASKS,
        HEAD.replace(b": 2", b": +2") + b"{}" + ASKS,
        HEAD + b"{}",
        HEAD + b"{}" + ASKS[:-2],
        HEAD[:-4] + ASKS,
        ASKS,
        b"",
    ],
)
def test_what_is_not_an_answer_with_a_question_is_read_as_all_else(
    guest: Guest, data: bytes
) -> None:
    functions = guest.functions
    connection = functions._resident
    assert connection is not None
    assert not functions._quick(connection, HEAD + b"{}" + ASKS), "no request is under way"
    functions.give(b"r-1", b"", lambda result: None)
    assert not functions._quick(connection, data)
    functions.state, functions._event = EMPTY, None
