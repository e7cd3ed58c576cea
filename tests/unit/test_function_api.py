"""Functions on the unix socket, over parts that are as small as can be."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from io import BytesIO
from pathlib import Path
from typing import Any, cast

import aiohttp
import pytest
from yarl import URL

from templated.api import server
from templated.client import AsyncClient
from templated.drivers.hypervisor.fake import FakeHypervisor
from templated.errors import HostError, InvalidRequest, RemoteError, Throttled
from templated.journal import FunctionRows
from templated.model.function import MAX_PAYLOAD, EventState
from templated.services.daemon import Services
from templated.services.functions.functions import Functions
from templated.services.functions.uploads import Uploads
from tests.unit.fake_daemon import play, run
from tests.unit.fake_functions import FakeCode, FakeRouter, FakeShifts, with_functions
from tests.unit.test_api import client, error_of

BASE = "/v1/functions"
SETTINGS = {"handler": "app.handler", "env": {"KEY": "secret-value"}, "timeout": "5s"}
Work = Callable[[aiohttp.ClientSession, Services], Awaitable[None]]


def functions_of(running: Services) -> Functions:
    """Those of a daemon."""
    return running.functions


def talk(tmp_path: Path, *works: Work) -> None:
    """Serve the API with functions, and talk to it; each on a daemon that was started anew."""

    def scenario(work: Work) -> Any:
        async def serve(running: Services, fake: FakeHypervisor) -> None:
            running = await with_functions(running)
            config = running.context.config
            async with server.listeners(config, running), client(config.socket) as session:
                await work(session, running)

        return serve

    play(tmp_path, *map(scenario, works))


async def ask(
    session: aiohttp.ClientSession, method: str, path: str, status: int = 200, **options: Any
) -> Any:
    """The JSON of an answer of this status."""
    async with session.request(method, path, **options) as answer:
        assert answer.status == status, await answer.text()
        return await answer.json() if await answer.read() else None


async def deploy(session: aiohttp.ClientSession, name: str = "f", code: bytes = b"PK") -> Any:
    """A function of this code."""
    query = {"settings": json.dumps(SETTINGS)}
    return await ask(session, "PUT", f"{BASE}/{name}", params=query, data=code)


def incoming(running: Services) -> list[Path]:
    """Uploads that are there."""
    return list(running.context.layout.incoming.glob("*"))


def test_the_life_of_a_function(tmp_path: Path) -> None:
    """Deploy, publish, alias, invoke, remove; all of it over a restart."""

    async def first(session: aiohttp.ClientSession, running: Services) -> None:
        made = await deploy(session)
        assert (made["name"], made["handler"], made["timeout_s"]) == ("f", "app.handler", 5.0)
        assert (made["template"], made["runtime"], made["reserved"]) == ("t", "python", None)
        assert made["code"]["bytes"] == 2 and made["instances"] == {"busy": 0, "paused": 1}
        (latest,) = made["versions"]
        assert (latest["version"], latest["env"]) == ("$LATEST", ["KEY"])
        assert "secret-value" not in json.dumps(made) and incoming(running) == []
        version = await ask(session, "POST", f"{BASE}/f/versions", 201, json={"description": "d"})
        assert (version["version"], version["description"]) == ("1", "d")
        changed = await ask(session, "PUT", f"{BASE}/f?settings=%7B%22timeout%22:%229s%22%7D")
        assert changed["update"] is None
        assert changed["timeout_s"] == 9.0 and changed["code"] == made["code"]
        await ask(session, "POST", f"{BASE}/f/versions", 201)
        alias = {"versions": {"1": 0.9, "2": 0.1}, "description": "x"}
        assert await ask(session, "PUT", f"{BASE}/f/aliases/live", json=alias) == {
            "name": "live",
            **alias,
        }
        shifts = running.functions.shifts
        assert isinstance(shifts, FakeShifts)
        assert (shifts.hurried, shifts.settling, shifts.moved) == ([("f", 60)] * 2, 2, [60])
        await ask(session, "PUT", f"{BASE}/f?ready=0&background=true")
        await ask(session, "PUT", f"{BASE}/f/aliases/live?ready=5", json=alias)
        assert (shifts.hurried[2:], shifts.settling, shifts.moved[1:]) == ([("f", 0)], 2, [5])
        reserved = await ask(session, "PUT", f"{BASE}/f/concurrency", json={"reserved": 4})
        assert reserved["reserved"] == 4
        scaled = await ask(session, "PUT", f"{BASE}/f/scale", json={"min": 1, "max": 9})
        assert (scaled["min"], scaled["max"], scaled["provisioned"]) == (1, 9, [])
        for qualifier in ("live", "2"):
            where = f"{BASE}/f/provisioned/{qualifier}"
            scaled = await ask(session, "PUT", where, json={"count": 1})
        (two, live) = scaled["provisioned"]
        assert (live["qualifier"], live["requested"], live["available"]) == ("live", 1, 1)
        assert (two["qualifier"], two["status"]) == ("2", "READY")
        await ask(session, "DELETE", f"{BASE}/f/provisioned/2", 204)
        assert (await ask(session, "PUT", f"{BASE}/f/scale", json={"max": 0}))["max"] is None

    async def second(session: aiohttp.ClientSession, running: Services) -> None:
        (shown,) = await ask(session, "GET", BASE)
        assert shown == await ask(session, "GET", f"{BASE}/f")
        assert [v["version"] for v in shown["versions"]] == ["$LATEST", "2", "1"]
        assert [a["name"] for a in shown["aliases"]] == ["live"] and shown["reserved"] == 4
        assert (shown["min"], shown["max"]) == (1, None)
        assert [p["qualifier"] for p in shown["provisioned"]] == ["live"]
        answer = await ask(session, "POST", f"{BASE}/f/invoke?qualifier=2", data=b'{"a": 1}')
        assert answer["payload"] == {"a": 1} and answer["version"] == "2"
        assert set(answer) == {
            *("status", "error", "payload", "version", "instance", "start"),
            *("phases_ms", "total_ms", "trace"),
        }
        trace = {"X-Amzn-Trace-Id": "Root=1"}
        await ask(session, "POST", f"{BASE}/f/invoke", data=b"1", headers=trace)
        router: Any = running.functions.router
        assert router.traces == ["", "Root=1"]
        error = await ask(session, "DELETE", f"{BASE}/f?version=2", 409)
        assert "alias live" in error["error"]["message"]
        await ask(session, "DELETE", f"{BASE}/f/aliases/live", 204)
        await ask(session, "DELETE", f"{BASE}/f?version=2", 204)
        await ask(session, "DELETE", f"{BASE}/f", 204)
        assert await ask(session, "GET", BASE) == []

    talk(tmp_path, first, second)


def test_invoke(tmp_path: Path) -> None:
    """The payload is JSON of a bounded size; a function that fails is an answer."""

    async def first(session: aiohttp.ClientSession, running: Services) -> None:
        await deploy(session)
        path = f"{BASE}/f/invoke"
        assert (await ask(session, "POST", path))["payload"] == {}
        failed = await ask(session, "POST", path, data=b'"fail"')
        assert failed["error"] == "Unhandled" and failed["payload"]["errorType"] == "ValueError"
        async with session.post(f"{path}?tail=true", data=b"1") as answer:
            log = base64.b64decode(answer.headers["X-Templated-Log"])
            assert log.startswith(b"START") and (await answer.json())["payload"] == 1
        async with session.post(path, data=b"1") as answer:
            assert "X-Templated-Log" not in answer.headers
        exact = b'"' + b"x" * (MAX_PAYLOAD - 2) + b'"'
        assert (
            len((await ask(session, "POST", path, data=BytesIO(exact)))["payload"])
            == MAX_PAYLOAD - 2
        )

    talk(tmp_path, first)


BAD = [
    ("POST", "/f/invoke", b"{a}", 400, "not JSON"),
    ("POST", "/f/invoke", b'"\xff"', 400, "not JSON"),
    ("POST", "/f/invoke", b"[" * 100_000, 400, "nested too deeply"),
    ("POST", "/f/invoke", b" " * (MAX_PAYLOAD + 1), 400, "larger than 6 MiB"),
    ("POST", "/f/invoke?qualifier=a/b", b"1", 400, "neither a version nor an alias"),
    ("POST", "/f/invoke?qualifier=none", b"1", 404, "no version or alias none"),
    ("POST", "/f/invoke?qualifier=none&event=true", b"1", 404, "no version or alias none"),
    ("POST", "/g/invoke", b"1", 404, "no function g"),
    ("GET", "/g", b"", 404, "no function g"),
    ("GET", "/g/logs", b"", 404, "no function g"),
    ("GET", "/..%2F..%2Fx/logs?follow=true", b"", 404, "no function ../../x"),
    ("GET", "/f/logs?lines=x", b"", 400, "not a number"),
    ("GET", "/g/events", b"", 404, "no function g"),
    ("POST", "/g/events/e/retry", b"", 404, "no function g"),
    ("POST", "/f/events/e/retry", b"", 404, "no dead letter e"),
    ("DELETE", "/g/events", b"", 404, "no function g"),
    ("PUT", "/f?settings=%7B", b"PK", 400, "settings is not JSON"),
    ("PUT", "/f?settings=%7B%22color%22:1%7D", b"PK", 400, "settings: Object contains unknown"),
    ("PUT", "/f?settings=" + "%5B" * 5000, b"PK", 400, "settings"),
    ("PUT", "/a%2Fb?settings=%7B%22handler%22:%22a.b%22%7D", b"PK", 400, "not a function name"),
    ("PUT", "/new", b"PK", 400, "needs a handler"),
    ("PUT", "/new?settings=%7B%22handler%22:%22a.b%22%7D", b"", 400, "needs code"),
    ("PUT", "/f/aliases/live", b'{"versions": {}}', 400, "length"),
    ("PUT", "/f/aliases/3", b'{"versions": {"$LATEST": 1}}', 400, "not the name of an alias"),
    ("PUT", "/f/concurrency", b"{}", 400, "reserved"),
    ("PUT", "/f/concurrency", b'{"reserved": -1}', 400, "reserved"),
    ("PUT", "/f?ready=x", b"", 400, "ready is not a number"),
    ("PUT", "/f/aliases/live?ready=9999", b'{"versions": {"$LATEST": 1}}', 400, "0 and 3600"),
    ("PUT", "/f/scale", b'{"min": -1}', 400, "min"),
    ("PUT", "/f/scale", b'{"min": 3, "max": 2}', 400, "3 instances, and its max is 2"),
    ("PUT", "/f/scale", b'{"min": 101}', 400, "functions.concurrency is 100"),
    ("PUT", "/g/scale", b'{"min": 1}', 404, "no function g"),
    ("PUT", "/f/provisioned/$LATEST", b'{"count": 1}', 400, "nothing is provisioned"),
    ("PUT", "/f/provisioned/none", b'{"count": 1}', 404, "no version or alias none"),
    ("PUT", "/f/provisioned/none", b'{"count": 0}', 400, "count"),
    ("DELETE", "/f/provisioned/9", b"", 404, "nothing is provisioned for f:9"),
    ("POST", "/f/versions", b'{"digest": "x"}', 400, "digest"),
    ("DELETE", "/f?version=$LATEST", b"", 400, "cannot be removed alone"),
    ("DELETE", "/f?version=", b"", 400, "neither a version"),
    ("DELETE", "/f/aliases/none", b"", 404, "no alias none"),
]


@pytest.mark.parametrize(("method", "path", "body", "status", "message"), BAD)
def test_bad_requests(
    tmp_path: Path, method: str, path: str, body: bytes, status: int, message: str
) -> None:
    """One line that says what is wrong; the function is as before, and no upload is left."""

    async def first(session: aiohttp.ClientSession, running: Services) -> None:
        before = await deploy(session)
        async with session.request(
            method, URL(f"{BASE}{path}", encoded=True), data=BytesIO(body)
        ) as answer:
            error = await error_of(answer)
        assert answer.status == status, error
        assert message in error["message"] and len(error["message"]) < 600
        assert await ask(session, "GET", BASE) == [before] and incoming(running) == []

    talk(tmp_path, first)


def test_events(tmp_path: Path) -> None:
    """An accepted one is in the journal before it is answered."""

    async def first(session: aiohttp.ClientSession, running: Services) -> None:
        await deploy(session)
        path = f"{BASE}/f/invoke?event=true"
        assert await ask(session, "POST", path, 202, data=b'{"a": 1}') == {"id": "e-0"}
        (row,) = await FunctionRows(running.context.journal).events()
        assert (row.id, row.payload) == ("e-0", b'{"a": 1}')
        await ask(session, "POST", path, 400, data=b"{a}")
        (event,) = await ask(session, "GET", f"{BASE}/f/events")
        assert (event["id"], event["payload"], event["qualifier"]) == ("e-0", {"a": 1}, "$LATEST")
        assert event["state"] == EventState.QUEUED.value

    talk(tmp_path, first)


def test_throttled(tmp_path: Path) -> None:
    """429, and when to try again in whole seconds."""

    async def first(session: aiohttp.ClientSession, running: Services) -> None:
        await deploy(session)
        router = cast(FakeRouter, functions_of(running).router)
        router.error = Throttled("the queue is full", reason="queue", retry_after=1.2, hint="wait")
        async with session.post(f"{BASE}/f/invoke", data=b"1") as answer:
            error = await error_of(answer)
        assert (answer.status, answer.headers["Retry-After"]) == (429, "2")
        assert (error["code"], error["message"]) == ("busy", "the queue is full")

    talk(tmp_path, first)


def test_logs(tmp_path: Path) -> None:
    """The last lines, and what follows."""

    async def first(session: aiohttp.ClientSession, running: Services) -> None:
        await deploy(session)
        for query, expected in (("lines=2", "two\nthree\n"), ("lines=1&follow=1", "three\nfour\n")):
            async with session.get(f"{BASE}/f/logs?{query}") as answer:
                assert answer.content_type == "text/plain" and await answer.text() == expected

    talk(tmp_path, first)


def test_what_is_recorded(tmp_path: Path) -> None:
    """Who changed which settings, no value of the environment, and no request of a function."""

    async def first(session: aiohttp.ClientSession, running: Services) -> None:
        await deploy(session)
        await ask(session, "POST", f"{BASE}/f/versions", 201)
        alias = {"versions": {"1": 1.0}}
        await ask(session, "PUT", f"{BASE}/f/aliases/live", json=alias)
        await ask(session, "PUT", f"{BASE}/f/concurrency", json={"reserved": None})
        await ask(session, "POST", f"{BASE}/f/invoke?qualifier=live", data=b'"secret-value"')
        await ask(session, "POST", f"{BASE}/f/invoke?event=1", 202, data=b'"secret-value"')
        await ask(session, "DELETE", f"{BASE}/f/aliases/live", 204)
        await ask(session, "DELETE", f"{BASE}/f?version=1", 204)
        entries = await running.audit.read(100)
        assert [(e.action, e.target, e.detail) for e in entries] == [
            ("deploy_function", "f", "code handler env timeout"),
            ("publish_function", "f", "version 1"),
            ("set_alias", "f", "live 1=1"),
            ("set_concurrency", "f", "reserved none"),
            ("remove_alias", "f", "live"),
            ("remove_function", "f", "version 1"),
        ]
        assert "secret-value" not in str(entries)

    talk(tmp_path, first)


def test_settings_as_long_as_they_may_be(tmp_path: Path) -> None:
    """They are a part of the request's line."""

    async def first(session: aiohttp.ClientSession, running: Services) -> None:
        async with AsyncClient(running.context.config.socket) as api:
            env = {"A": "ü" * 2000, "B": "\x01" * 90}
            made = await api.deploy_function("f", b"PK", handler="a.b", env=env)
            assert made.versions[0].env == ("A", "B")
            assert functions_of(running).registry.latest("f").settings.env == env

    talk(tmp_path, first)


def test_the_client(tmp_path: Path) -> None:
    """Typed answers, and errors as the daemon has them."""

    async def first(session: aiohttp.ClientSession, running: Services) -> None:
        async with AsyncClient(running.context.config.socket) as api:
            await api.deploy_function("f", b"PK", handler="a.b", timeout="9s")
            assert (await api.publish_function("f")).version == "1"
            assert (await api.set_alias("f", "live", {"1": 1.0})).versions == {"1": 1.0}
            assert (await api.set_concurrency("f", None)).reserved is None
            outcome = await api.invoke_function("f", b'{"a": [1]}', qualifier="live")
            assert bytes(outcome.payload) == b'{"a":[1]}' or bytes(outcome.payload) == b'{"a": [1]}'
            assert (await api.queue_event("f")).id == "e-0"
            (event,) = await api.function_events("f")
            assert event.state is EventState.QUEUED and event.payload == {}
            with pytest.raises(RemoteError, match="no dead letter e-0"):
                await api.retry_event("f", "e-0")
            await api.purge_events("f")
            assert [chunk async for chunk in api.function_logs("f", 1)] == [b"three\n"]
            assert [f.name for f in await api.list_functions()] == ["f"]
            assert (await api.show_function("f")).aliases[0].name == "live"
            await api.remove_alias("f", "live")
            await api.remove_function("f", "1")
            await api.remove_function("f")
            with pytest.raises(RemoteError, match="no function f"):
                await api.show_function("f")

    talk(tmp_path, first)


def test_a_client_that_goes_away(tmp_path: Path) -> None:
    """In the middle of its upload: nothing of it is left."""

    async def chunks(sent: asyncio.Event) -> AsyncIterator[bytes]:
        yield b"PK" * 1000
        sent.set()
        await asyncio.sleep(20)

    async def first(session: aiohttp.ClientSession, running: Services) -> None:
        sent = asyncio.Event()
        task = asyncio.ensure_future(deploy(session, code=cast(bytes, chunks(sent))))
        await sent.wait()
        while not incoming(running):
            await asyncio.sleep(0.005)
        task.cancel()
        await asyncio.wait({task})
        while incoming(running):
            await asyncio.sleep(0.005)
        assert functions_of(running).registry.names() == []

    talk(tmp_path, first)


def test_two_deploys_at_once(tmp_path: Path) -> None:
    """Both are answered, each with a file of its own, and one of them is what is there."""

    async def first(session: aiohttp.ClientSession, running: Services) -> None:
        code = cast(FakeCode, functions_of(running).code)
        code.pause = asyncio.Event()
        both = [asyncio.ensure_future(deploy(session, code=b"PK%d" % n)) for n in range(2)]
        while len(incoming(running)) < 2:
            await asyncio.sleep(0.005)
        code.pause.set()
        await asyncio.gather(*both)
        assert len(code.admitted) == 2 and incoming(running) == []
        assert functions_of(running).registry.latest("f").code.digest in code.admitted

    talk(tmp_path, first)


# Uploads


async def each(*chunks: bytes) -> AsyncIterator[bytes]:
    """The chunks."""
    for chunk in chunks:
        yield chunk


def test_uploads(tmp_path: Path) -> None:
    """A file for as long as it is needed, of a bounded size."""

    async def main() -> None:
        folder = tmp_path / "incoming"
        uploads = Uploads(folder, limit=2 << 20)
        async with uploads.receive(each(b"ab", b"", b"c")) as path:
            assert path is not None and await asyncio.to_thread(path.read_bytes) == b"abc"
            assert path.stat().st_mode & 0o077 == 0 or folder.stat().st_mode & 0o077 == 0
        async with uploads.receive(each(b"", b"")) as none:
            assert none is None
        with pytest.raises(InvalidRequest, match="larger than 2 MiB"):
            async with uploads.receive(each(b"x" * (2 << 20), b"y")):
                raise AssertionError
        assert list(folder.iterdir()) == []
        (folder / "left").touch()
        await uploads.open()
        assert not folder.exists()

    run(main())


def test_an_upload_without_a_place(tmp_path: Path) -> None:
    """An error of the host, in one line."""

    async def main() -> None:
        (tmp_path / "file").touch()
        with pytest.raises(HostError, match="the code cannot be received: File exists") as caught:
            async with Uploads(tmp_path / "file").receive(each(b"x")):
                raise AssertionError
        assert "state_dir" in caught.value.hint

    run(main())
