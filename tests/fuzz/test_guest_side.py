"""The guest's side of the agent protocol: whatever it is told, it answers the next ping."""

from __future__ import annotations

import json
import math
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import strategies as st

from templated.drivers.hypervisor.fake_guest import FakeSystem
from templated.guest.agent import commands
from templated.guest.agent.commands import Agent
from templated.guest.agent.kernel import System
from templated.guest.agent.port import Source
from tests.fuzz.cases import fuzz
from tests.fuzz.values import JSON, NUMBERS, mutated, nested
from tests.unit.test_agent import identity

_TURNS = 20_000


class Kernel(FakeSystem):
    """As picky as a real one about numbers, with files that must exist before they are read."""

    write, read, forget = System.write, System.read, System.forget

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.run = self.etc = str(folder)
        self.open_files()

    def set_clock(self, seconds: float) -> None:
        int(seconds * 1e9).to_bytes(12, signed=True)


# Never an absolute path or a program that does something: this runs on the host.
_PATHS = st.sampled_from(["file", "folder", "folder/x", ".", "", "a\0b", "\ud800", "y" * 300])
_ARGV = st.sampled_from(
    [["true"], ["echo", "a"], ["cat"], ["no-such-program"], ["folder"], [""], ["a\0b"], [None]]
)
_PACKED = st.one_of(
    st.just(identity().fields()["packed"]),
    st.binary(max_size=1100).map(bytes.hex),
    mutated(st.just(identity().fields()["packed"].encode())).map(lambda b: b.decode("latin-1")),
)
_USUAL: dict[str, dict[str, st.SearchStrategy[Any]]] = {
    "ping": {},
    "quiesce": {},
    "identify": {"packed": _PACKED},
    "clock": {"adjust": NUMBERS},
    "exec": {"argv": _ARGV, "timeout": NUMBERS, "stdin": st.sampled_from(["", "YQ==", "é"])},
    "put": {"path": _PATHS, "data": st.just("YQ=="), "offset": NUMBERS, "eof": st.booleans()},
    "get": {"path": _PATHS, "offset": NUMBERS, "length": NUMBERS},
}
# Fields whose value may be anything, since no value of them reaches further than the folder.
_FREE = ("id", "timeout", "stdin", "env", "adjust", "offset", "length", "eof", "mode", "packed")


@st.composite
def _request(draw: st.DrawFn) -> bytes:
    command = draw(st.sampled_from(sorted(_USUAL)))
    fields = {name: draw(values) for name, values in _USUAL[command].items()}
    request: dict[str, Any] = {"id": draw(st.integers(0, 9)), "cmd": command, **fields}
    for name in draw(st.lists(st.sampled_from(_FREE), max_size=2)):
        request[name] = draw(JSON)
    for name in draw(st.lists(st.sampled_from(sorted(request)), max_size=1)):
        del request[name]
    return json.dumps(request).encode()


_HARMLESS = st.sampled_from(
    [
        b'{"id": 1, "cmd": "ping"}',
        b'{"id": 1, "cmd": "clock", "adjust": 1}',
        b'{"id": 1, "cmd": "quiesce"}',
        json.dumps({"id": 1, "cmd": "identify", **identity().fields()}).encode(),
    ]
)
_HUGE = st.sampled_from(
    [
        b"x" * (3 << 20),
        nested(100_000),
        b'{"id": 1e999, "cmd": "clock", "adjust": 1e999}',
        b'{"id": ' + b"9" * 5000 + b', "cmd": "ping"}',
        *(b'{"cmd": "fly", "id": ' + nested(depth) + b"}" for depth in range(850, 1000, 3)),
    ]
)
_JSON = JSON.map(lambda value: json.dumps(value).encode())
_LINE = st.one_of(_request(), _request(), mutated(_HARMLESS), _JSON, st.binary(max_size=60), _HUGE)
_LINES = st.lists(_LINE, min_size=1, max_size=6)


@contextmanager
def _agent(kernel: Kernel) -> Iterator[tuple[Agent, socket.socket]]:
    port, far_end = socket.socketpair()
    for end in (port, far_end):
        end.setblocking(False)
    agent = Agent(far_end.fileno(), far_end.fileno(), kernel)
    try:
        yield agent, port
    finally:
        _until(agent, port, lambda _: not agent.sources)
        agent.close()
        port.close()
        far_end.close()


def _until(agent: Agent, port: socket.socket, done: Callable[[bytes], bool]) -> None:
    """Turn the agent, with a bound, and take what it says."""
    said = b""
    for _ in range(_TURNS):
        if done(said):
            return
        for source in agent.sources:
            _shorten(source)
        agent.turn(0.001)
        try:
            said += port.recv(1 << 20)
        except BlockingIOError:
            pass
        said = said[said.rfind(b"\n", 0, -1) + 1 :]
    raise AssertionError(f"{len(agent.sources)} commands run on, and the last line is {said!r}")


def _shorten(source: Source) -> None:
    """The command's own deadline may be a day; that one comes is what is asked here."""
    if source.deadline is not None and not math.isnan(source.deadline):
        source.deadline -= 86400


def _send(agent: Agent, port: socket.socket, data: bytes) -> None:
    view = memoryview(data)
    while view:
        try:
            view = view[port.send(view) :]
        except BlockingIOError:
            agent.turn(0)
            try:
                port.recv(1 << 20)
            except BlockingIOError:
                pass


def test_hostile_requests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "work"
    (folder / "folder").mkdir(parents=True)
    monkeypatch.chdir(folder)
    # All that pytest holds would be looked through each time, and never be freed.
    monkeypatch.setattr(commands, "gc", SimpleNamespace(collect=int, freeze=int))
    kernel = Kernel(tmp_path)

    def case(lines: list[bytes]) -> None:
        with _agent(kernel) as (agent, port):
            for line in lines:
                _send(agent, port, line + b"\n")
                agent.turn(0)
            _send(agent, port, b'\n\n{"id":77,"cmd":"ping"}\n')
            _until(agent, port, lambda said: b'"id":77,"ok":true' in said)
        for path in folder.iterdir():
            if path.is_file():
                os.truncate(path, 0)

    fuzz("agent protocol, guest's side", _LINES, case)
