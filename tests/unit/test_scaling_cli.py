"""`scale ls | show`, and the routes behind them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest

from templated.api import server
from templated.cli import exit_codes
from templated.cli.main import main
from templated.cli.scale_plot import plot
from templated.drivers.hypervisor.fake import FakeHypervisor
from templated.model.scaling import ScaleDetail, ScaleView
from templated.services.daemon import Services
from tests.unit.cli_daemon import Daemon
from tests.unit.fake_daemon import play
from tests.unit.test_api import client
from tests.unit.test_cli import _complete, check_imports
from tests.unit.test_function_api import ask, deploy, talk
from tests.unit.test_function_cli import FUNCTION

Capture = pytest.CaptureFixture[str]
BUSY = {
    "function": "hello",
    "version": "3",
    "requests": 4,
    "waiting": 1,
    "mean": 2.25,
    "forecast": 3.5,
    "desired": 5,
    "kept": 6,
    "ready": 4,
    "starting": 2,
    "kind": "reactive",
    "reason": "reactive",
}
IDLE = {
    **BUSY,
    **dict.fromkeys(("requests", "waiting", "desired", "kept", "ready", "starting"), 0),
    "function": "old",
    "mean": 0.0,
    "forecast": 0.01,
    "kind": "idle",
    "reason": "idle",
}
CALL = {
    "caller": "hello",
    "callee": "resize",
    "traced": True,
    "share": 1.0,
    "probability": 0.91,
    "runs": 16,
    "lag_s": 0.25,
    "earliest_s": 0.2,
    "latest_s": 0.4,
    "fan_out": 3,
    "seen_s": 12.5,
}
DETAIL: dict[str, Any] = {
    "now": BUSY,
    "min": 1,
    "max": None,
    "instance_mib": 30.4,
    "start_s": 0.125,
    "forecast": "histogram: returns in 4 min",
    "short_of": ["cpu pressure is 90 % (limit 80)"],
    "calls": [CALL, {**CALL, "caller": "timer", "callee": "hello", "traced": False}],
    "history": {
        "mean": [0.0] * 178 + [1.5, 2.0],
        "peak": [0] * 178 + [2, 4],
        "arrivals": [0] * 178 + [9, 20],
        "ready": [0] * 178 + [4, 3],
    },
}


@pytest.fixture(autouse=True)
def _answers(daemon: Daemon) -> None:
    daemon.on("GET", "/v1/scaling", [BUSY, IDLE])
    daemon.on("GET", "/v1/scaling/hello", DETAIL)
    daemon.on("GET", "/v1/functions", [FUNCTION])
    daemon.on("GET", "/v1/functions/hello", FUNCTION)


def test_the_canned_answers_are_some() -> None:
    for kind, value in ((ScaleView, BUSY), (ScaleDetail, DETAIL)):
        made = msgspec.json.decode(json.dumps(value), type=kind)
        assert json.loads(msgspec.json.encode(made)) == value


def test_ls(capsys: Capture) -> None:
    assert main(["scale", "ls"]) == 0
    output = capsys.readouterr()
    assert output.out.splitlines() == [
        "FUNCTION  VERSION  DEMAND                FORECAST  DESIRED  KEPT  READY   REASON",
        "hello     3        4 (mean 2.2, 1 wait)  3.5       5        6     4 (+2)  reactive",
    ]
    assert output.err == "1 idle versions are left out: --all\n"
    assert main(["-q", "scale", "ls", "--all"]) == 0
    assert capsys.readouterr().out == "hello:3\nold:3\n"
    assert main(["scale", "ls", "-o", "json"]) == 0
    assert json.loads(capsys.readouterr().out) == [BUSY, IDLE]


def test_show(daemon: Daemon, capsys: Capture) -> None:
    assert main(["scale", "show", "hello:3"]) == 0
    assert daemon.requests[-1][1] == "/v1/scaling/hello?qualifier=3"
    shown = capsys.readouterr().out
    for text in (
        "forecast: 3.5 (histogram: returns in 4 min)",
        "instance: 30 MiB, starts in 0.12 s",
        "host:     cpu pressure",
        "hello   resize  0.25 s (0.20 to 0.40)  91%          3        16    trace",
        "timer   hello",
        "    4 |" + " " * 58 + ".!",
        "-60 min",
    ):
        assert text in shown
    assert main(["scale", "show", "hello", "--hours", "3"]) == 0
    assert "-180 min" in capsys.readouterr().out
    assert daemon.requests[-1][1] == "/v1/scaling/hello"
    assert main(["scale", "show", "hello", "-o", "yaml"]) == 0
    assert "fan_out: 3" in capsys.readouterr().out
    assert main(["-q", "scale", "show", "hello"]) == 0
    assert capsys.readouterr().out == "hello:3\n"


@pytest.mark.parametrize("name", ["../x", "hello:a/b", "", "hello:"])
def test_names_that_are_none(daemon: Daemon, name: str) -> None:
    assert main(["scale", "show", name]) == exit_codes.USAGE
    assert not daemon.requests


def test_a_picture() -> None:
    lines = list(plot([0] * 57 + [2, 1, 0], [0] * 57 + [1, 2, 2], 1))
    assert lines[0] == "    2 |" + " " * 57 + "!.."
    assert lines[1] == "    1 |" + " " * 57 + "##."
    assert lines[2] == "    0 +" + "-" * 60 and lines[3].endswith("now")
    high = list(plot([100] * 60, [50] * 60, 1))
    assert (
        len(high) == 8 + 3 and high[0] == "  100 |" + "!" * 60 and high[7] == "      |" + "#" * 60
    )
    flat = list(plot([0] * 180, [0] * 180, 3))
    assert flat[0] == "    1 |"


def test_it_completes(daemon: Daemon) -> None:
    assert _complete("scale s").split() == [b"plain,show"]
    assert _complete("scale show h").split() == [b"plain,hello"]
    assert _complete("scale show hello:l").split() == [b"plain,hello:live"]
    assert _complete("scale show other:l").split() == []


def test_it_imports_little(daemon: Daemon) -> None:
    for arguments in (["scale", "ls"], ["scale", "show", "hello"]):
        check_imports(["--socket", str(daemon.socket), *arguments])


# The daemon's answers


def test_the_routes(tmp_path: Path) -> None:
    async def work(session: aiohttp.ClientSession, running: Services) -> None:
        assert await ask(session, "GET", "/v1/scaling") == []
        await deploy(session)
        (row,) = await ask(session, "GET", "/v1/scaling")
        assert (row["function"], row["version"], row["kept"], row["reason"]) == (
            *("f", "$LATEST", 0),
            "idle",
        )
        await ask(session, "POST", "/v1/functions/f/versions", 201, json={})
        rows = await ask(session, "GET", "/v1/scaling")
        assert [row["version"] for row in rows] == ["$LATEST", "1"]
        detail = await ask(session, "GET", "/v1/scaling/f", params={"qualifier": "1"})
        assert detail["now"]["version"] == "1" and detail["instance_mib"] == 30.0
        assert {len(values) for values in detail["history"].values()} == {180}
        await ask(session, "PUT", "/v1/functions/f/scale", json={"min": 2, "max": 5})
        await ask(session, "PUT", "/v1/functions/f/concurrency", json={"reserved": 3})
        detail = await ask(session, "GET", "/v1/scaling/f")
        assert (detail["min"], detail["max"]) == (2, 3)
        error = await ask(session, "GET", "/v1/scaling/g", 404)
        assert "no function g" in error["error"]["message"]
        await ask(session, "GET", "/v1/scaling/f", 404, params={"qualifier": "9"})
        await ask(session, "DELETE", "/v1/functions/f", 204)
        assert await ask(session, "GET", "/v1/scaling") == []

    talk(tmp_path, work)


def test_without_scaling(tmp_path: Path) -> None:
    async def scenario(running: Services, fake: FakeHypervisor) -> None:
        config = running.context.config
        async with server.listeners(config, running), client(config.socket) as session:
            error = await ask(session, "GET", "/v1/scaling", 409)
            assert "scaling.enabled" in error["error"]["hint"]

    play(tmp_path, scenario, scaling={"enabled": False})
