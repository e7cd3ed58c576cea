"""A stand-in for the daemon: real HTTP on a real unix socket, with canned answers."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from aiohttp import web

ROOT = Path(__file__).parents[2]
Reply = Callable[[web.Request], Awaitable[web.StreamResponse]]

CLONE: dict[str, Any] = {
    "name": "fn-123",
    "template": "python-fn",
    "generation": "20260101t000000-abcdef",
    "state": "running",
    "path": "direct",
    "pid": 4711,
    "uuid": "6f1c3a52-0000-4000-8000-000000000001",
    "identity": {
        "mac": "02:aa:bb:00:00:01",
        "ip": "10.77.0.3",
        "hostname": "fn-123",
        "machine_id": "0" * 32,
        "boot_id": "1" * 32,
    },
    "phases_ms": {"allocate": 0.4, "spawn": 44.1, "restore": 9.8, "resume": 0.7, "identify": 61.0},
    "total_ms": 116.2,
    "created": "2026-01-01T00:00:00Z",
    "reason": "",
}
GENERATION: dict[str, Any] = {
    "id": CLONE["generation"],
    "state": "ready",
    "active": True,
    "clones": 1,
    "created": CLONE["created"],
}
TEMPLATE: dict[str, Any] = {
    "name": "python-fn",
    "description": "Python functions",
    "active": GENERATION["id"],
    "generations": [GENERATION],
    "spec": None,
    "manifest": None,
    "problem": "",
}


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


class Daemon:
    """Answers what `on` was told to, 404 to anything else, and remembers the requests."""

    def __init__(self, socket: str) -> None:
        self.socket = socket
        self.requests: list[tuple[str, str, bytes]] = []
        self.connections: set[object] = set()
        self.release = threading.Event()
        """Lets an answer of `lines` go on after its first line."""
        self._replies: dict[tuple[str, str], Reply] = {}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def start(self) -> None:
        self._thread.start()
        self._call(self._serve())

    def stop(self) -> None:
        self.release.set()
        self._call(self._runner.cleanup())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def on(
        self,
        method: str,
        path: str,
        body: Any = None,
        status: int = 200,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """Answer with `body`: bytes as they are, anything else as JSON."""

        async def reply(request: web.Request) -> web.StreamResponse:
            if isinstance(body, bytes):
                return web.Response(body=body, status=status, headers=headers)
            return web.json_response(body, status=status, headers=headers)

        self._replies[method, path] = reply

    def fail(self, method: str, path: str, code: str, status: int = 500) -> None:
        """Answer with an error."""
        error = {"code": code, "message": f"no luck: {code}", "hint": "try something else"}
        self.on(method, path, {"error": error}, status)

    def lines(
        self, method: str, path: str, *items: Any, hold: bool = False, cut: bool = False
    ) -> None:
        """Answer with JSON lines.

        `hold` stops after the first until `release`; `cut` drops the connection at the end.
        """

        async def reply(request: web.Request) -> web.StreamResponse:
            response = web.StreamResponse()
            await response.prepare(request)
            for number, item in enumerate(items):
                if number == 1 and hold:
                    while not self.release.is_set():
                        await asyncio.sleep(0.01)
                await response.write(json.dumps(item).encode() + b"\n")
            if hold and len(items) == 1:
                while not self.release.is_set():
                    await asyncio.sleep(0.01)
            if cut and request.transport is not None:
                request.transport.abort()
            return response

        self._replies[method, path] = reply

    def _call(self, work: Any) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(10)

    async def _serve(self) -> None:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self._answer)
        self._runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=1)
        await self._runner.setup()
        await web.UnixSite(self._runner, self.socket).start()

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        self.requests.append((request.method, request.path_qs, await request.read()))
        self.connections.add(request.protocol)
        reply = self._replies.get((request.method, request.path))
        if reply is None:
            error = {"code": "not_found", "message": f"nothing at {request.path}", "hint": ""}
            return web.json_response({"error": error}, status=404)
        return await reply(request)


@contextlib.contextmanager
def serving(socket: Path) -> Iterator[Daemon]:
    """A daemon that knows one clone and one template."""
    served = Daemon(str(socket))
    served.on("GET", "/v1/clones", [CLONE])
    served.on("POST", "/v1/clones", CLONE, 201)
    served.on("GET", "/v1/clones/fn-123", CLONE)
    served.on("DELETE", "/v1/clones/fn-123", b"", 204)
    served.on("GET", "/v1/templates", [TEMPLATE])
    served.on("GET", "/v1/templates/python-fn", TEMPLATE)
    served.start()
    try:
        yield served
    finally:
        served.stop()


def command(*arguments: str) -> list[str]:
    # The tests may run where SIGINT is ignored, as in the background of a script.
    return ["env", "--default-signal=INT", sys.executable, "-m", "templated", *arguments]


def run(*arguments: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        command(*arguments), input=stdin, capture_output=True, cwd=ROOT, timeout=30, check=False
    )


def popen(*arguments: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command(*arguments),
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
