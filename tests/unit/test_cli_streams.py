"""What the command line passes through as it comes: exec, logs, events, files and builds."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import yaml

from templated.cli import exit_codes
from templated.cli.main import main
from tests.unit.cli_daemon import TEMPLATE, Daemon, b64, popen, run

BUILD = "/v1/templates/python-fn/build"
EVENTS = "/v1/operations/op1/events"
Capture = pytest.CaptureFixture[str]


# exec


@pytest.mark.parametrize(
    ("end", "expected", "said"),
    [
        ({"exit_code": 0}, 0, b""),
        ({"exit_code": 42}, 42, b""),
        ({"signal": 9}, 137, b""),
        ({"signal": 9, "timed_out": True}, 124, b"time limit"),
        ({"exit_code": 127, "error": "not_found"}, 127, b"no such command"),
        ({"exit_code": 126, "error": "not_executable"}, 126, b"not executable"),
        ({"error": "the agent's connection broke"}, 1, b"connection broke"),
    ],
)
def test_exec_exit_codes(daemon: Daemon, end: dict[str, Any], expected: int, said: bytes) -> None:
    daemon.lines("POST", "/v1/clones/fn-123/exec", {**end, "done": True})
    done = run("exec", "fn-123", "--", "x")
    assert done.returncode == expected
    assert said in done.stderr
    assert b"Traceback" not in done.stderr


def test_exec_sends_argv_env_timeout_and_stdin(daemon: Daemon) -> None:
    daemon.lines("POST", "/v1/clones/fn-123/exec", {"exit_code": 0, "done": True})
    run(
        "exec", "fn-123", "--timeout", "5", "--env", "A=b=c", "--", "ls", "-o", "-n", stdin=b"\xff1"
    )
    assert json.loads(daemon.requests[0][2]) == {
        "argv": ["ls", "-o", "-n"],
        "timeout": 5.0,
        "env": {"A": "b=c"},
        "stdin": b64(b"\xff1"),
    }


@pytest.mark.parametrize(
    ("arguments", "argv"),
    [
        (["exec", "-n", "fn-123", "ls", "-o", "json"], ["ls", "-o", "json"]),
        (["exec", "fn-123", "-n", "-o", "json", "grep", "--", "-q"], ["grep", "--", "-q"]),
        (["exec", "-q", "fn-123", "--no-stdin", "--", "--help"], ["--help"]),
    ],
)
def test_exec_leaves_the_guests_options_alone(
    daemon: Daemon, arguments: list[str], argv: list[str]
) -> None:
    daemon.lines("POST", "/v1/clones/fn-123/exec", {"exit_code": 0, "done": True})
    assert main(arguments) == 0
    assert json.loads(daemon.requests[0][2])["argv"] == argv


def test_exec_streams_both_outputs_raw(daemon: Daemon) -> None:
    daemon.lines(
        "POST",
        "/v1/clones/fn-123/exec",
        {"stream": "stdout", "data": b64(b"\x00first\n")},
        {"stream": "stderr", "data": b64(b"\xffoops")},
        {"exit_code": 3, "done": True},
        hold=True,
    )
    process = popen("exec", "fn-123", "--", "x")
    assert process.stdout is not None
    assert process.stdout.readline() == b"\x00first\n"  # while the command still runs
    daemon.release.set()
    out, err = process.communicate(timeout=30)
    assert (out, err, process.returncode) == (b"", b"\xffoops", 3)


def test_exec_whose_end_is_not_known(daemon: Daemon) -> None:
    daemon.lines("POST", "/v1/clones/fn-123/exec", {"stream": "stdout", "data": b64(b"x")})
    assert run("exec", "fn-123", "--", "x").returncode == exit_codes.NO_DAEMON
    daemon.lines("POST", "/v1/clones/fn-123/exec", {"stream": "stdout"}, cut=True)
    assert run("exec", "fn-123", "--", "x").returncode == exit_codes.NO_DAEMON


def test_exec_bounds_stdin(daemon: Daemon) -> None:
    done = run("exec", "fn-123", "--", "cat", stdin=b"x" * (700 * 1024 + 1))
    assert done.returncode == exit_codes.USAGE
    assert b"stdin has more than 700 KiB" in done.stderr
    assert daemon.requests == []


# logs, events, cp


def test_logs_are_passed_on_raw(daemon: Daemon) -> None:
    daemon.on("GET", "/v1/clones/fn-123/logs", b"\x1b[1mboot\xff\n")
    assert run("logs", "fn-123", "-n", "5").stdout == b"\x1b[1mboot\xff\n"
    assert daemon.requests[0][1] == "/v1/clones/fn-123/logs?lines=5"


def test_events_until_interrupted(daemon: Daemon) -> None:
    event = {"time": "T", "type": "clone.running", "subject": "fn-123", "details": {"a": 1}}
    daemon.lines("GET", "/v1/events", event, hold=True)
    process = popen("events", "-o", "json")
    assert process.stdout is not None
    assert json.loads(process.stdout.readline()) == event
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=30)[1] == b""
    assert process.returncode == exit_codes.INTERRUPTED


def test_events_in_words(daemon: Daemon) -> None:
    """Details as words, weights among them."""
    details = {"alias": "live", "versions": {"1": 0.9, "2": 0.1}}
    event = {"time": "T", "type": "function.alias", "subject": "hello", "details": details}
    daemon.lines("GET", "/v1/events", event)
    words = run("events", "--no-follow").stdout.decode().split()
    assert words == ["T", "function.alias", "hello", "alias=live", "versions=1:0.9,2:0.1"]


ENTRY: dict[str, Any] = {
    "time": "T",
    "uid": 1000,
    "pid": 5,
    "user": "alice",
    "key": "",
    "role": "operator",
    "action": "exec_in_clone",
    "target": "fn-123",
    "detail": "uname",
    "outcome": "ok",
    "status": 200,
    "left_out": 0,
}
REFUSED = {**ENTRY, "user": "", "outcome": "forbidden", "left_out": 3, "detail": "\x1b[2J"}


def test_audit(daemon: Daemon, capsys: Capture) -> None:
    """A table for people, a line of JSON or a YAML document for programs."""
    daemon.lines("GET", "/v1/audit", ENTRY, REFUSED)
    assert main(["audit"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "TIME  USER   PID  ACTION         TARGET  DETAIL  OUTCOME",
        "T     alice  5    exec_in_clone  fn-123  uname   ok",
        "T     1000   5    exec_in_clone  fn-123  ?[2J    forbidden (3 more before)",
    ]
    assert main(["audit", "-o", "json"]) == 0
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == [ENTRY, REFUSED]
    assert main(["audit", "-o", "yaml"]) == 0
    assert list(yaml.safe_load_all(capsys.readouterr().out)) == [ENTRY, REFUSED]


@pytest.mark.parametrize(
    ("arguments", "query"),
    [
        (["--since", "90s"], "since=90"),
        (["--since", "1h", "--user", "alice", "-n", "3"], "lines=3&since=3600&user=alice"),
        (["--since", "2d"], "since=172800"),
        (["--since", "30m", "-n", "0"], "lines=0&since=1800"),
    ],
)
def test_audit_asks_for(daemon: Daemon, arguments: list[str], query: str) -> None:
    """What the options say."""
    daemon.lines("GET", "/v1/audit")
    assert main(["audit", *arguments]) == 0
    assert daemon.requests[0][1] == f"/v1/audit?{query}"


@pytest.mark.parametrize("since", ["", "1", "h", "1w", "-1h", "1h\n", "1.5h", "1234567s"])
def test_audit_takes_no_other_times(daemon: Daemon, capsys: Capture, since: str) -> None:
    """A usage error in one line."""
    assert main(["audit", "--since", since]) == exit_codes.USAGE
    assert "30m" in capsys.readouterr().err.splitlines()[0]
    assert daemon.requests == []


def test_audit_is_refused(daemon: Daemon, capsys: Capture) -> None:
    """To whom is no admin."""
    daemon.fail("GET", "/v1/audit", "forbidden", 403)
    assert main(["audit"]) == exit_codes.FORBIDDEN
    assert capsys.readouterr().err.startswith("templated: error: no luck: forbidden")


def test_cp_into_a_clone(daemon: Daemon, tmp_path: Path) -> None:
    daemon.on("PUT", "/v1/clones/fn-123/files", b"", 204)
    source = tmp_path / "tool.sh"
    source.write_bytes(b"\x00" * 300_000)
    source.chmod(0o755)
    assert main(["cp", str(source), "fn-123:/opt/"]) == 0
    target = "/v1/clones/fn-123/files?path=%2Fopt%2Ftool.sh&mode=755"
    assert daemon.requests == [("PUT", target, source.read_bytes())]


def test_cp_that_is_refused_half_way(daemon: Daemon, tmp_path: Path, capsys: Capture) -> None:
    """The daemon answers and closes while the file is still being sent."""
    with open(tmp_path / "big", "wb") as big:
        big.truncate(64 << 20)
    assert main(["cp", str(tmp_path / "big"), "fn-123:/big"]) == exit_codes.USAGE
    message = capsys.readouterr().err.splitlines()[0]
    assert message.startswith("templated: error: the daemon answered with HTTP status 413")


def test_cp_out_of_a_clone(daemon: Daemon, tmp_path: Path) -> None:
    daemon.on("GET", "/v1/clones/fn-123/files", b"\xffdata")
    assert main(["cp", "fn-123:/etc/hostname", str(tmp_path)]) == 0
    assert (tmp_path / "hostname").read_bytes() == b"\xffdata"
    assert run("cp", "fn-123:/etc/hostname", "-").stdout == b"\xffdata"


def test_cp_leaves_the_old_file_when_it_fails(daemon: Daemon, tmp_path: Path) -> None:
    (tmp_path / "f").write_text("old")
    daemon.lines("GET", "/v1/clones/fn-123/files", "new", cut=True)
    assert main(["cp", "fn-123:/f", str(tmp_path / "f")]) == exit_codes.NO_DAEMON
    assert (tmp_path / "f").read_text() == "old"
    assert not list(tmp_path.glob(".f*"))


# template build


def _build(daemon: Daemon, *events: dict[str, Any], hold: bool = False) -> None:
    daemon.on("POST", BUILD, {"id": "op1", "state": "running"}, 202)
    daemon.lines("GET", EVENTS, *events, hold=hold)


PHASE = {"time": "T", "type": "phase", "name": "boot", "state": "done", "seconds": 2.5}
PROBE = {"time": "T", "type": "probe", "name": "up", "state": "passed", "seconds": 0.1, "saw": "ok"}
END = {"time": "T", "type": "end", "state": "done"}


def test_build(daemon: Daemon, capsys: Capture, tmp_path: Path) -> None:
    _build(daemon, PHASE, PROBE, END)
    spec = tmp_path / "spec.yaml"
    spec.write_text("name: python-fn\n")
    assert main(["template", "build", "python-fn", "-f", str(spec)]) == 0
    body = json.loads(daemon.requests[0][2])
    assert body == {"spec": "name: python-fn\n", "source": str(spec)}
    captured = capsys.readouterr()
    assert captured.err == "boot done in 2.50 s\n  probe up passed in 0.10 s: ok\n"
    assert captured.out == f"python-fn: {TEMPLATE['active']} is active\n"


def test_build_as_json_lines(daemon: Daemon, capsys: Capture) -> None:
    _build(daemon, PHASE, END)
    assert main(["template", "build", "python-fn", "-o", "json"]) == 0
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == [PHASE, END]


def test_failed_build_ends_with_the_console(daemon: Daemon, capsys: Capture) -> None:
    error = {"code": "probe_failed", "message": "probe up failed", "hint": "look at it"}
    console = {"time": "T", "type": "log", "message": "console: panic\x1b[m"}
    _build(daemon, console, {**END, "state": "failed", "error": error})
    assert main(["template", "build", "python-fn"]) == exit_codes.FAILED
    assert capsys.readouterr().err.splitlines() == [
        "templated: error: probe up failed",
        "hint: look at it",
        "  console: panic?[m",
    ]


def test_interrupted_build_goes_on(daemon: Daemon) -> None:
    _build(daemon, PHASE, hold=True)
    process = popen("template", "build", "python-fn")
    assert process.stderr is not None
    assert process.stderr.readline() == b"boot done in 2.50 s\n"
    process.send_signal(signal.SIGINT)
    assert b"--follow op1" in process.communicate(timeout=30)[1]
    assert process.returncode == exit_codes.INTERRUPTED


def test_build_that_lost_its_daemon(daemon: Daemon, capsys: Capture) -> None:
    _build(daemon, PHASE)
    assert main(["template", "build", "python-fn"]) == exit_codes.NO_DAEMON
