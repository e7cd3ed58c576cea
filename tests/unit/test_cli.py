"""The command line against a stand-in daemon: what it prints, and the codes it exits with."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import msgspec
import pytest
import yaml

from templated.cli import exit_codes
from templated.cli.main import COMMANDS, main, root
from templated.errors import ConfigError, TemplatedError
from templated.model.clone import CloneView
from templated.model.generation import Manifest, ProbeResult, QemuVersion, TemplateView
from templated.model.spec import ImageSpec, TemplateSpec
from tests.unit.cli_daemon import (
    CLONE,
    GENERATION,
    ROOT,
    TEMPLATE,
    Daemon,
    command,
    popen,
    run,
)

Capture = pytest.CaptureFixture[str]


# Output


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["clone", "fn-123", "-o", "json"], CLONE),
        (["-o", "json", "clone", "fn-123"], CLONE),
        (["ls", "-o", "json"], [CLONE]),
        (["-o", "json", "ls"], [CLONE]),
        (["show", "fn-123", "--output=json"], CLONE),
        (["template", "ls", "-o", "json"], [TEMPLATE]),
        (["template", "-o", "json", "ls"], [TEMPLATE]),
        (["-o", "json", "template", "show", "python-fn"], TEMPLATE),
    ],
)
def test_json_is_the_daemons_answer(
    daemon: Daemon, capsys: Capture, arguments: list[str], expected: Any
) -> None:
    assert main(arguments) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out) == expected
    assert captured.err == ""


def test_yaml(daemon: Daemon, capsys: Capture) -> None:
    assert main(["ls", "-o", "yaml"]) == 0
    assert yaml.safe_load(capsys.readouterr().out) == [CLONE]


def test_clone_sends_what_was_given(daemon: Daemon, capsys: Capture) -> None:
    daemon.on("POST", "/v1/clones", [CLONE, CLONE], 201)
    assert main(["clone", "fn", "--count", "2", "--template", "t", "--path", "cold"]) == 0
    assert json.loads(daemon.requests[0][2]) == {
        "name": "fn",
        "count": 2,
        "template": "t",
        "path": "cold",
    }
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_clone_table(daemon: Daemon, capsys: Capture) -> None:
    assert main(["clone", "fn-123"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "NAME    STATE    PATH    IP         TOTAL",
        "fn-123  running  direct  10.77.0.3  116.2 ms",
        "phases (ms): allocate 0.4, spawn 44.1, restore 9.8, resume 0.7, identify 61.0",
    ]


IMAGE = {
    "digest": "0123456789abcdef",
    "suite": "bookworm",
    "packages": ["python3"],
    "size": 300 << 20,
    "built_at": "2026-01-01T00:00:00+00:00",
    "templates": ["python-fn"],
}


def test_images(daemon: Daemon, capsys: Capture) -> None:
    """The daemon's, whichever configuration this user has."""
    daemon.on("GET", "/v1/images", [IMAGE])
    assert main(["image", "ls"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "DIGEST            BUILT                      MIB",
        "0123456789abcdef  2026-01-01T00:00:00+00:00  300",
    ]
    assert main(["image", "ls", "-o", "json"]) == 0
    (shown,) = json.loads(capsys.readouterr().out)
    assert (shown["digest"], shown["built"], shown["mib"]) == (
        IMAGE["digest"],
        IMAGE["built_at"],
        300,
    )
    assert shown["templates"] == ["python-fn"]
    assert main(["image", "ls", "-q"]) == 0
    assert capsys.readouterr().out == "0123456789abcdef\n"


def test_quiet_prints_names(daemon: Daemon, capsys: Capture) -> None:
    assert main(["ls", "-q"]) == 0
    assert main(["-q", "template", "ls"]) == 0
    assert capsys.readouterr().out == "fn-123\npython-fn\n"


def test_tables_show_no_control_characters(daemon: Daemon, capsys: Capture) -> None:
    daemon.on("GET", "/v1/clones/fn-123", {**CLONE, "reason": "\x1b[2Jgone\nlong"})
    assert main(["show", "fn-123"]) == 0
    assert "?[2Jgone long" in capsys.readouterr().out


def test_the_socket_option_wins_over_the_environment(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEMPLATED_SOCKET", "/nonexistent")
    assert main(["ls"]) == exit_codes.NO_DAEMON
    assert main(["ls", "--socket", daemon.socket]) == 0
    assert main(["--socket", daemon.socket, "ls"]) == 0


def test_version(capsys: Capture) -> None:
    assert main(["--version"]) == 0
    assert main(["version"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first == second
    assert first.startswith("templated ")


# Errors


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("not_found", 3),
        ("conflict", 4),
        ("invalid", 2),
        ("host", 6),
        ("timeout", 7),
        ("busy", 8),
        ("forbidden", 9),
        ("start_failed", 1),
        ("a-code-of-the-future", 1),
    ],
)
def test_exit_codes_and_error_lines(
    daemon: Daemon, capsys: Capture, code: str, expected: int
) -> None:
    daemon.fail("GET", "/v1/clones/fn-123", code)
    assert main(["show", "fn-123"]) == expected
    captured = capsys.readouterr()
    assert captured.err == f"templated: error: no luck: {code}\nhint: try something else\n"
    assert captured.out == ""


def test_errors_as_json(daemon: Daemon, capsys: Capture) -> None:
    daemon.fail("POST", "/v1/clones", "conflict", 409)
    assert main(["clone", "fn-123", "-o", "json"]) == exit_codes.CONFLICT
    told = json.loads(capsys.readouterr().err)
    assert told["error"]["code"] == "conflict"
    assert told["error"]["hint"] == "try something else"


@pytest.mark.parametrize("body", [b"Bad Gateway", b'{"error": "text"}', b"[]"])
def test_an_error_that_is_not_the_apis(daemon: Daemon, capsys: Capture, body: bytes) -> None:
    daemon.on("GET", "/v1/clones", body, 502)
    assert main(["ls"]) == exit_codes.FAILED
    assert "HTTP status 502" in capsys.readouterr().err


def test_an_answer_that_is_not_json(daemon: Daemon, capsys: Capture) -> None:
    daemon.on("GET", "/v1/clones", b"<html>")
    assert main(["ls"]) == exit_codes.FAILED
    assert "is not JSON" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["no-such-command"],
        ["ls", "--no-such-option"],
        ["clone"],
        ["clone", "Fn_1"],
        ["clone", "fn", "--count", "0"],
        ["rm"],
        ["rm", "a", "--all"],
        ["cp", "a", "b"],
        ["cp", "fn-1:relative", "b"],
        ["exec", "fn-1", "--env", "novalue", "--", "true"],
    ],
)
def test_usage_errors_reach_no_daemon(
    daemon: Daemon, capsys: Capture, arguments: list[str]
) -> None:
    assert main(arguments) == exit_codes.USAGE
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("templated: error: ")
    assert lines[1].startswith("hint: ")
    assert daemon.requests == []


def test_missing_socket(tmp_path: Path, capsys: Capture) -> None:
    path = str(tmp_path / "none.sock")
    assert main(["--socket", path, "ls"]) == exit_codes.NO_DAEMON
    message, hint = capsys.readouterr().err.splitlines()
    assert path in message
    assert "systemctl start templated" in hint
    assert "templated serve" in hint


def test_nothing_listens(tmp_path: Path, capsys: Capture) -> None:
    path = str(tmp_path / "dead.sock")
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(path)
    assert main(["--socket", path, "ls"]) == exit_codes.NO_DAEMON
    message, hint = capsys.readouterr().err.splitlines()
    assert message.endswith(f"nothing listens on {path}")
    assert "systemctl start templated" in hint


def test_a_socket_path_that_is_too_long(capsys: Capture) -> None:
    assert main(["--socket", "/" + "x" * 200, "ls"]) == exit_codes.USAGE
    assert len(capsys.readouterr().err.splitlines()) == 2


def test_a_defect_shows_no_traceback(
    daemon: Daemon, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    daemon.on("GET", "/v1/clones", [{"unexpected": True}])
    assert main(["ls"]) == exit_codes.FAILED
    assert "Traceback" not in capsys.readouterr().err
    monkeypatch.setenv("TEMPLATED_DEBUG", "1")
    assert main(["ls"]) == exit_codes.FAILED
    assert "Traceback" in capsys.readouterr().err


def test_every_code_of_the_error_tree_has_an_exit_code() -> None:
    def tree(kind: type[TemplatedError]) -> Iterator[str]:
        yield kind.code
        for child in kind.__subclasses__():
            yield from tree(child)

    documented = {code for code, _ in exit_codes.MEANINGS}
    assert {str(exit_codes.for_error(code)) for code in tree(TemplatedError)} <= documented


# rm


def test_rm_goes_on_after_an_error(daemon: Daemon, capsys: Capture) -> None:
    assert main(["rm", "gone", "UPPER", "fn-123"]) == exit_codes.NOT_FOUND
    err = capsys.readouterr().err
    assert "nothing at /v1/clones/gone" in err
    assert "is not a clone name" in err
    assert "removed fn-123" in err


def test_rm_all_asks_first(daemon: Daemon) -> None:
    refused = run("rm", "--all")
    assert refused.returncode == exit_codes.USAGE
    assert b"--yes" in refused.stderr
    assert run("rm", "--all", "--yes").returncode == 0
    assert daemon.requests[-1][:2] == ("DELETE", "/v1/clones/fn-123")


# The process


def test_broken_pipe_is_quiet(daemon: Daemon) -> None:
    daemon.on("GET", "/v1/clones", [CLONE] * 5000)
    process = popen("ls")
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(30) == exit_codes.BROKEN_PIPE
    process.stderr.close()


def test_full_disk(daemon: Daemon) -> None:
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            command("ls"), stdout=full, stderr=subprocess.PIPE, cwd=ROOT, timeout=30, check=False
        )
    assert done.returncode == exit_codes.FAILED
    assert b"No space left" in done.stderr
    assert b"Traceback" not in done.stderr


@pytest.mark.parametrize(
    "arguments", [["ls"], ["-o", "json", "clone", "fn-123"], ["show", "fn-123"], ["rm", "fn-123"]]
)
def test_lean_imports(daemon: Daemon, arguments: list[str]) -> None:
    """Starting fast is a promise; heavy modules come in only where they are used."""
    check_imports(arguments)


def check_imports(arguments: list[str]) -> None:
    """Nothing heavy is imported by a command that succeeds."""
    code = (
        "import sys; from templated.cli.main import main; assert main(sys.argv[1:]) == 0;"
        "heavy = {'rich', 'aiohttp', 'yaml', 'msgspec', 'asyncio', 'prometheus_client'};"
        "print(*heavy & sys.modules.keys(), file=sys.stderr, end='')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "-q", *arguments],
        capture_output=True,
        cwd=ROOT,
        timeout=30,
        check=True,
    )
    assert done.stderr == b""


def _tree(group: click.Group, path: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    context = click.Context(group)
    for name in group.list_commands(context):
        found = group.get_command(context, name)
        yield (*path, name)
        if isinstance(found, click.Group):
            yield from _tree(found, (*path, name))


def test_every_command_has_help_with_examples(capsys: Capture) -> None:
    paths = [path for path in _tree(root, ()) if path[0] != "bench"]
    assert {path[0] for path in paths} == COMMANDS.keys() - {"bench"}
    for path in [(), *paths]:
        assert main([*path, "--help"]) == 0
        text = capsys.readouterr().out
        assert "Examples:\n  templated " in text, path
        assert "Global options:" in text, path


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_script(capsys: Capture, shell: str) -> None:
    assert main(["completion", shell]) == 0
    assert "_TEMPLATED_COMPLETE" in capsys.readouterr().out


def _complete(words: str) -> bytes:
    environment = {"_TEMPLATED_COMPLETE": "bash_complete", "COMP_WORDS": f"templated {words}"}
    environment["COMP_CWORD"] = str(len(words.split(" ")))
    done = subprocess.run(
        command(),
        env={**os.environ, **environment},
        capture_output=True,
        cwd=ROOT,
        timeout=30,
        check=True,
    )
    assert done.stderr == b""
    return done.stdout


def test_names_complete(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    assert _complete("rm fn").split() == [b"plain,fn-123"]
    assert _complete("template show p").split() == [b"plain,python-fn"]
    assert _complete(f"--socket {daemon.socket} show f").split() == [b"plain,fn-123"]
    monkeypatch.setenv("TEMPLATED_SOCKET", "/nonexistent")
    assert _complete("show f").split() == []


# Commands that need no daemon


class _Check:
    def __init__(self, name: str, status: str, fix: str = "") -> None:
        self.name, self.status, self.detail, self.fix = name, status, f"about {name}", fix


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> list[_Check]:
    """What `doctor` finds."""
    found: list[_Check] = [_Check("qemu", "PASS"), _Check("kvm", "WARN", "use tcg")]
    stub = SimpleNamespace(run_checks=lambda config: found)
    monkeypatch.setitem(sys.modules, "templated.services.doctor", stub)
    monkeypatch.setitem(
        sys.modules, "templated.drivers.configfile", SimpleNamespace(load_config=lambda path: None)
    )
    return found


def test_doctor(checks: list[_Check], capsys: Capture) -> None:
    assert main(["doctor"]) == 0
    captured = capsys.readouterr()
    assert captured.out.splitlines() == [
        "PASS  qemu  about qemu",
        "WARN  kvm   about kvm",
        "            fix: use tcg",
    ]
    assert captured.err == "1 PASS, 1 WARN, 0 FAIL\n"


def test_doctor_fails(checks: list[_Check], capsys: Capture) -> None:
    checks.append(_Check("space", "FAIL", "make room"))
    assert main(["doctor", "-o", "json"]) == exit_codes.FAILED
    assert json.loads(capsys.readouterr().out)[2] == {
        "name": "space",
        "status": "FAIL",
        "detail": "about space",
        "fix": "make room",
    }


def test_serve_passes_the_config_and_reports_errors(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def serve(path: Path | None, *, verbose: bool) -> None:
        raise ConfigError(f"{path}: wrong", hint="fix it")

    monkeypatch.setitem(sys.modules, "templated.api.process", SimpleNamespace(run=serve))
    assert main(["serve", "--config", "/x.yaml"]) == exit_codes.USAGE
    assert capsys.readouterr().err == "templated: error: /x.yaml: wrong\nhint: fix it\n"


# The canned answers against the model


def test_the_canned_clone_is_one() -> None:
    assert msgspec.to_builtins(msgspec.convert(CLONE, CloneView)) == CLONE


def test_template_show_reads_the_models_names(daemon: Daemon, capsys: Capture) -> None:
    spec = TemplateSpec(name="python-fn", image=ImageSpec(packages=("python3",)))
    probe = ProbeResult(name="up", type="agent", seconds=0.25, attempts=1, saw="pong")
    manifest = Manifest(
        format=1,
        id=GENERATION["id"],
        template="python-fn",
        created=GENERATION["created"],
        spec=spec,
        image="0" * 64,
        qemu=QemuVersion(path="/usr/bin/qemu-system-x86_64", version="7.2.9"),
        accel="tcg",
        cpu="max",
        command_line=(),
        kernel="vmlinuz",
        kernel_sha256="0" * 64,
        kernel_cmdline="",
        files={},
        probes=(probe,),
        canary_probes=(),
        phases_s={"boot": 2.8},
        freeze_lag_s=0.01,
    )
    view = msgspec.convert(TEMPLATE, TemplateView)
    view = msgspec.structs.replace(view, spec=spec, manifest=manifest)
    daemon.on("GET", "/v1/templates/python-fn", msgspec.to_builtins(view))
    assert main(["template", "show", "python-fn"]) == 0
    out = capsys.readouterr().out
    for text in ("microvm, 128MiB, 1 vCPU", "bookworm python3", "7.2.9, tcg", "boot 2.8", "pong"):
        assert text in out


def test_closed_streams(daemon: Daemon) -> None:
    done = subprocess.run(
        ["sh", "-c", '"$@" >&- 2>&-', "sh", *command("ls")], cwd=ROOT, timeout=30, check=False
    )
    assert done.returncode == 0
