"""Requests of another user: a process that gives up its own uid, gid and groups, and then asks."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")


@dataclass(frozen=True)
class User:
    """Numbers of somebody, who need not be in any file of this host."""

    uid: int
    gid: int
    groups: tuple[int, ...] = ()


@dataclass(frozen=True)
class Answer:
    """The status, and the body as JSON where it is JSON."""

    status: int
    body: Any

    @property
    def code(self) -> str:
        """The code of the error, "" when it is none."""
        return str(self.body["error"]["code"]) if self.status >= 400 else ""


async def ask(user: User, path: Path, *requests: tuple[str, str, str]) -> list[Answer]:
    """Send requests (method, path, body) as `user`, on one connection of its own for all."""
    done = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, __file__, json.dumps([user.uid, user.gid, user.groups])],
        input=json.dumps(requests).encode(),
        stdout=subprocess.PIPE,
        # Who may do nothing but enter one directory needs no name for it.
        cwd=path.parent,
        timeout=30,
        check=True,
    )
    return [Answer(status, body) for status, body in json.loads(done.stdout)]


def _main(who: str) -> None:
    uid, gid, groups = json.loads(who)
    requests: Sequence[tuple[str, str, str]] = json.load(sys.stdin)
    os.setgroups(groups)
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)
    connection = http.client.HTTPConnection("localhost", timeout=20)
    connection.sock = socket.socket(socket.AF_UNIX)
    connection.sock.connect("templated.sock")
    answers = []
    for method, path, body in requests:
        connection.request(method, path, body.encode())
        answer = connection.getresponse()
        content = answer.read()
        is_json = answer.headers.get_content_type() == "application/json"
        answers.append((answer.status, json.loads(content) if is_json else None))
    json.dump(answers, sys.stdout)


if __name__ == "__main__":
    _main(sys.argv[1])
