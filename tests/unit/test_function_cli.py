"""`function` and `invoke`: what is sent, what is printed where, and the exit codes."""

from __future__ import annotations

import base64
import json
import sys
from io import BytesIO, TextIOWrapper
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit
from zipfile import ZipFile

import msgspec
import pytest

from templated.cli import exit_codes
from templated.cli.main import main
from templated.model.function import (
    DeployRequest,
    EventView,
    FunctionView,
    InvokeView,
)
from tests.unit.cli_daemon import Daemon
from tests.unit.test_cli import _complete, check_imports

Capture = pytest.CaptureFixture[str]
VERSION = {
    "function": "hello",
    "version": "$LATEST",
    "handler": "app.handler",
    "runtime": "python",
    "template": "python-fn",
    "timeout_s": 30.0,
    "env": ["STAGE"],
    "description": "",
    "code": {"digest": "ab" * 32, "bytes": 1536},
    "created": "2026-01-01T00:00:00.000Z",
}
FUNCTION = {
    "name": "hello",
    "handler": "app.handler",
    "runtime": "python",
    "template": "python-fn",
    "timeout_s": 30.0,
    "description": "says \x1b[2Jhello",
    "code": {"digest": "ab" * 32, "bytes": 1536},
    "versions": [VERSION, {**VERSION, "version": "2"}, {**VERSION, "version": "1"}],
    "aliases": [{"name": "live", "versions": {"1": 0.9, "2": 0.1}, "description": ""}],
    "reserved": None,
    "network": {
        "egress": "acme",
        "allow": ["10.1.0.0/16:443", "10.2.0.0/16"],
        "peers": None,
        "publish": None,
        "limits": {"bandwidth": "10MiB", "packets": None, "connections": 5},
    },
    "min": 1,
    "max": 12,
    "provisioned": [
        {
            "qualifier": "live",
            "requested": 5,
            "allocated": 4,
            "available": 3,
            "status": "FAILED",
            "reason": "its init fails: no",
            "changed": "2026-01-01T00:00:00.000Z",
        }
    ],
    "instances": {"paused": 2, "busy": 0},
    "update": None,
    "created": "2026-01-01T00:00:00.000Z",
}
SAID = """egress: acme
allow:  10.1.0.0/16:443, 10.2.0.0/16
limits: bandwidth 10MiB, connections 5
"""
ANSWER = {
    "status": 200,
    "error": None,
    "payload": {"sum": 3, "text": "ü"},
    "version": "2",
    "instance": "hello-1",
    "start": "warm",
    "phases_ms": {"route": 0.1, "run": 2.0},
    "total_ms": 2.1,
    "trace": "1-5759e988-bd862e3fe1be46a994272793",
}
EVENT = {
    "id": "e-1",
    "function": "hello",
    "qualifier": "live",
    "state": "failed",
    "attempts": 3,
    "created": "2026-01-01T00:00:00.000Z",
    "due": "2026-01-01T00:01:00.000Z",
    "reason": "ValueError: no",
    "payload": {"a": 1},
}


@pytest.fixture(autouse=True)
def _functions(daemon: Daemon) -> None:
    """The daemon knows one function."""
    daemon.on("GET", "/v1/functions", [FUNCTION])
    daemon.on("GET", "/v1/functions/hello", FUNCTION)
    daemon.on("PUT", "/v1/functions/hello", FUNCTION)
    daemon.on("DELETE", "/v1/functions/hello", b"", 204)
    daemon.on("POST", "/v1/functions/hello/versions", {**VERSION, "version": "3"}, 201)
    daemon.on("PUT", "/v1/functions/hello/aliases/live", FUNCTION["aliases"][0])  # type: ignore[index]
    daemon.on("DELETE", "/v1/functions/hello/aliases/live", b"", 204)
    daemon.on("PUT", "/v1/functions/hello/concurrency", {**FUNCTION, "reserved": 5})
    daemon.on("PUT", "/v1/functions/hello/network", FUNCTION)
    daemon.on("PUT", "/v1/functions/hello/scale", {**FUNCTION, "min": 2, "max": 9})
    daemon.on("PUT", "/v1/functions/hello/provisioned/live", FUNCTION)
    daemon.on("DELETE", "/v1/functions/hello/provisioned/2", None)
    daemon.on("POST", "/v1/functions/hello/invoke", ANSWER)
    daemon.on("GET", "/v1/functions/hello/events", [EVENT])
    daemon.on("DELETE", "/v1/functions/hello/events", b"", 204)
    daemon.on("POST", "/v1/functions/hello/events/e-1/retry", {"id": "e-2"}, 202)


def test_the_canned_answers_are_some() -> None:
    """What the daemon of these tests says is what a daemon says."""
    for kind, value in ((FunctionView, FUNCTION), (InvokeView, ANSWER), (EventView, EVENT)):
        made = msgspec.json.decode(json.dumps(value), type=kind)
        assert json.loads(msgspec.json.encode(made)) == value


def sent(daemon: Daemon) -> tuple[str, str, dict[str, str], bytes]:
    """The last request: method, path, query and body."""
    method, target, body = daemon.requests[-1]
    parts = urlsplit(target)
    return method, parts.path, {k: v[0] for k, v in parse_qs(parts.query).items()}, body


# Deploy


def test_deploy_a_directory(daemon: Daemon, tmp_path: Path, capsys: Capture) -> None:
    """It is sent as a zip, with the settings that were given and no others."""
    code = tmp_path / "code"
    (code / "lib").mkdir(parents=True)
    (code / "app.py").write_text("def handler(event, context): return event")
    (code / "lib/x.py").write_text("")
    arguments = ["--handler", "app.handler", "--env", "A=1=2", "--env", "B=", "--timeout", "10"]
    assert main(["function", "deploy", "hello", "--code", str(code), *arguments]) == 0
    method, path, query, body = sent(daemon)
    assert (method, path) == ("PUT", "/v1/functions/hello")
    settings = json.loads(query["settings"])
    assert settings == {"handler": "app.handler", "env": {"A": "1=2", "B": ""}, "timeout": "10s"}
    msgspec.json.decode(query["settings"], type=DeployRequest)
    with ZipFile(BytesIO(body)) as archive:
        assert sorted(n for n in archive.namelist() if n[-1] != "/") == ["app.py", "lib/x.py"]
    output = capsys.readouterr()
    assert "handler:" in output.out and "1.5 KiB" in output.out and "\x1b" not in output.out
    assert output.err.startswith("sending ") and output.err.endswith(" of code\n")


def test_deploy_a_zip(daemon: Daemon, tmp_path: Path, capsys: Capture) -> None:
    """As it is; the answer for programs is the daemon's."""
    archive = tmp_path / "code.zip"
    archive.write_bytes(b"PK not looked at here")
    given = ["--runtime", "provided", "--template", "t", "--timeout", "1m", "--description", "d"]
    command = ["-q", "-o", "json", "function", "deploy", "hello", "--code", str(archive), *given]
    assert main(command) == 0
    _, _, query, body = sent(daemon)
    assert body == b"PK not looked at here"
    assert json.loads(query["settings"]) == {
        "template": "t",
        "runtime": "provided",
        "timeout": "1m",
        "description": "d",
    }
    output = capsys.readouterr()
    assert json.loads(output.out) == FUNCTION and output.err == ""


def test_deploy_where_instances_serve(
    daemon: Daemon, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """How far the new ones are is told until requests go to them, and why it was not waited for."""
    problem = "its init fails: no"
    steps = [
        {"done": False, "wanted": 3, "ready": 1, "problem": ""},
        {"done": False, "wanted": 3, "ready": 1, "problem": ""},
        {"done": False, "wanted": 3, "ready": 2, "problem": ""},
        {"done": True, "wanted": 3, "ready": 2, "problem": problem},
    ]

    def passes(_: float) -> None:
        daemon.on("GET", "/v1/functions/hello", {**FUNCTION, "update": steps.pop(0)})

    monkeypatch.setattr("templated.cli.shift.time.sleep", passes)
    update = {**steps[0], "ready": 0}
    daemon.on("PUT", "/v1/functions/hello", {**FUNCTION, "update": update})
    assert main(["function", "deploy", "hello", "--timeout", "3", "--wait", "9"]) == 0
    query = parse_qs(urlsplit(daemon.requests[0][1]).query)
    assert (query["ready"], query["background"]) == (["9"], ["true"])
    assert capsys.readouterr().err.splitlines() == [
        "hello: 0 of 3 instances of the new code are ready",
        "hello: 1 of 3 instances of the new code are ready",
        "hello: 2 of 3 instances of the new code are ready",
        "hello: requests go to the new code",
        f"warning: requests go to the new code of hello, but {problem}",
    ]
    assert main(["function", "show", "hello"]) == 0
    assert problem in capsys.readouterr().out
    daemon.on("PUT", "/v1/functions/hello", FUNCTION)
    assert main(["-q", "function", "deploy", "hello", "--timeout", "3", "--now"]) == 0
    assert [r for r in daemon.requests if r[0] == "PUT"][-1][1].count("ready=0") == 1


def test_deploy_settings_alone(daemon: Daemon, capsys: Capture) -> None:
    """Nothing is sent of code, and nothing said of it."""
    assert main(["-q", "function", "deploy", "hello", "--timeout", "2.5"]) == 0
    _, _, query, body = sent(daemon)
    assert (body, json.loads(query["settings"])) == (b"", {"timeout": "2.5s"})
    assert capsys.readouterr() == ("hello\n", "")


def test_progress_on_a_terminal(
    daemon: Daemon, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Told on stderr, and wiped away at the end."""
    archive = tmp_path / "code.zip"
    archive.write_bytes(b"x" * 200_000)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert main(["function", "deploy", "hello", "--code", str(archive)]) == 0
    output = capsys.readouterr()
    assert (
        "of code: 4 %" in output.err and "100 %" in output.err and output.err.endswith("\r\x1b[K")
    )
    assert "%" not in output.out and len(sent(daemon)[3]) == 200_000


WRONG = [
    (["function", "deploy", "a/b"], exit_codes.USAGE, "not a function name"),
    (["function", "deploy", "hello", "--env", "A"], exit_codes.USAGE, "--env takes K=V"),
    (["function", "deploy", "hello", "--code", "/nonexistent"], exit_codes.USAGE, "No such file"),
    (["function", "deploy", "hello", "--code", "/dev", "--env", "A"], exit_codes.USAGE, "K=V"),
    (["function", "deploy", "hello", "--runtime", "java"], exit_codes.USAGE, "runtime"),
    (["function", "alias", "hello", "live"], exit_codes.USAGE, "missing argument"),
    (["function", "alias", "hello", "live", "1=x"], exit_codes.USAGE, "'x' is not a weight"),
    (["function", "alias", "hello", "live", "1", "2"], exit_codes.USAGE, "one version, or at two"),
    (["function", "alias", "hello", "live", "1=1", "1=0"], exit_codes.USAGE, "given twice"),
    (["function", "alias", "hello", "live", *"123"], exit_codes.USAGE, "one version, or at two"),
    (["function", "reserve", "hello", "some"], exit_codes.USAGE, "neither a number nor none"),
    (["function", "reserve", "hello", "--", "-1"], exit_codes.USAGE, "neither a number nor none"),
    (["function", "events", "f", "--retry", "e", "--purge"], exit_codes.USAGE, "exclude"),
    (["function", "events", "f", "--retry", ""], exit_codes.USAGE, "the id of an event"),
    (["invoke", "hello:"], exit_codes.USAGE, "neither a version nor an alias"),
    (["invoke", "hello:a/b"], exit_codes.USAGE, "neither a version nor an alias"),
    (["invoke", ""], exit_codes.USAGE, "not a function name"),
    (["invoke", "hello", "--payload", "@/nonexistent"], exit_codes.USAGE, "No such file"),
]


@pytest.mark.parametrize(("arguments", "code", "message"), WRONG)
def test_usage_errors_reach_no_daemon(
    daemon: Daemon, capsys: Capture, arguments: list[str], code: int, message: str
) -> None:
    """One line on stderr, and nothing on stdout."""
    assert main(arguments) == code
    output = capsys.readouterr()
    assert message in output.err and output.out == "" and "Traceback" not in output.err
    assert daemon.requests == [] and "sending" not in output.err


# Looking, and changing


def test_ls(daemon: Daemon, capsys: Capture) -> None:
    """A table, names, or what the daemon says."""
    assert main(["function", "ls"]) == 0
    header, row = capsys.readouterr().out.splitlines()
    assert header.split()[:5] == ["NAME", "TEMPLATE", "HANDLER", "VERSION", "ALIASES"]
    assert row.split()[:7] == ["hello", "python-fn", "app.handler", "2", "live", "1.5", "KiB"]
    assert row.split()[7] == "2"
    assert main(["-q", "function", "ls"]) == 0
    assert capsys.readouterr().out == "hello\n"
    assert main(["function", "ls", "-o", "json"]) == 0
    assert json.loads(capsys.readouterr().out) == [FUNCTION]


def test_show(daemon: Daemon, capsys: Capture) -> None:
    """Its settings, versions and aliases; nothing of it steers a terminal."""
    assert main(["function", "show", "hello"]) == 0
    text = capsys.readouterr().out
    parts = ("abababababab", "STAGE", "2 paused", "live", "1=0.9 2=0.1", "$LATEST", "12")
    for expected in (*parts, "3/5", "failed", "its init fails: no"):
        assert expected in text
    assert "\x1b" not in text
    assert main(["function", "show", "hello", "-o", "json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown == FUNCTION and set(shown["code"]) == {"digest", "bytes"}


CHANGES = [
    (["rm", "hello"], ("DELETE", "/v1/functions/hello", {}, b""), ("", "removed hello\n")),
    (
        ["rm", "hello", "--version", "3"],
        ("DELETE", "/v1/functions/hello", {"version": "3"}, b""),
        ("", "removed hello:3\n"),
    ),
    (
        ["publish", "hello"],
        ("POST", "/v1/functions/hello/versions", {}, b"{}"),
        ("hello: version 3\n", ""),
    ),
    (
        ["publish", "hello", "-q", "--description", "d"],
        ("POST", "/v1/functions/hello/versions", {}, b'{"description": "d"}'),
        ("3\n", ""),
    ),
    (
        ["alias", "hello", "live", "3"],
        ("PUT", "/v1/functions/hello/aliases/live", {}, b'{"versions": {"3": 1.0}}'),
        ("hello:live: 1=0.9 2=0.1\n", ""),
    ),
    (
        ["alias", "hello", "live", "1=0.9", "2=0.1", "--description", ""],
        (
            *("PUT", "/v1/functions/hello/aliases/live", {}),
            b'{"versions": {"1": 0.9, "2": 0.1}, "description": ""}',
        ),
        ("hello:live: 1=0.9 2=0.1\n", ""),
    ),
    (
        ["alias", "hello", "live", "1", "2=0.1"],
        ("PUT", "/v1/functions/hello/aliases/live", {}, b'{"versions": {"1": 0.9, "2": 0.1}}'),
        ("hello:live: 1=0.9 2=0.1\n", ""),
    ),
    (
        ["alias", "hello", "live", "1", "--now"],
        ("PUT", "/v1/functions/hello/aliases/live", {"ready": "0"}, b'{"versions": {"1": 1.0}}'),
        ("hello:live: 1=0.9 2=0.1\n", ""),
    ),
    (
        ["alias", "hello", "live", "1", "--wait", "5"],
        ("PUT", "/v1/functions/hello/aliases/live", {"ready": "5"}, b'{"versions": {"1": 1.0}}'),
        ("hello:live: 1=0.9 2=0.1\n", ""),
    ),
    (
        ["unalias", "hello", "live"],
        ("DELETE", "/v1/functions/hello/aliases/live", {}, b""),
        ("", "removed hello:live\n"),
    ),
    (
        ["reserve", "hello", "5"],
        ("PUT", "/v1/functions/hello/concurrency", {}, b'{"reserved": 5}'),
        ("", "hello: reserved 5\n"),
    ),
    (
        ["network", "hello", "--allow", "10.1.0.0/16:443", "--limit", "connections=5"],
        (
            "PUT",
            "/v1/functions/hello/network",
            {},
            b'{"allow": ["10.1.0.0/16:443"], "limits": {"connections": 5}, "reset": false}',
        ),
        (SAID, ""),
    ),
    (
        ["network", "hello", "--egress", "none", "--limit", "bandwidth=10MiB", "--reset"],
        (
            "PUT",
            "/v1/functions/hello/network",
            {},
            b'{"egress": "none", "limits": {"bandwidth": "10MiB"}, "reset": true}',
        ),
        (SAID, ""),
    ),
    (
        ["reserve", "hello", "none"],
        ("PUT", "/v1/functions/hello/concurrency", {}, b'{"reserved": null}'),
        ("", "hello: reserved none\n"),
    ),
    (
        ["scale", "hello", "--min", "2", "--max", "9"],
        ("PUT", "/v1/functions/hello/scale", {}, b'{"min": 2, "max": 9}'),
        ("", "hello: min 2, max 9\n"),
    ),
    (
        ["scale", "hello", "--max", "none"],
        ("PUT", "/v1/functions/hello/scale", {}, b'{"max": 0}'),
        ("", "hello: min 2, max 9\n"),
    ),
    (
        ["scale", "hello:live", "--min", "3"],
        ("PUT", "/v1/functions/hello/provisioned/live", {}, b'{"count": 3}'),
        ("", "hello:live: min 3\n"),
    ),
    (
        ["scale", "hello:2", "--min", "0"],
        ("DELETE", "/v1/functions/hello/provisioned/2", {}, b""),
        ("", "hello:2: min 0\n"),
    ),
    (
        ["events", "hello", "--retry", "e-1"],
        ("POST", "/v1/functions/hello/events/e-1/retry", {}, b""),
        ("e-2\n", ""),
    ),
    (
        ["events", "hello", "--purge"],
        ("DELETE", "/v1/functions/hello/events", {}, b""),
        ("", "forgot the events of hello that failed\n"),
    ),
]


@pytest.mark.parametrize(("arguments", "request_", "output"), CHANGES)
def test_changes(
    daemon: Daemon, capsys: Capture, arguments: list[str], request_: Any, output: tuple[str, str]
) -> None:
    """What is sent; data on stdout, notes on stderr."""
    assert main(["function", *arguments]) == 0
    assert sent(daemon) == request_
    assert capsys.readouterr() == output


def test_logs(daemon: Daemon, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    """The bytes as they are, when it is no terminal."""
    daemon.on("GET", "/v1/functions/hello/logs", b"one\n\x1b[2Jtwo\n")
    assert main(["function", "logs", "hello", "-n", "5", "-f"]) == 0
    assert sent(daemon)[2] == {"lines": "5", "follow": "true"}
    assert capfdbinary.readouterr().out == b"one\n\x1b[2Jtwo\n"


def test_events(daemon: Daemon, capsys: Capture) -> None:
    """Dead letters have their reason; one that is not tried again is not due."""
    assert main(["function", "events", "hello"]) == 0
    row = capsys.readouterr().out.splitlines()[1].split()
    assert row[:4] == ["e-1", "failed", "live", "3"] and row[5:] == ["-", "ValueError:", "no"]
    assert main(["function", "events", "hello", "-q"]) == 0
    assert capsys.readouterr().out == "e-1\n"
    assert main(["function", "events", "hello", "-o", "json"]) == 0
    assert json.loads(capsys.readouterr().out) == [EVENT]


# Invoke


def test_invoke_prints_the_payload(daemon: Daemon, capsys: Capture) -> None:
    """Alone, on one line."""
    assert main(["invoke", "hello:live", "--payload", '{"a": "ü"}']) == 0
    assert capsys.readouterr() == ('{"sum": 3, "text": "ü"}\n', "")
    path = "/v1/functions/hello/invoke"
    assert sent(daemon) == ("POST", path, {"qualifier": "live"}, '{"a": "ü"}'.encode())
    assert main(["invoke", "hello"]) == 0
    assert sent(daemon) == ("POST", path, {}, b"{}")
    assert main(["invoke", "hello:$LATEST"]) == 0
    assert sent(daemon)[2] == {"qualifier": "$LATEST"}


def test_invoke_for_programs(daemon: Daemon, capsys: Capture) -> None:
    """The whole answer, with the names that are fixed."""
    assert main(["invoke", "hello", "-o", "json"]) == 0
    assert json.loads(capsys.readouterr().out) == ANSWER


def test_payloads(daemon: Daemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From stdin and from a file, byte by byte."""
    (tmp_path / "request.json").write_bytes(b'{"file": "\xc3\xbc"}')
    assert main(["invoke", "hello", "--payload", f"@{tmp_path}/request.json"]) == 0
    assert sent(daemon)[3] == b'{"file": "\xc3\xbc"}'
    monkeypatch.setattr(sys, "stdin", TextIOWrapper(BytesIO(b"[1,\n2]")))
    assert main(["invoke", "hello", "--payload", "-"]) == 0
    assert sent(daemon)[3] == b"[1,\n2]"


FAILURES = [
    ({"errorMessage": "no\nway", "errorType": "ValueError"}, "hello failed: ValueError: no way"),
    ({"errorMessage": "timed out"}, "hello failed: timed out"),
    ("nonsense", "hello failed: Unhandled"),
    ({"errorMessage": "\x1b[2J", "errorType": 5}, "hello failed: 5: "),
]


@pytest.mark.parametrize(("payload", "message"), FAILURES)
def test_a_function_that_fails(
    daemon: Daemon, capsys: Capture, payload: object, message: str
) -> None:
    """What it says is the output; the exit code and a line on stderr say that it failed."""
    answer = {**ANSWER, "error": "Unhandled", "payload": payload}
    daemon.on("POST", "/v1/functions/hello/invoke", answer)
    assert main(["invoke", "hello"]) == exit_codes.FAILED
    output = capsys.readouterr()
    assert json.loads(output.out) == payload
    assert f"templated: error: {message}" in output.err and "\x1b" not in output.err
    assert output.err.endswith("hint: see: templated function logs hello\n")
    assert main(["invoke", "hello", "-o", "json"]) == exit_codes.FAILED
    output = capsys.readouterr()
    assert json.loads(output.out) == answer
    assert json.loads(output.err)["error"]["code"] == "function_failed"


def test_the_end_of_the_log(daemon: Daemon, capsys: Capture) -> None:
    """On stderr, so that the payload alone is the output."""
    headers = {"X-Templated-Log": base64.b64encode(b"one\ntwo").decode()}
    daemon.on("POST", "/v1/functions/hello/invoke", ANSWER, headers=headers)
    assert main(["invoke", "hello", "--tail"]) == 0
    output = capsys.readouterr()
    assert sent(daemon)[2] == {"tail": "true"}
    assert (json.loads(output.out), output.err) == (ANSWER["payload"], "one\ntwo\n")


def test_an_event(daemon: Daemon, capsys: Capture) -> None:
    """Its id, by which it can be found again."""
    daemon.on("POST", "/v1/functions/hello/invoke", {"id": "e-7"}, 202)
    assert main(["invoke", "hello:2", "--event"]) == 0
    assert sent(daemon)[2] == {"qualifier": "2", "event": "true"}
    assert capsys.readouterr().out == "e-7\n"
    assert main(["invoke", "hello", "--event", "-o", "json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"id": "e-7"}


def test_too_many(daemon: Daemon, capsys: Capture) -> None:
    """A bound that is reached has an exit code of its own."""
    error = {"code": "busy", "message": "the queue of hello is full", "hint": "try again"}
    daemon.on("POST", "/v1/functions/hello/invoke", {"error": error}, 429)
    assert main(["invoke", "hello"]) == exit_codes.BUSY
    assert capsys.readouterr() == (
        "",
        "templated: error: the queue of hello is full\nhint: try again\n",
    )


@pytest.mark.parametrize("arguments", [["invoke", "hello"], ["function", "ls"]])
def test_lean(daemon: Daemon, arguments: list[str]) -> None:
    """As the commands of every day."""
    check_imports(arguments)


def test_names_complete(daemon: Daemon) -> None:
    """Those of functions."""
    assert _complete("invoke h").split() == [b"plain,hello"]
    assert _complete("function show h").split() == [b"plain,hello"]
