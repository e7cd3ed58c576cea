"""The audit log: what is in it, what is not, and what its files and disks may do to it."""

from __future__ import annotations

import asyncio
import base64
import errno
import json
import os
import socket
import stat
from collections.abc import AsyncGenerator, Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest
from yarl import URL

from templated.drivers.guest import Agent, Output
from templated.errors import Conflict, HostError
from templated.journal import now
from templated.model.api import AuditEntry, CloneRequest
from templated.model.config import AuditConfig
from templated.services.daemon import Services
from templated.services.reports import audit
from templated.services.reports.audit import AuditLog
from tests.unit.as_user import User, ask, needs_root
from tests.unit.fake_daemon import run, until
from tests.unit.test_access import serve

CONFIDENTIAL = "hunter2"
Work = Callable[[aiohttp.ClientSession, Services], Awaitable[None]]


def talk(tmp_path: Path, work: Work) -> None:
    """Serve, and talk to the daemon as its own user."""

    async def scenario(path: Path, running: Services) -> None:
        connector = aiohttp.UnixConnector(str(path))
        async with aiohttp.ClientSession("http://x", connector=connector) as session:
            await work(session, running)

    serve(tmp_path, scenario)


async def send(
    session: aiohttp.ClientSession, method: str, path: str, body: object = None
) -> tuple[int, bytes]:
    """One request; its status and its whole answer."""
    async with session.request(method, path, json=body) as answer:
        return answer.status, await answer.read()


async def audited(session: aiohttp.ClientSession, query: str = "") -> list[dict[str, Any]]:
    """The log, as the API shows it."""
    status, body = await send(session, "GET", f"/v1/audit{query}")
    assert status == 200
    return [json.loads(line) for line in body.splitlines()]


def entry(target: str, **changes: Any) -> AuditEntry:
    """An entry of now."""
    common: dict[str, Any] = {"time": now(), "uid": 1, "pid": 2, "outcome": "ok", "status": 204}
    return AuditEntry(action="remove_clone", target=target, **{**common, **changes})


def targets(entries: list[AuditEntry]) -> list[str]:
    """What they are about."""
    return [one.target for one in entries]


# What is recorded


def test_who_changed_what(tmp_path: Path) -> None:
    """Every request that changes something or reaches into a guest; in order, with its outcome."""

    async def work(session: aiohttp.ClientSession, running: Services) -> None:
        await send(session, "POST", "/v1/clones", {"name": "a"})
        await send(session, "POST", "/v1/clones", {"name": "b", "count": 2})
        await send(session, "POST", "/v1/clones", {"name": "a"})
        await send(session, "POST", "/v1/clones", {"name": 5})
        await send(session, "PUT", "/v1/pools/t", {"standby": 1, "warm": 0})
        await send(session, "PUT", "/v1/clones/none/files?path=/etc/x")
        await send(session, "GET", "/v1/clones/none/files?path=/etc/shadow")
        await send(session, "DELETE", "/v1/clones/b-1")
        await send(session, "POST", "/v1/templates/t/rollback")
        await send(session, "GET", "/v1/clones")
        await send(session, "POST", "/v1/nonsense")
        entries = await audited(session)
        shown = [
            [e[k] for k in ("action", "target", "detail", "outcome", "status")] for e in entries
        ]
        assert shown == [
            ["create_clones", "a", "", "ok", 201],
            ["create_clones", "b", "count 2", "ok", 201],
            ["create_clones", "a", "", "conflict", 409],
            ["create_clones", "", "", "invalid", 400],
            ["set_pool", "t", "standby 1 warm 0", "ok", 200],
            ["put_file", "none", "/etc/x", "not_found", 404],
            ["get_file", "none", "/etc/shadow", "not_found", 404],
            ["remove_clone", "b-1", "", "ok", 204],
            ["rollback", "t", "", "conflict", 409],
        ]
        whos = {(e["uid"], e["pid"], e["role"]) for e in entries}
        assert whos == {(os.geteuid(), os.getpid(), "admin")}
        assert entries == sorted(entries, key=lambda e: str(e["time"]))

    talk(tmp_path, work)


def test_nothing_secret(tmp_path: Path) -> None:
    """Of a command only the program; no arguments, no environment, no input, no file's content."""

    async def work(session: aiohttp.ClientSession, running: Services) -> None:
        body = {
            "argv": ["/bin/login", CONFIDENTIAL],
            "env": {"PASSWORD": CONFIDENTIAL},
            "stdin": base64.b64encode(CONFIDENTIAL.encode()).decode(),
        }
        assert (await send(session, "POST", "/v1/clones/none/exec", body))[0] == 404
        await session.put("/v1/clones/none/files?path=/x", data=CONFIDENTIAL.encode())
        await send(
            session, "POST", "/v1/templates/t/build", {"spec": CONFIDENTIAL, "source": CONFIDENTIAL}
        )
        entries = await audited(session)
        assert [(e["action"], e["detail"]) for e in entries] == [
            ("exec_in_clone", "/bin/login"),
            ("put_file", "/x"),
            ("build_template", ""),
        ]
        path = running.context.layout.audit
        assert CONFIDENTIAL not in path.read_text()
        assert stat.S_IMODE(path.stat().st_mode) == 0o600

    talk(tmp_path, work)


def test_what_is_long_is_cut(tmp_path: Path) -> None:
    """A caller decides on names and paths, not on the size of the log."""

    async def work(session: aiohttp.ClientSession, running: Services) -> None:
        body = {"argv": ["x" * 100_000]}
        await send(session, "POST", f"/v1/clones/{'y' * 5000}/exec", body)
        (only,) = await audited(session)
        assert (only["detail"], only["target"]) == ("x" * 200, "y" * 200)

    talk(tmp_path, work)


def test_what_is_no_text(tmp_path: Path) -> None:
    """Is recorded as well as it can be shown."""

    async def work(session: aiohttp.ClientSession, running: Services) -> None:
        base = URL("http://x/v1/clones/%FF/files?path=/%FF%0A", encoded=True)
        async with session.get(base) as answer:
            assert answer.status == 400
        await send(session, "POST", "/v1/clones", {"name": "a\nb\x00"})
        (read, made) = await audited(session)
        assert (read["action"], read["outcome"]) == ("get_file", "invalid")
        assert read["detail"].startswith("/") and made["target"] == "a\nb\x00"

    talk(tmp_path, work)

    async def main() -> None:
        log = AuditLog(tmp_path / "a", 1 << 20)
        log.add(entry("\udcff", detail="/\udcff"))
        assert targets(await log.read(10)) == ["?"]

    run(main())


@needs_root
def test_refusals(tmp_path: Path) -> None:
    """Are recorded, but nobody can fill the log with them."""
    stranger = User(40005, 40005)

    async def work(session: aiohttp.ClientSession, running: Services) -> None:
        path = next(tmp_path.glob("open/*.sock"))
        remove = ("DELETE", "/v1/clones/a", "")
        await ask(stranger, path, *[remove] * 50, ("GET", "/v1/clones/a/files?path=/x", ""))
        refused, read = await audited(session)
        assert (refused["uid"], refused["user"], refused["role"]) == (40005, "", "")
        assert (refused["action"], refused["target"]) == ("remove_clone", "a")
        assert (refused["outcome"], refused["status"], read["outcome"]) == (
            "forbidden",
            403,
            "forbidden",
        )
        assert refused["pid"] != os.getpid()
        assert read["action"] == "get_file"

    talk(tmp_path, work)


def test_refusals_that_were_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Are counted in the next entry of their kind."""
    clock = [1000.0]
    monkeypatch.setattr(audit, "monotonic", lambda: clock[0])

    async def main() -> None:
        log = AuditLog(tmp_path / "a", 1 << 20)
        for number in range(5):
            log.add(entry(f"first {number}", outcome="forbidden"))
        log.add(entry("of another", outcome="forbidden", uid=3))
        clock[0] += audit._REFUSALS
        log.add(entry("later", outcome="forbidden"))
        log.add(entry("done"))
        found = [(one.target, one.left_out) for one in await log.read(100)]
        assert found == [("first 0", 0), ("of another", 0), ("later", 4), ("done", 0)]
        for uid in range(audit._KINDS + 10):
            log.add(entry("many", outcome="forbidden", uid=uid))
        assert len(log._refusals) <= audit._KINDS

    run(main())


def test_what_ends_with_the_daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Is recorded as cancelled."""
    begun = asyncio.Event()

    async def endless(agent: Agent, argv: list[str], **options: object) -> AsyncGenerator[Output]:
        begun.set()
        await asyncio.Event().wait()
        yield Output("stdout", b"")

    monkeypatch.setattr(Agent, "exec", endless)
    paths = []

    async def scenario(path: Path, running: Services) -> None:
        paths.append(running.context.layout.audit)
        await running.clones.create(CloneRequest(name="a"))
        client.connect(str(path))
        body = b'{"argv": ["sleep"]}'
        head = f"POST /v1/clones/a/exec HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        client.sendall(head.encode() + body)
        await begun.wait()

    with socket.socket(socket.AF_UNIX) as client:
        serve(tmp_path, scenario)
    (only,) = [json.loads(line) for line in paths[0].read_bytes().splitlines()]
    assert (only["action"], only["detail"]) == ("exec_in_clone", "sleep")
    assert (only["outcome"], only["status"]) == ("cancelled", 0)


@pytest.mark.usefixtures("no_blocking_calls")
def test_no_request_waits_for_it(tmp_path: Path) -> None:
    """Nothing of it blocks the event loop."""

    async def main() -> None:
        log = AuditLog(tmp_path / "a", 1 << 20)
        writing = asyncio.ensure_future(log.run())
        log.add(entry("x"))
        await until((tmp_path / "a").exists)
        assert targets(await log.read(10)) == ["x"]
        writing.cancel()

    run(main())


# What is asked for


def test_filters(tmp_path: Path) -> None:
    """The last ones; of a user by name or uid; of the last seconds."""

    async def main() -> None:
        log = AuditLog(tmp_path / "a", 1 << 20)
        log.add(entry("old", time=now(ago=3600)))
        log.add(entry("root's", uid=0))
        log.add(entry("another's", uid=40001))
        log.add(entry("nobody's", uid=None))
        assert targets(await log.read(100)) == ["old", "root's", "another's", "nobody's"]
        assert targets(await log.read(2)) == ["another's", "nobody's"]
        assert targets(await log.read(0)) == []
        assert targets(await log.read(100, since=60)) == ["root's", "another's", "nobody's"]
        assert targets(await log.read(100, user="root")) == ["root's"]
        assert targets(await log.read(100, user="0")) == ["root's"]
        assert targets(await log.read(1, since=60, user="40001")) == ["another's"]
        assert (await log.read(100, user="root"))[0].user == "root"

    run(main())


def test_queries(tmp_path: Path) -> None:
    """Of the API, and what is none."""

    async def work(session: aiohttp.ClientSession, running: Services) -> None:
        for name in ("a", "b"):
            await send(session, "DELETE", f"/v1/clones/{name}")
        assert [e["target"] for e in await audited(session, "?lines=1")] == ["b"]
        assert len(await audited(session, f"?since=60&user={os.geteuid()}")) == 2
        assert await audited(session, "?user=has-none") == []
        for query in ("lines=x", "lines=-1", "since=-1", f"since={10**20}", "since=1e3"):
            status, body = await send(session, "GET", f"/v1/audit?{query}")
            assert status == 400 and b"invalid" in body, query

    talk(tmp_path, work)


def test_switched_off(tmp_path: Path) -> None:
    """Nothing is written, and who asks is answered."""

    async def main() -> None:
        log = AuditLog(tmp_path / "a", None)
        log.add(entry("x"))
        await log.flush()
        with pytest.raises(Conflict, match="switched off") as caught:
            await log.read(1)
        assert "audit:" in caught.value.hint

    run(main())
    assert list(tmp_path.iterdir()) == []


def test_its_size(tmp_path: Path) -> None:
    """Is bounded from below, too: an entry must fit."""
    assert msgspec.convert({"size": "64KiB"}, AuditConfig).size == "64KiB"
    with pytest.raises(msgspec.ValidationError, match="at least 64KiB"):
        msgspec.convert({"size": "63KiB"}, AuditConfig)


# Its files


def test_rotation(tmp_path: Path) -> None:
    """Two files of bounded size, and the newest entries without a gap."""
    limit = 4000

    async def main() -> None:
        log = AuditLog(tmp_path / "a", limit)
        for number in range(300):
            log.add(entry(str(number)))
            if number % 7 == 0:
                await log.flush()
        found = targets(await log.read(1000))
        assert found == [str(number) for number in range(300 - len(found), 300)]
        assert len(found) >= 20
        assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "a.1"]
        assert all(0 < path.stat().st_size <= limit for path in tmp_path.iterdir())
        # The next daemon goes on.
        again = AuditLog(tmp_path / "a", limit)
        again.add(entry("300"))
        assert targets(await again.read(2)) == ["299", "300"]

    run(main())


def test_an_entry_larger_than_a_file(tmp_path: Path) -> None:
    """Has a file of its own; nothing waits for ever."""

    async def main() -> None:
        log = AuditLog(tmp_path / "a", 100)
        for number in range(3):
            log.add(entry(str(number)))
        assert targets(await log.read(10)) == ["1", "2"]

    run(main())


@pytest.mark.parametrize("damage", [b'{"time": "20', b"\xff\xfe", b"[]", b"{}", b'{"time":1}\n\n'])
def test_damaged_lines(tmp_path: Path, damage: bytes) -> None:
    """As a killed daemon leaves them: they are left out, and cost no other entry."""

    async def main() -> None:
        path = tmp_path / "a"
        log = AuditLog(path, 1 << 20)
        log.add(entry("before"))
        await log.flush()
        with open(path, "ab") as file:
            file.write(damage)
        assert targets(await log.read(10)) == ["before"]
        log = AuditLog(path, 1 << 20)
        log.add(entry("after"))
        assert targets(await log.read(10)) == ["before", "after"]

    run(main())


def test_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Fails no request; one warning, and what waited is written when there is room again."""
    write = os.write
    full = True

    def half(fd: int, data: bytes) -> int:
        """Take a part of it, and then nothing, as a disk does that fills up."""
        if not os.readlink(f"/proc/self/fd/{fd}").endswith("audit.jsonl"):
            return write(fd, data)
        if full and len(data) < 100:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(fd, data[:50] if full else data)

    async def work(session: aiohttp.ClientSession, running: Services) -> None:
        nonlocal full
        with monkeypatch.context() as patched:
            patched.setattr(os, "write", half)
            for name in ("a", "b", "c"):
                assert (await send(session, "POST", "/v1/clones", {"name": name}))[0] == 201
                await running.audit.flush()
            assert running.context.layout.audit.read_bytes() == b""
            assert await audited(session) == []
            full = False
            assert [e["target"] for e in await audited(session)] == ["a", "b", "c"]
            full = True
            await send(session, "DELETE", "/v1/clones/a")
            await running.audit.flush()
        await send(session, "DELETE", "/v1/clones/b")
        assert [e["target"] for e in await audited(session)] == ["a", "b", "c", "a", "b"]

    talk(tmp_path, work)
    warnings = [r.getMessage() for r in caplog.records if "audit log" in r.getMessage()]
    assert len(warnings) == 2  # one for each time that the disk was full
    assert "No space left" in warnings[0]


def test_what_waits_is_bounded(tmp_path: Path) -> None:
    """However long the disk takes nothing: the newest are kept."""

    async def main() -> None:
        log = AuditLog(tmp_path, 1 << 20)  # a folder can't be written to
        for number in range(2 * audit._WAITING):
            log.add(entry(str(number)))
            if number == audit._WAITING:
                await log.flush()
        await log.flush()
        assert len(log._lines) == audit._WAITING and not log._waiting
        assert f'"{2 * audit._WAITING - 1}"'.encode() in log._lines[-1]
        with pytest.raises(HostError, match="cannot read the audit log"):
            await log.read(1)

    run(main())


def test_it_is_written_without_being_asked_for(tmp_path: Path) -> None:
    """A moment after the answer; and what is left at the daemon's end."""
    paths = []

    async def work(session: aiohttp.ClientSession, running: Services) -> None:
        path = running.context.layout.audit
        paths.append(path)
        await send(session, "DELETE", "/v1/clones/early")
        await until(lambda: path.exists() and b"early" in path.read_bytes())
        await send(session, "DELETE", "/v1/clones/late")

    talk(tmp_path, work)
    assert b'"late"' in paths[0].read_bytes()


@needs_root
def test_who_may_read_it(tmp_path: Path) -> None:
    """Admins alone, on the socket and on the disk."""

    async def scenario(path: Path, running: Services) -> None:
        (answer,) = await ask(User(40001, 40001), path, ("GET", "/v1/audit", ""))
        assert answer.code == "forbidden" and "role admin" in answer.body["error"]["message"]

    serve(tmp_path, scenario)
