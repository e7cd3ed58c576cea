"""A real Prometheus that scrapes a daemon, with our rules, and what Grafana would ask it."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from tests.unit.observability import ALERTS, OBSERVABILITY

OF_A_BRIDGE = re.compile(r"templated_(network|egress)_")
"""What a daemon in user mode has no packets and no egresses for; see test_egress_daemon.py."""


def free_port() -> int:
    """A port on loopback that nobody uses at the moment."""
    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Prometheus:
    """Debian's Prometheus with our rules, on places of its own. `close` ends it by its pid."""

    def __init__(self, target: str) -> None:
        self.places = Path(tempfile.mkdtemp(prefix="tpp.", dir="/tmp"))
        self.address = f"127.0.0.1:{free_port()}"
        self._configure(target)
        with open(self.places / "log", "wb") as log:
            self.process = subprocess.Popen(
                [
                    "prometheus",
                    f"--config.file={self.places}/prometheus.yml",
                    f"--storage.tsdb.path={self.places}/data",
                    f"--web.listen-address={self.address}",
                ],
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def _configure(self, target: str) -> None:
        """The example, but for the address, and every second."""
        shutil.copy(ALERTS, self.places)
        text = (OBSERVABILITY / "prometheus.yml").read_text()
        text = text.replace("127.0.0.1:9177", target).replace("interval: 15s", "interval: 1s")
        (self.places / "prometheus.yml").write_text(text)

    @property
    def log(self) -> str:
        """What it has written so far."""
        return (self.places / "log").read_text()

    def ask(self, path: str, **query: str) -> dict[str, Any]:
        """The answer of the HTTP API; an error of it is returned as well."""
        url = f"http://{self.address}/api/v1/{path}?{urlencode(query)}"
        try:
            with urllib.request.urlopen(url, timeout=30) as answer:
                return dict(json.load(answer))
        except urllib.error.HTTPError as error:
            return dict(json.load(error))

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The series that an expression gives now; it must be one that Prometheus understands."""
        answer = self.ask("query", query=expression)
        assert answer["status"] == "success", (expression, answer)
        return list(answer["data"]["result"])

    def has(self, expression: str) -> bool:
        """Whether an expression gives a number now. NaN is none: it is 0 / 0."""
        return any(series["value"][1] != "NaN" for series in self.query(expression))

    def wait(self) -> None:
        """Until it answers."""
        until(self._answers, "Prometheus does not answer")

    def _answers(self) -> bool:
        assert self.process.poll() is None, self.log
        with contextlib.suppress(urllib.error.URLError, ConnectionError):
            return bool(self.ask("status/config")["status"] == "success")
        return False

    def close(self) -> None:
        """End it and remove its places."""
        try:
            if self.process.poll() is None:
                self.process.send_signal(signal.SIGTERM)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.process.wait(20)
            if self.process.poll() is None:
                self.process.kill()
                self.process.wait(20)
        finally:
            shutil.rmtree(self.places, ignore_errors=True)


def until(condition: Callable[[], object], what: str, seconds: float = 60.0) -> None:
    """Wait until something is true; fails with `what` after a bound."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.25)


def concrete(expression: str) -> str:
    """An expression of the dashboard as Grafana would send it, for all hosts and templates."""
    for variable in ("instance", "template", "function", "job"):
        expression = expression.replace(f"${variable}", ".*")
    return expression.replace("$__rate_interval", "2m").replace("$__range", "10m")
