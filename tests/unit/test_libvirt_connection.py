"""The connection to libvirt, over libvirt's own `test` driver, which needs no daemon."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from templated.drivers.libvirt import connection
from templated.drivers.libvirt.address import check_local
from templated.drivers.libvirt.connection import Connection, connect, connect_async
from templated.errors import (
    Conflict,
    HostError,
    HypervisorError,
    InvalidRequest,
    NotFound,
    TemplatedError,
    Timeout,
)

FAKE = "test:///default"


@pytest.fixture
def opened() -> Iterator[Connection]:
    found = connect(FAKE)
    yield found
    found.close()


@pytest.fixture
def stuck() -> Iterator[threading.Event]:
    """Set at the end, so that calls which wait for it come back."""
    event = threading.Event()
    yield event
    event.set()


@pytest.mark.parametrize(
    "uri", ["qemu:///system", "qemu:///session", "qemu+unix:///system?socket=/run/x", FAKE]
)
def test_local_uris(uri: str) -> None:
    assert check_local(uri) == uri


@pytest.mark.parametrize(
    ("uri", "why"),
    [
        ("qemu+ssh://root@other/system", "leads to another host"),
        ("qemu+ssh:///system", "leads to another host"),
        ("qemu://localhost/system", "leads to another host"),
        ("qemu+tcp://10.0.0.1:16509/system", "leads to another host"),
        ("qemu+ext:///system?command=/bin/x", "leads to another host"),
        ("qemu+unix://other/system", "leads to another host"),
        ("xen:///system", "of libvirt's driver xen"),
        ("qemu:///embed?root=/tmp", "neither /system nor /session"),
        ("qemu:///", "neither /system nor /session"),
        ("", "no connection URI"),
        ("system", "no connection URI"),
        ("qemu:///sys\ntem", "no connection URI"),
        ("qemu://[/system", "no connection URI"),
        ("qemu:///system?" + "x" * 1000, "no connection URI"),
    ],
)
def test_other_uris_are_refused(uri: str, why: str) -> None:
    with pytest.raises(InvalidRequest, match=why) as caught:
        connect(uri)
    assert len(str(caught.value)) < 300 and caught.value.hint


def test_versions(opened: Connection) -> None:
    assert int(opened.versions().libvirt.split(".")[0]) >= 9


def test_closed_twice(opened: Connection) -> None:
    opened.close()
    opened.close()
    assert not opened.alive
    with pytest.raises(HypervisorError, match="closed or broken"):
        opened.versions()


Work = Callable[[Any], Any]


@pytest.mark.parametrize(
    ("kind", "work"),
    [
        (NotFound, lambda c: c.lookupByName("nobody")),
        (NotFound, lambda c: c.networkLookupByName("nobody")),
        (Conflict, lambda c: [c.networkLookupByName("default").create()]),
        (HypervisorError, lambda c: c.defineXML("<domain>")),
    ],
)
def test_errors_of_libvirt(
    opened: Connection, kind: type[TemplatedError], work: Work, capfd: pytest.CaptureFixture[str]
) -> None:
    """Each is one of ours, in one line, and libvirt prints nothing by itself."""
    with pytest.raises(kind, match=r"the work: .+") as caught:
        opened.call("the work", work)
    assert type(caught.value) is kind
    assert capfd.readouterr() == ("", "")
    assert opened.alive


def test_errors_of_the_work(opened: Connection) -> None:
    with pytest.raises(KeyError):
        opened.call("the work", lambda c: {"a": 1}["b"])


def test_a_read_only_one_changes_nothing() -> None:
    found = connect(FAKE, read_only=True)
    with pytest.raises(HostError):
        found.call("the end", lambda c: c.lookupByName("test").destroy())
    found.close()


def test_a_call_that_hangs(opened: Connection, stuck: threading.Event) -> None:
    """It is given up, and the connection with it."""
    with pytest.raises(Timeout, match=r"the work: test:///default did not answer within 0\.01 s"):
        opened.call("the work", lambda c: stuck.wait(), bound=0.01)
    assert not opened.alive
    with pytest.raises(HypervisorError, match="broken"):
        opened.versions()


def test_not_too_many_hang(stuck: threading.Event) -> None:
    """A daemon that hangs for days costs a bounded number of threads."""
    connections = [connect(FAKE) for _ in range(connection._MOST_STUCK)]
    for found in connections:
        with pytest.raises(Timeout, match="did not answer"):
            found.call("the work", lambda c: stuck.wait(), bound=0.001)
    with pytest.raises(Timeout, match="calls have not come back"):
        connect(FAKE)
    stuck.set()
    while any(not future.done() for future in connection._stuck):
        pass
    connect(FAKE).close()


def test_not_too_many_are_left_to_hang(stuck: threading.Event) -> None:
    """Whose callers gave up before the bound of the call: they count, and keep their turns."""

    async def give_up(found: Connection) -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.001):
                await found.ask("the work", lambda c: stuck.wait())

    async def scenario() -> None:
        most = connection._MOST_STUCK // connection._AT_ONCE
        several = [await connect_async(FAKE) for _ in range(most + 1)]
        for found in several[:most]:
            for _ in range(connection._AT_ONCE):
                await give_up(found)
            with pytest.raises(Timeout, match="the wait for other calls"):
                await found.ask("the work", lambda c: c.getLibVersion(), bound=0.001)
            assert found.alive
        with pytest.raises(Timeout, match="calls have not come back"):
            await several[most].ask("the work", lambda c: c.getLibVersion())
        stuck.set()
        while any(not future.done() for future in connection._stuck):
            await asyncio.sleep(0)
        for found in several * 2:
            assert await found.ask("the work", lambda c: c.getLibVersion()) > 0
        for found in several:
            found.close()

    asyncio.run(scenario())


def test_from_the_loop(stuck: threading.Event) -> None:
    async def scenario() -> None:
        found = await connect_async(FAKE)
        assert await found.ask("its name", lambda c: c.lookupByID(1).name()) == "test"
        with pytest.raises(NotFound):
            await found.ask("it", lambda c: c.lookupByName("nobody"))
        waiting = asyncio.ensure_future(found.ask("the work", lambda c: stuck.wait()))
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert found.alive  # who is cancelled says nothing about libvirt
        with pytest.raises(Timeout):
            await found.ask("the work", lambda c: stuck.wait(), bound=0.01)
        assert not found.alive

    asyncio.run(scenario())


def test_nothing_answers(tmp_path: Path) -> None:
    with pytest.raises(HostError, match="cannot connect to qemu") as caught:
        connect(f"qemu+unix:///system?socket={tmp_path}/none")
    assert "virsh" in caught.value.hint


def test_what_answers_says_nothing(tmp_path: Path) -> None:
    """A socket that takes the connection and never speaks."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen()
        with pytest.raises(Timeout, match="did not answer within"):
            connect(f"qemu+unix:///system?socket={tmp_path}/s", bound=0.2)


def test_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    connection.binding.cache_clear()
    monkeypatch.setitem(__import__("sys").modules, "libvirt", None)
    with pytest.raises(HostError, match="libvirt-python is not installed") as caught:
        connect(FAKE)
    assert "python3-libvirt" in caught.value.hint
