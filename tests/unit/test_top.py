"""`templated top`: numbers out of two scrapes, the frame that shows them, and how it ends."""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import generate_latest
from rich.console import Console

from templated.cli import exit_codes, figures
from templated.cli.figures import Frame, Watcher
from templated.cli.main import main
from templated.cli.scrape import Scrape, quantile
from templated.cli.top_view import _instances, draw
from templated.client import Client
from templated.drivers.host.files import Space
from templated.drivers.host.pressure import Pressure
from templated.drivers.host.procfs import Memory
from templated.services.reports.function_metrics import FunctionMetrics
from templated.services.reports.metrics import Metrics
from templated.services.upkeep.host_metrics import HostMetrics, HostReading
from tests.unit.cli_daemon import CLONE, ROOT, Daemon, popen, serving
from tests.unit.fake_instances import version

INF = float("inf")
EVENT = {
    "time": "2026-01-01T00:00:00.000Z",
    "type": "clone.running",
    "subject": "fn-123",
    "details": {"path": "direct"},
}
POOL = {
    "template": "python-fn",
    "standby": {"target": 4, "ready": 4},
    "warm": {"target": 8, "ready": 3},
    "problem": "memory pressure",
}
Capture = pytest.CaptureFixture[str]


# Numbers


@pytest.mark.parametrize(
    ("q", "buckets", "expected"),
    [
        (0.5, {0.1: 0, 0.2: 10, INF: 10}, 0.15),
        (0.99, {0.1: 0, 0.2: 100, INF: 100}, 0.199),
        (0.5, {0.1: 5, 0.2: 5, INF: 10}, 0.1),
        (0.9, {0.1: 5, 0.2: 5, INF: 10}, 0.2),  # above all finite bounds
        (0.0, {0.1: 0, 0.2: 10, INF: 10}, 0.1),
        (0.5, {0.1: 0, INF: 0}, None),
        (0.5, {}, None),
    ],
)
def test_quantile(q: float, buckets: dict[float, float], expected: float | None) -> None:
    """Linear within a bucket, as PromQL's."""
    found = quantile(q, buckets)
    assert found == (None if expected is None else pytest.approx(expected))


def test_growth_of_counters() -> None:
    """New series grew from 0, and so did one that was set back."""
    before = Scrape('c_total{a="1"} 5\nc_total{a="2"} 7\n')
    now = Scrape('c_total{a="1"} 6\nc_total{a="2"} 3\nc_total{a="3"} 2\n')
    grown = {labels["a"]: value for labels, value in now.since(before, "c_total")}
    assert grown == {"1": 1, "2": 3, "3": 2}
    assert dict(now.all("c_total").__next__()[0]) == {"a": "1"}
    assert now.one("c_total") is None


class Source:
    """The daemon's metrics, grown by hand."""

    def __init__(self) -> None:
        self.metrics = Metrics()
        self.host = HostMetrics(self.metrics.registry)
        self.host.starts_limit.set(8)
        self.metrics.expect("python-fn")
        self.functions = FunctionMetrics(self.metrics.registry)

    def invoke(self, function: str, number: int, *outcomes: str, total_ms: float = 20.0) -> None:
        """Count requests of a version that were answered, the first by a new instance."""
        of_version = self.functions.expect(version(function, number))
        of_version.cold_starts.inc(1 if outcomes else 0)
        for position, outcome in enumerate(outcomes):
            start = "warm" if position else "pool"
            of_version.answered(outcome, start, {"run": 1.0}, total_ms)

    def start(self, number: int, total_ms: float = 120.0) -> None:
        """Count starts."""
        for _ in range(number):
            self.metrics.observe_start(
                "python-fn", "direct", {"spawn": 40.0, "identify": 70.0}, total_ms
            )

    def count(self, states: Mapping[Any, int], concurrency: Mapping[Any, int]) -> None:
        """Have instances by function, version and state, and requests by function and version."""
        self.functions.count(lambda: states, lambda: concurrency)

    def text(self) -> bytes:
        """What a scrape gets."""
        return generate_latest(self.metrics.registry)


@pytest.fixture
def source() -> Source:
    """A daemon's metrics with one template."""
    return Source()


@pytest.fixture
def daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: Source) -> Iterator[Daemon]:
    """A daemon that answers all that `top` asks for."""
    with serving(tmp_path / "d.sock") as served:
        monkeypatch.setenv("TEMPLATED_SOCKET", served.socket)
        source.start(3)
        serve(served, source)
        served.on("GET", "/v1/pools", [POOL])
        served.on("GET", "/v1/clones", [{**CLONE, "pid": os.getpid()}])
        served.lines("GET", "/v1/events", EVENT)
        yield served


def serve(daemon: Daemon, source: Source) -> None:
    """Let the daemon answer with the metrics as they are now."""
    daemon.on("GET", "/metrics", source.text())


def test_rates_are_of_the_time_between_two_looks(daemon: Daemon, source: Source) -> None:
    """The first frame is of the daemon's life, the second of what came since."""
    began = Scrape(source.text().decode()).one("process_start_time_seconds")
    assert began is not None
    times = iter([began + 30, began + 40])
    watcher = Watcher(Client(daemon.socket), clock=lambda: next(times))
    first = watcher.look()
    assert first.window_s == pytest.approx(30) and first.uptime_s == pytest.approx(30)
    (start,) = first.starts
    assert (start.count, start.per_second) == (3, 0.1)
    source.start(5, total_ms=20.0)
    source.metrics.failures.labels("python-fn", "timeout").inc()
    serve(daemon, source)
    second = watcher.look()
    (start,) = second.starts
    assert (start.count, start.per_second) == (5, 0.5)
    assert second.window_s == pytest.approx(10)
    assert start.p50_ms == pytest.approx(17.5) and start.p99_ms == pytest.approx(24.85)
    assert second.failures == [{"template": "python-fn", "reason": "timeout", "count": 1}]
    assert [p.phase for p in second.phases] == ["spawn", "identify"]


def test_functions(daemon: Daemon, source: Source) -> None:
    """A line for each, its versions together, the busiest first; then what came since."""
    began = Scrape(source.text().decode()).one("process_start_time_seconds")
    assert began is not None
    times = iter([began + 10, began + 15])
    watcher = Watcher(Client(daemon.socket), clock=lambda: next(times))
    source.invoke("seldom", 0)
    source.invoke("busy", 1, "ok", "ok", "error")
    source.invoke("busy", 2, "ok", "timeout")
    source.functions.throttles.labels("busy", "queue").inc(2)
    source.functions.throttles.labels("busy", "reserved").inc()
    states = {("busy", "1", "paused"): 1, ("busy", "2", "paused"): 1, ("busy", "2", "busy"): 1}
    source.count(states, {("busy", "1"): 0, ("busy", "2"): 1})
    aims: dict[tuple[str, ...], int] = {("busy", "1"): 2, ("busy", "2"): 3}
    failures: dict[tuple[str, ...], int] = {("seldom", "$LATEST"): 4}
    source.functions.count_crews(lambda: aims, lambda: failures)
    serve(daemon, source)
    busy, seldom = watcher.look().functions
    assert (busy.function, busy.count, busy.failed, busy.per_second) == ("busy", 5, 2, 0.5)
    assert busy.p50_ms == pytest.approx(17.5) and busy.p99_ms == pytest.approx(24.85)
    assert (busy.cold_starts, busy.throttles, busy.running) == (2, 3, 1)
    assert busy.instances == {"paused": 2, "busy": 1}
    assert (busy.aim, busy.failing, seldom.aim, seldom.failing) == (5, 0, 0, 4)
    assert list(_instances(busy)) == ["1 busy", "2 paused", "aim 5"]
    assert list(_instances(seldom)) == ["4 starts failed in a row"]
    assert (seldom.function, seldom.count, seldom.p50_ms) == ("seldom", 0, None)
    assert seldom.instances == {}
    source.invoke("seldom", 0, "ok")
    source.functions.forget("busy", "1")
    serve(daemon, source)
    seldom, busy = watcher.look().functions
    assert (seldom.function, seldom.count, seldom.per_second) == ("seldom", 1, 0.2)
    assert (busy.count, busy.p50_ms, busy.cold_starts, busy.throttles) == (0, None, 0, 0)


def test_a_restarted_daemon_begins_anew(daemon: Daemon, source: Source) -> None:
    """What it counts is not taken from what the one before had."""
    began = Scrape(source.text().decode()).one("process_start_time_seconds")
    assert began is not None
    times = iter([began - 100, began + 1])
    watcher = Watcher(Client(daemon.socket), clock=lambda: next(times))
    watcher.look()
    again = watcher.look()
    assert again.starts[0].count == 3 and again.window_s == pytest.approx(1, abs=0.01)


def test_an_idle_interval_has_no_quantiles(daemon: Daemon) -> None:
    """No number is made up."""
    watcher = Watcher(Client(daemon.socket))
    watcher.look()
    (start,) = watcher.look().starts
    assert (start.count, start.p50_ms, start.p99_ms) == (0, None, None)


def test_the_biggest_first(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    """At most a few; clones that are gone, or have no process, are left out."""
    clones = [{**CLONE, "name": f"c{n}", "pid": n} for n in range(1, 21)]
    daemon.on("GET", "/v1/clones", [*clones, {**CLONE, "pid": None}])
    monkeypatch.setattr(figures, "anonymous_bytes", lambda pid: None if pid == 20 else pid * 100)
    monkeypatch.setattr(figures, "cpu_seconds", lambda pid: 1.0)
    biggest = Watcher(Client(daemon.socket)).look().biggest
    assert [c.name for c in biggest] == [f"c{n}" for n in range(19, 11, -1)]


def test_a_failure(daemon: Daemon) -> None:
    """It ends the command."""
    daemon.fail("GET", "/v1/pools", "internal", 500)
    assert main(["top", "--once"]) == exit_codes.FAILED


# One frame


def test_once_as_json(daemon: Daemon, capsys: Capture) -> None:
    assert main(["top", "--once", "-o", "json"]) == 0
    frame = json.loads(capsys.readouterr().out)
    assert frame["starts"][0]["template"] == "python-fn" and frame["starts_limit"] == 8
    assert frame["pools"] == [POOL] and frame["events"] == [EVENT]
    assert frame["biggest"][0]["memory_bytes"] > 0
    assert main(["top", "--once", "-o", "yaml"]) == 0


def test_once_as_text(daemon: Daemon, capsys: Capture) -> None:
    assert main(["top", "--once"]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"python-fn +direct +[0-9.]+ +125.0 ms +149.5 ms +3", shown)
    assert re.search(r"P50 P99 IN MS +PATH +SPAWN +IDENTIFY", shown)
    assert re.search(r"python-fn +direct +37.5 49.8 +62.5 74.8", shown)
    assert re.search(r"python-fn +4/4 +3/8 +memory pressure", shown)
    assert re.search(r"fn-123 +python-fn +\d+ +\d+ MiB", shown)
    assert re.search(r"clone.running +fn-123 +path=direct", shown)
    assert "\x1b" not in shown


def full_frame(daemon: Daemon, source: Source) -> Frame:
    """A frame with something in each of its parts."""
    source.metrics.failures.labels("python-fn", "timeout").inc(2)
    source.invoke("hello", 0, "ok", "error")
    source.functions.throttles.labels("hello", "queue").inc(4)
    states = {("hello", "$LATEST", "paused"): 2, ("hello", "$LATEST", "busy"): 1}
    source.count(states, {("hello", "$LATEST"): 1})
    source.metrics.refill_blocked.labels("memory").set(1)
    source.metrics.count_clones(lambda: {("python-fn", "running"): 4})
    pressure = {"memory": Pressure(34.0, 2.0)}
    places = {"shm_dir": Space(1 << 30, 4 << 30)}
    source.host.show_host(HostReading(pressure, Memory(8 << 30, 5 << 30), places))
    serve(daemon, source)
    return Watcher(Client(daemon.socket)).look()


def shown(frame: Frame, width: int, height: int = 100) -> str:
    """What a terminal of that size has on it."""
    out = io.StringIO()
    console = Console(file=out, width=width, height=height, force_terminal=False)
    console.print(draw(frame, width))
    return out.getvalue()


@pytest.mark.parametrize("width", [10, 24, 40, 80, 129, 130, 300])
def test_any_width(daemon: Daemon, source: Source, width: int) -> None:
    """No line is longer than the terminal is wide, and none is wrapped."""
    text = shown(full_frame(daemon, source), width)
    assert max(map(len, text.splitlines())) <= width
    assert len(text.splitlines()) < 60


def test_what_is_wrong_is_seen(daemon: Daemon, source: Source) -> None:
    """Failures, pressure, a pool that is not filled."""
    text = shown(full_frame(daemon, source), 160)
    assert "failures: python-fn timeout 2" in text
    assert "the host lacks: memory" in text
    assert "memory 34%!" in text
    assert "5.0 GiB of 8.0 GiB available" in text and "shm_dir: 1.0 GiB of 4.0 GiB free" in text
    assert re.search(r"python-fn +running +4", text)
    assert re.search(r"hello +\S+ +17.5 ms +24.[89] ms +2 +1 +1 +4 +1 busy, 2 paused", text)


def test_an_empty_daemon(daemon: Daemon) -> None:
    """Nothing was built, nothing runs."""
    for path in ("/v1/pools", "/v1/clones"):
        daemon.on("GET", path, [])
    daemon.lines("GET", "/v1/events")
    daemon.on("GET", "/metrics", generate_latest(Metrics().registry))
    frame = Watcher(Client(daemon.socket)).look()
    for width in (40, 200):
        assert "0 starts and 0 failures" in shown(frame, 200)
        assert shown(frame, width)


def test_no_control_characters(daemon: Daemon, source: Source) -> None:
    """A guest must not steer the terminal through an event."""
    event: dict[str, Any] = {**EVENT, "details": {"reason": "\x1b[2Jgone\nlong"}}
    text = shown(replace(full_frame(daemon, source), events=[event]), 160)
    assert "\x1b" not in text and "?[2Jgone long" in text


def test_long_details_of_an_event(daemon: Daemon, source: Source) -> None:
    """They are cut, and not what happened to whom."""
    long = {**EVENT, "type": "function.deployed", "details": {"digest": "sha256:" + 64 * "a"}}
    text = shown(replace(full_frame(daemon, source), events=[EVENT, long]), 80)
    assert re.search(
        r"^hello +\S+ +17.5 ms +24.9 ms +2 +1 +1 +4 +1 busy.*…\s*$", text, re.MULTILINE
    )
    assert re.search(r"Z +function.deployed +fn-123 +digest=sha256:a+…", text)
    assert re.search(r"Z +clone.running +fn-123 +path=direct", text)


# Again and again


def test_lines_without_a_terminal(daemon: Daemon) -> None:
    """Each frame is one line of JSON; Ctrl-C ends it with 0 and no message."""
    process = popen("top", "--interval", "0.1", "-o", "json")
    assert process.stdout is not None
    try:
        for _ in range(2):
            assert json.loads(process.stdout.readline())["starts_limit"] == 8
    finally:
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (0, b"")


class Terminal:
    """`templated top` on a terminal of its own."""

    def __init__(self, rows: int, columns: int) -> None:
        self.screen, terminal = pty.openpty()
        fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        environment = ("env", "--default-signal=INT", "TERM=xterm")
        self.process = subprocess.Popen(
            [*environment, sys.executable, "-m", "templated", "top", "--interval", "0.1"],
            stdin=terminal,
            stdout=terminal,
            stderr=subprocess.PIPE,
            cwd=ROOT,
            start_new_session=True,
        )
        os.close(terminal)
        self.seen = b""

    def until(self, text: bytes) -> None:
        """Read until the terminal has shown a text, at most 30 s."""
        deadline = time.monotonic() + 30
        while text not in self.seen:
            left = deadline - time.monotonic()
            assert left > 0 and self._read(left), self.seen

    def _read(self, timeout: float) -> bool:
        ready, _, _ = select.select([self.screen], [], [], timeout)
        with contextlib.suppress(OSError):  # EIO: the other end is closed
            data = os.read(self.screen, 65536) if ready else b""
            self.seen += data
            return bool(data)
        return False

    def end(self) -> bytes:
        """Wait for the end of the program; returns its stderr."""
        _, err = self.process.communicate(timeout=30)
        while self._read(0):
            pass
        return err

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.communicate(timeout=30)
        os.close(self.screen)


@pytest.fixture
def terminal(daemon: Daemon, request: pytest.FixtureRequest) -> Iterator[Terminal]:
    """A terminal of the size that the test asks for."""
    made = Terminal(*getattr(request, "param", (50, 120)))
    try:
        yield made
    finally:
        made.close()


@pytest.mark.parametrize("terminal", [(50, 120), (4, 12), (0, 0)], indirect=True)
def test_ctrl_c_restores_the_terminal(terminal: Terminal) -> None:
    """Also on a tiny one, and one that does not know its size."""
    terminal.until(b"templated")
    assert b"\x1b[?25l" in terminal.seen
    terminal.process.send_signal(signal.SIGINT)
    assert terminal.end() == b""
    assert terminal.process.returncode == 0
    # The cursor is shown, and the screen from before is back.
    assert terminal.seen.rindex(b"\x1b[?25h") > terminal.seen.rindex(b"\x1b[?25l")
    assert terminal.seen.rindex(b"\x1b[?1049l") > terminal.seen.rindex(b"\x1b[?1049h")


def test_a_daemon_that_goes_away(daemon: Daemon, terminal: Terminal) -> None:
    """One line says so, on a terminal that is as it was."""
    terminal.until(b"python-fn")
    os.unlink(daemon.socket)
    err = terminal.end()
    assert terminal.process.returncode == exit_codes.NO_DAEMON
    assert err.startswith(b"templated: error: the daemon is not running")
    assert len(err.splitlines()) == 2 and b"Traceback" not in err
    assert terminal.seen.rindex(b"\x1b[?25h") > terminal.seen.rindex(b"\x1b[?25l")
