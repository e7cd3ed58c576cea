"""The code on a node: by the API, and by the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from templated.drivers.hypervisor.fake import FakeHypervisor
from templated.services.daemon import Services
from templated.services.functions import cache
from tests.unit.cli_daemon import Daemon, run
from tests.unit.code_images import make_image
from tests.unit.test_api import error_of, talk

_ROW: dict[str, Any] = {
    "digest": "ab" * 32,
    "bytes": 1234,
    "size": 8192,
    "used": "2026-01-01T00:00:00Z",
    "needed": True,
    "verified": False,
}


def test_the_code_of_a_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "make_image", make_image)
    archive = tmp_path / "archive"
    archive.write_text("one")

    async def talking(
        session: aiohttp.ClientSession, running: Services, fake: FakeHypervisor
    ) -> None:
        async def asked(method: str, path: str) -> Any:
            async with session.request(method, f"/v1/code{path}") as answer:
                assert answer.status == 200, await answer.text()
                return await answer.json()

        assert await asked("GET", "") == []
        digest = (await running.functions.code.admit(archive)).digest
        (row,) = await asked("GET", "")
        assert (row["digest"], row["needed"], row["verified"]) == (digest, False, True)
        assert (await asked("POST", f"/{digest}/prefetch"))["digest"] == digest
        checked = [{"digest": digest, "state": "ok", "problem": ""}]
        assert await asked("POST", "/verify") == checked
        assert await asked("POST", "/gc") == {"removed": [], "size": 0}  # it was just used
        for wrong, status, code in (("0" * 64, 404, "not_found"), ("..%2fx", 400, "invalid")):
            url = f"http://templated/v1/code/{wrong}/prefetch"
            async with session.post(url) as answer:
                assert answer.status == status
                assert (await error_of(answer))["code"] == code

    talk(tmp_path, talking)


def _out(*arguments: str) -> str:
    done = run(*arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout.decode()


def test_ls(daemon: Daemon) -> None:
    daemon.on("GET", "/v1/code", [_ROW])
    header, line = _out("code", "ls").splitlines()
    assert header.split() == ["DIGEST", "FILES", "SIZE", "USED", "NEEDED", "VERIFIED"]
    assert line.split()[0] == "abababababab"
    assert line.split()[-2:] == ["yes", "no"]
    assert _out("-q", "code", "ls").strip() == _ROW["digest"]
    assert json.loads(_out("code", "ls", "-o", "json")) == [_ROW]


def test_prefetch(daemon: Daemon) -> None:
    daemon.on("POST", f"/v1/code/{_ROW['digest']}/prefetch", _ROW)
    done = run("code", "prefetch", _ROW["digest"])
    assert (done.returncode, done.stdout) == (0, b"")
    assert b"abababababab is on this node" in done.stderr
    assert run("code", "prefetch", "0" * 64).returncode != 0


def test_prefetch_by_the_first_digits(daemon: Daemon) -> None:
    """Of what is here, or of a version; when they mean one."""
    versions = [{"code": {"digest": "cd" * 32}}, {"code": {"digest": "ab" * 6 + "0" * 52}}]
    daemon.on("GET", "/v1/functions", [{"versions": versions}])
    daemon.on("GET", "/v1/code", [_ROW])
    for digest in ("ab" * 32, "cd" * 32):
        daemon.on("POST", f"/v1/code/{digest}/prefetch", _ROW)
        assert run("code", "prefetch", digest[:14]).returncode == 0
    for prefix, said in (("ab" * 6, b"2 digests begin"), ("ef" * 6, b"no code that this node")):
        done = run("code", "prefetch", prefix)
        assert done.returncode != 0 and said in done.stderr and b"hint: " in done.stderr


def test_verify_fails_when_something_is_gone(daemon: Daemon) -> None:
    checks = [
        {"digest": "ab" * 32, "state": "ok", "problem": ""},
        {"digest": "cd" * 32, "state": "repaired", "problem": ""},
    ]
    daemon.on("POST", "/v1/code/verify", checks)
    assert _out("code", "verify").splitlines()[2].split() == ["cdcdcdcdcdcd", "repaired", "-"]
    checks.append({"digest": "ef" * 32, "state": "damaged", "problem": "no store has it"})
    daemon.on("POST", "/v1/code/verify", checks)
    done = run("code", "verify", "-o", "json")
    assert done.returncode != 0
    assert b"1 of 3 code images were damaged, and are gone: efefefefefef" in done.stderr
    assert json.loads(done.stdout) == checks


def test_gc(daemon: Daemon) -> None:
    daemon.on("POST", "/v1/code/gc", {"removed": ["ab" * 32], "size": 1 << 20})
    assert _out("code", "gc").startswith("removed 1, freed 1")
    assert _out("-q", "code", "gc").strip() == "ab" * 32
    assert json.loads(_out("code", "gc", "-o", "json"))["size"] == 1 << 20
