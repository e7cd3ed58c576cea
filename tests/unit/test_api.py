"""The API on its real socket: what a client may send, and what every answer looks like."""

from __future__ import annotations

import base64
import contextlib
import grp
import json
import os
import socket
import stat
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest
from aiohttp import web

from templated.api import server
from templated.api.callers import Callers
from templated.api.routes import ROUTES
from templated.drivers.host.files import bind_private
from templated.drivers.hypervisor.fake import FakeHypervisor
from templated.errors import ConfigError, HostError
from templated.model.api import CloneRequest
from templated.model.config import Config, MetricsConfig, SocketConfig
from templated.services.daemon import Services
from tests.unit.fake_daemon import configured, play

BASE = "http://templated"
Talk = Callable[[aiohttp.ClientSession, Services, FakeHypervisor], Coroutine[Any, Any, None]]


@asynccontextmanager
async def client(path: str) -> AsyncIterator[aiohttp.ClientSession]:
    """A client of the unix socket."""
    connector = aiohttp.UnixConnector(path)
    async with aiohttp.ClientSession(BASE, connector=connector) as session:
        yield session


def talk(tmp_path: Path, talking: Talk) -> None:
    """Serve the API over a fake hypervisor, and talk to it."""

    async def scenario(running: Services, fake: FakeHypervisor) -> None:
        config = running.context.config
        async with server.listeners(config, running), client(config.socket) as session:
            await talking(session, running, fake)

    play(tmp_path, scenario)


def test_many_connect_at_once(tmp_path: Path) -> None:
    """Before the daemon comes to accept the first of them."""

    async def talking(
        session: aiohttp.ClientSession, running: Services, fake: FakeHypervisor
    ) -> None:
        with contextlib.ExitStack() as stack:
            for _ in range(400):
                one = stack.enter_context(socket.socket(socket.AF_UNIX))
                one.setblocking(False)
                one.connect(running.context.config.socket)

    talk(tmp_path, talking)


async def error_of(answer: aiohttp.ClientResponse) -> dict[str, str]:
    """The error in an answer, whose shape is always the same."""
    assert answer.content_type == "application/json", await answer.text()
    body = await answer.json()
    assert set(body) == {"error"} and set(body["error"]) == {"code", "message", "hint"}
    error: dict[str, str] = body["error"]
    assert error["message"] and "\n" not in error["message"] and "Traceback" not in str(body)
    return error


BAD = [
    ("POST", "/v1/clones", b"{", 400, "invalid", "not JSON"),
    ("POST", "/v1/clones", b"\xff", 400, "invalid", "not JSON"),
    ("POST", "/v1/clones", b"[]", 400, "invalid", "got `array`"),
    ("POST", "/v1/clones", b"{}", 400, "invalid", "field `name`"),
    ("POST", "/v1/clones", b"", 400, "invalid", "field `name`"),
    ("POST", "/v1/clones", b'{"name": 1}', 400, "invalid", "`$.name`"),
    ("POST", "/v1/clones", b'{"name": "a", "tier": 1}', 400, "invalid", "unknown field `tier`"),
    ("POST", "/v1/clones", b'{"name": "a", "count": 0}', 400, "invalid", "`$.count`"),
    ("POST", "/v1/clones", b'{"name": "a", "count": 1001}', 400, "invalid", "`$.count`"),
    ("POST", "/v1/clones", b'{"name": "a", "count": 1e99}', 400, "invalid", "`$.count`"),
    ("POST", "/v1/clones", b'{"name": "a", "path": "tepid"}', 400, "invalid", "`$.path`"),
    ("POST", "/v1/clones", b'{"name": "A"}', 400, "invalid", "upper case"),
    ("POST", "/v1/clones", b'{"name": "\\ud800"}', 400, "invalid", "not JSON"),
    ("POST", "/v1/clones", b'{"name": "a", "template": "x"}', 404, "not_found", "no template x"),
    ("POST", "/v1/clones", b"[" * 100_000, 400, "invalid", ""),
    ("GET", "/v1/clones/none", b"", 404, "not_found", "no clone none"),
    ("GET", "/v1/clones/..%2Fx", b"", 400, "invalid", "not a clone name"),
    ("GET", "/v1/clones/%FF", b"", 400, "invalid", "not a clone name"),
    ("DELETE", "/v1/clones/none", b"", 404, "not_found", "no clone none"),
    ("DELETE", "/v1/clones", b"", 405, "invalid", "Method Not Allowed"),
    ("PATCH", "/v1/clones/a", b"", 405, "invalid", "Method Not Allowed"),
    ("GET", "/", b"", 404, "not_found", "Not Found"),
    ("GET", "/v2/clones", b"", 404, "not_found", "Not Found"),
    ("POST", "/v1/clones/none/exec", b'{"argv": ["x"]}', 404, "not_found", "no clone"),
    ("POST", "/v1/clones/up/exec", b'{"argv": []}', 400, "invalid", "`$.argv`"),
    ("POST", "/v1/clones/up/exec", b'{"argv": "ls"}', 400, "invalid", "`$.argv`"),
    ("POST", "/v1/clones/up/exec", b'{"argv": ["x"], "timeout": 0}', 400, "invalid", "timeout"),
    ("POST", "/v1/clones/up/exec", b'{"argv": ["x"], "stdin": "?"}', 400, "invalid", "base64"),
    # Found by tests/fuzz/test_api.py.
    (
        *("POST", "/v1/clones/up/exec", b'{"argv": ["x"], "stdin": "\xc2\x80"}'),
        *(400, "invalid", "base64"),
    ),
    ("GET", "/v1/clones/up/logs?lines=x", b"", 400, "invalid", "lines is not a number"),
    ("GET", "/v1/clones/up/logs?lines=-1", b"", 400, "invalid", "lines must be between"),
    ("GET", "/v1/clones/none/logs?follow=true", b"", 404, "not_found", "no clone"),
    ("GET", "/v1/clones/up/files", b"", 400, "invalid", "absolute path"),
    ("GET", "/v1/clones/up/files?path=x", b"", 400, "invalid", "absolute path"),
    ("PUT", "/v1/clones/up/files?path=/x&mode=9", b"", 400, "invalid", "octal"),
    ("GET", "/v1/templates/none", b"", 404, "not_found", "no template none"),
    ("DELETE", "/v1/templates/none", b"", 404, "not_found", "no template none"),
    ("POST", "/v1/templates/none/build", b"", 404, "not_found", "no template none"),
    ("POST", "/v1/templates/x/build", b'{"spec": "name: y"}', 400, "invalid", "of template y"),
    ("POST", "/v1/templates/x/build", b'{"spec": "name: x\\nz: 1"}', 400, "config", ":2: "),
    ("POST", "/v1/templates/t/rollback", b"", 409, "conflict", "no generation before"),
    ("DELETE", "/v1/templates/t", b"", 409, "conflict", "1 clones of template t exist"),
    ("POST", "/v1/clones", b'{"name": "up"}', 409, "conflict", "up exists already"),
    ("GET", "/v1/operations/none", b"", 404, "not_found", "no operation none"),
    ("GET", "/v1/operations/none/events", b"", 404, "not_found", "no operation none"),
]


def test_bad_requests(tmp_path: Path) -> None:
    """Each is refused with its status, its code and a message that names what is wrong."""

    async def talking(
        session: aiohttp.ClientSession, running: Services, fake: FakeHypervisor
    ) -> None:
        await running.clones.create(CloneRequest(name="up"))
        for method, path, body, status, code, message in BAD:
            async with session.request(method, path, data=body) as answer:
                error = await error_of(answer)
                assert (answer.status, error["code"]) == (status, code), (method, path, error)
                assert message in error["message"], (method, path)
        assert len(running.clones) == 1 and len(fake.running()) == 1

    talk(tmp_path, talking)


def test_a_message_is_one_line(tmp_path: Path) -> None:
    """Whatever is in the request."""

    async def talking(
        session: aiohttp.ClientSession, running: Services, fake: FakeHypervisor
    ) -> None:
        for name in ("a\nb", "x" * 100_000):
            async with session.post("/v1/clones", json={"name": "a", "template": name}) as answer:
                assert len((await error_of(answer))["message"]) < 1000

    talk(tmp_path, talking)


def test_a_body_that_is_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is refused without being kept."""
    monkeypatch.setattr(server, "_MAX_BODY", 1000)

    async def talking(
        session: aiohttp.ClientSession, running: Services, fake: FakeHypervisor
    ) -> None:
        async with session.post("/v1/clones", data=b" " * 2000) as answer:
            assert answer.status == 413
            assert "Too Large" in (await error_of(answer))["message"]

    talk(tmp_path, talking)


def test_a_defect_is_told_and_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The client gets one line, the log the traceback, and the daemon goes on."""

    async def talking(
        session: aiohttp.ClientSession, running: Services, fake: FakeHypervisor
    ) -> None:
        with monkeypatch.context() as patched:
            patched.setattr(running.clones, "views", lambda: 1 // 0)
            async with session.get("/v1/clones") as answer:
                assert answer.status == 500
                error = await error_of(answer)
        assert error["code"] == "internal" and "ZeroDivisionError" in error["message"]
        async with session.get("/v1/clones") as answer:
            assert await answer.json() == []

    talk(tmp_path, talking)
    assert "ZeroDivisionError" in caplog.text


def test_a_clones_life(tmp_path: Path) -> None:
    """Made, listed, shown, removed; every answer is what the routes say."""

    async def talking(
        session: aiohttp.ClientSession, running: Services, fake: FakeHypervisor
    ) -> None:
        async with session.post("/v1/clones", json={"name": "a"}) as answer:
            assert answer.status == 201
            one = await answer.json()
        assert {"name", "template", "generation", "state", "path", "pid", "uuid"} <= set(one)
        assert set(one["identity"]) >= {"mac", "ip", "hostname", "machine_id"}
        phases = ["allocate", "spawn", "restore", "resume", "identify", "link"]
        assert list(one["phases_ms"]) == phases and one["total_ms"] > 0
        async with session.post("/v1/clones", json={"name": "b", "count": 1}) as answer:
            assert [c["name"] for c in await answer.json()] == ["b-1"]
        async with session.get("/v1/clones") as answer:
            assert [c["name"] for c in await answer.json()] == ["a", "b-1"]
        async with session.get("/v1/clones/a") as answer:
            assert await answer.json() == one
        async with session.delete("/v1/clones/a") as answer:
            assert (answer.status, await answer.read()) == (204, b"")
        async with session.get("/v1/events") as answer:
            assert answer.content_type == "application/x-ndjson"
            types = [json.loads(line)["type"] for line in (await answer.text()).splitlines()]
        assert types == ["clone.running", "clone.running", "clone.removed"]
        async with session.get("/v1/clones/b-1/logs") as answer:
            assert (answer.status, await answer.text()) == (200, "")

    talk(tmp_path, talking)


def test_a_failed_start(tmp_path: Path) -> None:
    """502, with the phase in the message and a hint."""

    async def talking(
        session: aiohttp.ClientSession, running: Services, fake: FakeHypervisor
    ) -> None:
        fake.fail = "restore"
        async with session.post("/v1/clones", json={"name": "a"}) as answer:
            error = await error_of(answer)
        assert (answer.status, error["code"]) == (502, "start_failed")
        assert "phase restore" in error["message"] and error["hint"]

    talk(tmp_path, talking)


def test_about_the_daemon(tmp_path: Path) -> None:
    """Info, templates, OpenAPI and metrics, on the same socket."""

    async def talking(
        session: aiohttp.ClientSession, running: Services, fake: FakeHypervisor
    ) -> None:
        async with session.get("/v1/info") as answer:
            info = await answer.json()
        assert info["qemu_version"] == "7.2.0" and info["pid"] == os.getpid()
        assert (info["accel"], info["metrics"], info["clones"]) == ("tcg", None, 0)
        async with session.get("/v1/templates") as answer:
            (template,) = await answer.json()
        assert template["active"] and template["problem"] == ""
        async with session.get("/v1/templates/t") as answer:
            assert (await answer.json())["manifest"]["qemu"]["version"] == "7.2.0"
        async with session.get("/v1/openapi.json") as answer:
            assert len((await answer.json())["paths"]) == len({r.path for r in ROUTES})
        async with session.get("/metrics") as answer:
            assert "templated_build_info" in await answer.text()

    talk(tmp_path, talking)


def test_images(tmp_path: Path) -> None:
    """Those that are complete, with the templates that need them."""

    async def talking(
        session: aiohttp.ClientSession, running: Services, fake: FakeHypervisor
    ) -> None:
        # The template was frozen on an image named "none".
        for name in ("none", "other", "incomplete"):
            folder = Path(running.context.config.state_dir) / "images" / name
            folder.mkdir(parents=True, exist_ok=True)
            for file in ("disk.qcow2", "vmlinuz", "initrd"):
                (folder / file).touch()
            record: dict[str, Any] = {
                "digest": name,
                "built_at": 1.0 + (name == "other"),
                "spec": {},
            }
            (folder / "image.json").write_text(json.dumps(record))
        (folder / "initrd").unlink()
        async with session.get("/v1/images") as answer:
            images = await answer.json()
        assert [(i["digest"], i["templates"]) for i in images] == [("none", ["t"]), ("other", [])]
        assert images[0]["built_at"] == "1970-01-01T00:00:01+00:00"
        assert (images[0]["suite"], images[0]["packages"]) == ("bookworm", [])

    talk(tmp_path, talking)


@pytest.mark.parametrize(
    ("accept", "media"),
    [
        ("", "text/plain"),
        ("*/*", "text/plain"),
        ("application/openmetrics-text;version=1.0.0", "application/openmetrics-text"),
    ],
)
def test_metrics(tmp_path: Path, accept: str, media: str) -> None:
    """In the format that is asked for, with the same samples."""

    async def talking(
        session: aiohttp.ClientSession, running: Services, fake: FakeHypervisor
    ) -> None:
        await running.clones.create(CloneRequest(name="a"))
        async with session.get("/metrics", headers={"Accept": accept}) as answer:
            assert (answer.status, answer.content_type) == (200, media)
            text = await answer.text()
        for sample in (
            'templated_clones{state="running",template="t"} 1.0',
            'templated_clone_seconds_bucket{le="30.0",path="direct",template="t"} 1.0',
            'templated_events_total{type="clone.running"} 1.0',
        ):
            assert sample in text

    talk(tmp_path, talking)


def test_an_operation(tmp_path: Path) -> None:
    """A build answers at once; its events end with why it failed: here no image can be stored."""

    async def talking(
        session: aiohttp.ClientSession, running: Services, fake: FakeHypervisor
    ) -> None:
        spec = {"spec": "name: x\nimage: {mirror: 'file:///nowhere'}"}
        (Path(running.context.config.state_dir) / "images").touch()
        async with session.post("/v1/templates/x/build", json=spec) as answer:
            assert answer.status == 202
            operation = await answer.json()
        assert operation["state"] == "running" and operation["kind"] == "build"
        async with session.get(f"/v1/operations/{operation['id']}/events") as answer:
            events = [json.loads(line) for line in (await answer.text()).splitlines()]
        assert events[-1]["type"] == "end" and events[-1]["error"]["message"]
        async with session.get(f"/v1/operations/{operation['id']}") as answer:
            assert (await answer.json())["state"] == "failed"

    talk(tmp_path, talking)


def test_exec_without_an_end(tmp_path: Path) -> None:
    """A guest that dies under a command ends the stream with why."""

    async def talking(
        session: aiohttp.ClientSession, running: Services, fake: FakeHypervisor
    ) -> None:
        await running.clones.create(CloneRequest(name="a"))
        (machine,) = fake.running()
        machine.fail = "silence"
        body = {"argv": ["x"], "stdin": base64.b64encode(b"in").decode()}
        async with session.post("/v1/clones/a/exec", json=body) as answer:
            assert answer.content_type == "application/x-ndjson"
            machine.end("was killed")
            frames = [json.loads(line) async for line in answer.content]
        assert len(frames) == 1 and frames[0]["done"] and frames[0]["error"]
        async with session.post("/v1/clones/a/exec", json=body) as answer:
            assert (await error_of(answer))["code"] == "conflict"

    talk(tmp_path, talking)


def test_who_asks(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Changes are logged with the caller's uid, from the kernel."""
    caplog.set_level("INFO", "templated.api")

    async def talking(
        session: aiohttp.ClientSession, running: Services, fake: FakeHypervisor
    ) -> None:
        await session.post("/v1/clones", json={"name": "a"})
        await session.get("/v1/clones")

    talk(tmp_path, talking)
    lines = [r.getMessage() for r in caplog.records if r.name == "templated.api"]
    assert lines == [f"uid {os.getuid()}: POST /v1/clones: 201"]


def test_no_uid_over_tcp(tmp_path: Path) -> None:
    """There is nobody to ask."""
    seen = []

    async def handler(request: web.Request) -> web.Response:
        seen.append(Callers(None).of(request).uid)
        return web.Response()

    async def scenario(running: Services, fake: FakeHypervisor) -> None:
        app = web.Application()
        app.router.add_get("/", handler)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        host, port = runner.addresses[0][:2]
        async with aiohttp.ClientSession() as session, session.get(f"http://{host}:{port}/"):
            pass
        await runner.cleanup()

    play(tmp_path, scenario)
    assert seen == [None]


def served(tmp_path: Path, check: Callable[[Path], None] = lambda _: None, **changes: Any) -> Path:
    """Serve with a changed configuration, look at the socket, and stop; the socket's path."""
    path = Path(configured(tmp_path).socket)

    async def scenario(running: Services, fake: FakeHypervisor) -> None:
        config: Config = msgspec.structs.replace(running.context.config, **changes)
        async with server.listeners(config, running):
            check(Path(config.socket))

    play(tmp_path, scenario)
    return path


def test_the_sockets_access(tmp_path: Path) -> None:
    """Mode and group are as configured, and the socket goes with the daemon."""
    group = grp.getgrgid(os.getgid()).gr_name

    def check(path: Path) -> None:
        status = path.stat()
        assert stat.S_ISSOCK(status.st_mode) and stat.S_IMODE(status.st_mode) == 0o620
        assert status.st_gid == os.getgid()

    path = served(tmp_path, check, socket_access=SocketConfig(mode="0620", group=group))
    assert not path.exists()


def test_the_default_access(tmp_path: Path) -> None:
    """Owner and group, nobody else."""

    def check(path: Path) -> None:
        assert stat.S_IMODE(path.stat().st_mode) == 0o660

    served(tmp_path, check)


def test_a_socket_is_private_without_a_umask(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A umask is the whole process's: under one, a thread once made a directory for nobody."""
    before = os.umask(0)
    try:
        with monkeypatch.context() as fixed, socket.socket(socket.AF_UNIX) as listener:
            fixed.setattr(os, "umask", None)
            bind_private(listener, tmp_path / "socket")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "socket").stat().st_mode) == 0o600


def test_listening_leaves_the_umask_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of the daemon's own socket."""
    masks: list[int] = []
    monkeypatch.setattr(os, "umask", masks.append)
    served(tmp_path)
    assert masks == []


def _error_of_serving(tmp_path: Path, kind: type[Exception], **changes: Any) -> Exception:
    with pytest.raises(kind) as caught:
        served(tmp_path, **changes)
    return caught.value


def test_no_such_group(tmp_path: Path) -> None:
    """Told with the command that makes it."""
    access = SocketConfig(group="nobody-has-this")
    error = _error_of_serving(tmp_path, ConfigError, socket_access=access)
    assert isinstance(error, ConfigError) and "groupadd" in error.hint


def test_a_socket_that_is_in_use(tmp_path: Path) -> None:
    """A second daemon is refused, and the first one's socket stays."""
    path = tmp_path / "other.sock"
    with socket.socket(socket.AF_UNIX) as first:
        first.bind(str(path))
        first.listen()
        error = _error_of_serving(tmp_path, HostError, socket=str(path))
        assert "another daemon listens" in str(error) and path.is_socket()


def test_a_port_that_is_taken(tmp_path: Path) -> None:
    """One line that names the address."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        listen = f"127.0.0.1:{taken.getsockname()[1]}"
        error = _error_of_serving(tmp_path, HostError, metrics=MetricsConfig(listen=listen))
        assert listen in str(error)


def test_a_port_that_cannot_be(tmp_path: Path) -> None:
    """Told in one line as well."""
    _error_of_serving(tmp_path, HostError, metrics=MetricsConfig(listen="127.0.0.1:99999"))


def test_a_stale_socket(tmp_path: Path) -> None:
    """What a killed daemon left is replaced."""
    path = tmp_path / "stale.sock"
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))
    served(tmp_path, socket=str(path))


def test_a_file_in_the_sockets_place(tmp_path: Path) -> None:
    """Nothing that is not ours is removed."""
    path = tmp_path / "precious"
    path.write_text("mine")
    with pytest.raises(HostError, match="is no socket"):
        served(tmp_path, socket=str(path))
    assert path.is_file() and path.read_text() == "mine"
