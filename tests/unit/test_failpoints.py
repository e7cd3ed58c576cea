"""Failpoints: off unless named, each declared and each used, and errors that say what is wrong."""

from __future__ import annotations

import ast
import asyncio
import errno
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from templated import failpoints
from templated.errors import ConfigError
from templated.failpoints import POINTS, Kind

PACKAGE = Path(failpoints.__file__).parent
# A family's places have the name of a call: where the place is, and where such names are written.
FAMILIES = {
    "agent.": ("drivers/guest.py", ["drivers/guest.py"], r'self\.request\(\s*"(\w+)"'),
    "qmp.": (
        "drivers/hypervisor/qemu/machine.py",
        ["drivers/hypervisor/qemu/machine.py"],
        r'_execute\(\s*"([\w-]+)"|_guarded\(.*, "([\w ]+)"\)',
    ),
    "journal.": (
        "journal/store.py",
        ["journal/store.py", "journal/functions.py", "journal/egresses.py"],
        r'self\.(?:_journal\.run|run|_transaction)\(\s*"(\w+)"',
    ),
}


@pytest.fixture(autouse=True)
def off() -> Iterator[None]:
    """No test leaves one switched on."""
    yield
    failpoints.arm("")


def used() -> set[str]:
    """The places in the code: literal names, and those of the families."""
    names = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("failpoints."):
                names |= _names(node, path)
    return names


def _names(call: ast.Call, path: Path) -> set[str]:
    if ast.unparse(call.func).rpartition(".")[2] not in ("hit", "reach", "around"):
        return set()
    name = call.args[0]
    if isinstance(name, ast.Constant):
        return {str(name.value)}
    assert isinstance(name, ast.JoinedStr), ast.unparse(call)
    parts = [str(part.value) if isinstance(part, ast.Constant) else "" for part in name.values]
    prefix, last = parts[0], parts[-1]
    module, writers, pattern = FAMILIES[prefix]
    assert path == PACKAGE / module
    found = [one for name in writers for one in re.findall(pattern, (PACKAGE / name).read_text())]
    members = {"".join(one) if isinstance(one, tuple) else one for one in found}
    return {f"{prefix}{member.split()[-1]}{last}" for member in members}


def test_declared_and_used() -> None:
    """Each declared place is in the code, and each in the code is declared."""
    in_code = used()
    reads = {f"journal.{name}.commit" for name in failpoints.READS} | {"journal.open.commit"}
    assert in_code - reads == set(POINTS)


def test_guarded() -> None:
    """While all are off, a place costs a look at one global: each stands below that `if`."""
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text())
        calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and _is_place(n)]
        guards = [n for n in ast.walk(tree) if isinstance(n, ast.If) and _is_guard(n)]
        inside = {id(n) for guard in guards for n in ast.walk(guard)}
        assert all(id(call) in inside for call in calls), path


def _is_place(call: ast.Call) -> bool:
    return ast.unparse(call.func) in ("failpoints.hit", "failpoints.reach", "failpoints.around")


def _is_guard(node: ast.If) -> bool:
    return ast.unparse(node.test).startswith("failpoints.armed")


def test_off() -> None:
    """Nothing is switched on by itself."""
    assert not failpoints.armed
    failpoints.hit("slot.files")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("slot.file=kill", "there is no failpoint slot.file"),
        ("slot.files", "is not NAME=KIND"),
        ("slot.files=explode", "cannot explode"),
        ("start.confirmed=error", "start.confirmed cannot error"),
        ("slot.files=error:ENOTHING", "there is no error ENOTHING"),
        ("slot.files=kill#0", "is not NAME=KIND"),
        ("@/nonexistent/file", "cannot read /nonexistent/file"),
    ],
)
def test_refused(text: str, expected: str) -> None:
    """A name or a kind that does not exist is an error, and nothing is switched on."""
    with pytest.raises(ConfigError, match=expected):
        failpoints.arm(text)
    assert not failpoints.armed


def test_the_daemon_refuses(tmp_path: Path) -> None:
    """`serve` ends with that line."""
    command = [sys.executable, "-m", "templated", "serve", "--config", str(tmp_path / "none.yaml")]
    environment = {**os.environ, failpoints.VARIABLE: "no.such=kill"}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2 and "there is no failpoint no.such" in done.stderr
    assert "Traceback" not in done.stderr


def test_errors_and_counts() -> None:
    """The error that a call raises, with a number of one's own, at the time that is named."""
    failpoints.arm("slot.files=error:ENOSPC#2,slot.overlay=error")
    failpoints.hit("slot.files")
    with pytest.raises(OSError, match=r"failpoint slot\.files") as raised:
        failpoints.hit("slot.files")
    assert raised.value.errno == errno.ENOSPC
    failpoints.hit("slot.files")
    with pytest.raises(OSError, match=r"slot\.overlay"):
        failpoints.hit("slot.overlay")


def test_a_file(tmp_path: Path) -> None:
    """A file is read again at each place."""
    orders = tmp_path / "orders"
    orders.write_text("")
    failpoints.arm(f"@{orders}")
    failpoints.hit("slot.files")
    orders.write_text("slot.files=error\n")
    with pytest.raises(failpoints.Injected):
        failpoints.hit("slot.files")


def test_a_hang_ends_when_it_is_cancelled() -> None:
    """On the event loop; the call behind it is never made."""
    failpoints.arm("qmp.cont=hang")
    made = []

    async def call() -> None:
        made.append(True)

    async def bounded() -> None:
        async with asyncio.timeout(0.05):
            await failpoints.around("qmp.cont", call())

    with pytest.raises(TimeoutError):
        asyncio.run(bounded())
    assert made == []


def test_kill() -> None:
    """SIGKILL, with nothing after it."""
    code = "from templated import failpoints as f; f.arm('slot.files=kill'); f.hit('slot.files')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL


def test_kinds() -> None:
    """A kill is possible everywhere; a hang only where a wait can end."""
    assert all(Kind.KILL in kinds for kinds in POINTS.values())
    assert all(Kind.ERROR in kinds for kinds in POINTS.values() if Kind.HANG in kinds)
