"""`bench soak` against a stand-in daemon: what it asks for, and what it finds."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from templated.bench import soak
from templated.cli import exit_codes
from templated.cli.main import main
from tests.unit.bench_daemon import INFO, Fleet

Capture = pytest.CaptureFixture[str]


class Soaked(Fleet):
    """It has a place for its state, and guests that say who they are; `wrong` ones say nobody."""

    def __init__(self, socket: str, state: Path) -> None:
        super().__init__(socket)
        self.state = state
        self.wrong = ""
        (state / "slots").mkdir(parents=True)
        for name in ("journal.sqlite", "journal.sqlite-wal"):
            (state / name).write_bytes(b"x" * 4096)

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        match request.method, request.path.split("/")[2:]:
            case "GET", ["info"]:
                info = {**INFO, "state_dir": str(self.state), "clones": len(self.clones)}
                return web.json_response(info)
            case "POST", ["clones", name, "exec"]:
                said = "?" if name.endswith(self.wrong or "-") else self._boot_id(name)
                data = base64.b64encode(said.encode()).decode()
                frames: list[dict[str, Any]] = [{"stream": "stdout", "data": data}]
                frames.append({"exit_code": 0, "done": True})
                return web.Response(text="".join(json.dumps(frame) + "\n" for frame in frames))
            case "GET", ["clones", name]:
                return web.json_response(self.clones[name])
        return await super()._answer(request)

    def _boot_id(self, name: str) -> str:
        return str(self.clones[name]["identity"]["boot_id"])


@pytest.fixture
def daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Soaked]:
    """One that serves; the environment points at its socket."""
    served = Soaked(str(tmp_path / "d.sock"), tmp_path / "state")
    served.start()
    monkeypatch.setenv("TEMPLATED_SOCKET", served.socket)
    monkeypatch.setattr(soak, "_STILL", 2)
    monkeypatch.setattr(soak, "_WITHIN", 0.2)
    try:
        yield served
    finally:
        served.stop()


def report(capsys: Capture, *arguments: str) -> dict[str, Any]:
    """What it prints as JSON."""
    code = main(["-q", "-o", "json", "bench", "soak", "--rounds", "12", *arguments])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    printed: dict[str, Any] = json.loads(captured.out)
    return printed


def test_what_is_well(daemon: Soaked, capsys: Capture) -> None:
    """Nothing is found, all is removed, pools have their sizes again; people can read it."""
    said = report(capsys, "--seed", "5")
    assert (said["lost"], said["left"]) == ([], [])
    assert len(daemon.made) == 12 + soak.RESIDENTS and daemon.clones == {}
    assert daemon.target == {"standby": 0, "warm": 0}
    paths = {"direct", "warm"} & set(said["first"]) | {"direct", "warm"} & set(said["last"])
    assert paths and said["first"]["exec"]["n"] == said["window"] == 3
    assert main(["-q", "bench", "soak", "--rounds", "8", "--paths", "direct"]) == 0
    assert "lost: nothing" in capsys.readouterr().out


def test_what_is_not(daemon: Soaked, capsys: Capture) -> None:
    """A guest that is not who it should be counts as lost, and a directory too many as left."""
    daemon.wrong = "soak-4"
    (daemon.state / "slots/ready").mkdir()

    def remove(name: str) -> web.StreamResponse:
        (daemon.state / "slots/forgotten").mkdir(exist_ok=True)
        return Fleet._remove(daemon, name)

    daemon._remove = remove  # type: ignore[method-assign]
    said = report(capsys, "--paths", "direct")
    assert said["lost"] == [f"{daemon.made[6]}: exit code 0, boot_id '?'"]
    assert said["left"] == ["1 directories in slots"]


def test_kills_leave_what_is_compared(daemon: Soaked, monkeypatch: pytest.MonkeyPatch) -> None:
    """None in the first and the last rounds, the daemon's in the first half; by the seed."""
    monkeypatch.setattr(soak.Soak, "__init__", lambda self: None)

    def when(seed: int) -> tuple[set[int], set[int]]:
        run = soak.Soak()  # type: ignore[call-arg]
        run._plan = soak.Plan(rounds=1000, seed=seed, kills=20, paths=("direct",))
        run._random = soak.random.Random(seed)  # type: ignore[attr-defined]
        return run._when()

    of_daemon, of_vm = when(1)
    assert len(of_daemon) == len(of_vm) == 20
    assert min(of_daemon) > 100 and max(of_daemon) <= 501
    assert min(of_vm) > 100 and max(of_vm) <= 900
    assert when(1) == (of_daemon, of_vm) != when(2)


def test_what_counts_as_flat() -> None:
    """Memory by its ratio, descriptors and threads by their number, the journal by both."""

    def figures(rss: int, descriptors: int, journal: int, wal: int) -> dict[str, Any]:
        names = {"rss_kib": rss, "descriptors": descriptors, "threads": 4, "journal_kib": journal}
        return {name: {"median": n, "max": n} for name, n in {**names, "wal_kib": wal}.items()}

    def grew(last: dict[str, Any]) -> list[str]:
        return soak._not_flat(first, last, soak._ratios(first, last))

    first = figures(50_000, 40, 80, 4000)
    assert grew(figures(54_000, 42, 200, 4100)) == []
    assert len(grew(figures(56_000, 43, 300, 9000))) == 4


def test_a_daemon_that_does_not_start(tmp_path: Path, capsys: Capture) -> None:
    """One line with what it said."""
    config = tmp_path / "templated.yaml"
    config.write_text("nonsense: 1\n")
    command = ["--socket", str(tmp_path / "d.sock"), "bench", "soak", "--serve", str(config)]
    assert main(command) == exit_codes.HOST
    said, hint = capsys.readouterr().err.splitlines()
    assert "did not start" in said and hint.startswith("hint: ")
