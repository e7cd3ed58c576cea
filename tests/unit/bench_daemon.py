"""A stand-in for the daemon that keeps clones and pools, for the benchmarks."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from aiohttp import web

from tests.unit.cli_daemon import CLONE, TEMPLATE, Daemon

TIERS = ("standby", "warm")
INFO = {
    "version": "0",
    "pid": os.getpid(),
    "accel": "tcg",
    "qemu_version": "7.2.0",
    "state_dir": "/nonexistent",
    "shm_dir": "/nonexistent",
    "metrics": None,
    "transport": "fd",
    "confine": True,
    "clones": 0,
}


class Fleet(Daemon):
    """Every clone is distinct and has this process's pid; a pool gains a member per look at it."""

    def __init__(self, socket: str) -> None:
        super().__init__(socket)
        self.clones: dict[str, dict[str, Any]] = {}
        self.made: list[str] = []
        self.most = 0
        """The largest number of clones there was at a time."""
        self.target = dict.fromkeys(TIERS, 0)
        self.ready = dict.fromkeys(TIERS, 0)
        self.spec_pool = dict.fromkeys(TIERS, 0)
        self.puts: list[dict[str, Any]] = []
        self.problem = ""
        self.delay = 0.0
        """Seconds that a start takes."""
        self.fails_at: int | None = None
        self.same: dict[str, str] = {}
        """Parts of an identity that all clones share, as they never may."""

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        self.requests.append((request.method, request.path_qs, body))
        given = json.loads(body) if body else {}
        match request.method, request.path.split("/")[2:]:
            case "GET", ["info"]:
                return web.json_response(INFO)
            case "GET", ["templates"]:
                return web.json_response([TEMPLATE])
            case "GET", ["templates", "python-fn"]:
                spec = {"name": "python-fn", "pool": self.spec_pool}
                return web.json_response({**TEMPLATE, "spec": spec})
            case "GET", ["clones"]:
                return web.json_response(list(self.clones.values()))
            case "POST", ["clones"]:
                return await self._start(given)
            case "DELETE", ["clones", name]:
                return self._remove(name)
            case "GET", ["pools", "python-fn"]:
                return web.json_response(self._pool())
            case "PUT", ["pools", "python-fn"]:
                self.puts.append(given)
                sizes = self.spec_pool if given.get("reset") else given
                self.target.update(sizes)
                self.ready = {tier: min(self.ready[tier], self.target[tier]) for tier in TIERS}
                return web.json_response(self._pool())
        return _error(404, "not_found")

    async def _start(self, given: dict[str, Any]) -> web.StreamResponse:
        number, path = len(self.made), given.get("path", "direct")
        self.made.append(given["name"])
        if number == self.fails_at:
            return _error(502, "start_failed")
        if path in TIERS:
            if not self.ready[path]:
                return _error(429, "busy")
            self.ready[path] -= 1
        clone = {**CLONE, "name": given["name"], "path": path, "pid": os.getpid()}
        clone["uuid"] = f"6f1c3a52-0000-4000-8000-{number:012}"
        parts = ("mac", "ip", "hostname", "machine_id", "boot_id")
        clone["identity"] = {**{part: f"{part} {number}" for part in parts}, **self.same}
        clone["state"] = "starting"
        self.clones[given["name"]] = clone
        await asyncio.shield(asyncio.sleep(self.delay))
        clone["state"] = "running"
        self.most = max(self.most, len(self.clones))
        return web.json_response(clone, status=201)

    def _remove(self, name: str) -> web.StreamResponse:
        if name not in self.clones:
            return _error(404, "not_found")
        if self.clones[name]["state"] == "starting":
            # Over at the next look, as a start ends that nobody waits for any more.
            self.clones[name]["state"] = "running"
            return _error(409, "conflict")
        del self.clones[name]
        return web.Response(status=204)

    def _pool(self) -> dict[str, Any]:
        view = {tier: {"target": self.target[tier], "ready": self.ready[tier]} for tier in TIERS}
        for tier in TIERS:
            self.ready[tier] += self.ready[tier] < self.target[tier] and not self.problem
        return {"template": "python-fn", **view, "problem": self.problem}


def _error(status: int, code: str) -> web.Response:
    error = {"code": code, "message": f"no luck: {code}", "hint": "try something else"}
    return web.json_response({"error": error}, status=status)


@contextlib.contextmanager
def fleet(socket: Path) -> Iterator[Fleet]:
    """One that serves."""
    served = Fleet(str(socket))
    served.start()
    try:
        yield served
    finally:
        served.stop()
