"""Instances before requests, on real virtual machines: kept, replaced, moved to, no storms."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from templated.errors import TemplatedError
from tests.real.harness import Daemon
from tests.real.test_functions import deploy, functions, invoke, outcome, source, until

pytestmark = pytest.mark.real
__all__ = ["functions", "source"]


def instances(daemon: Daemon, name: str) -> dict[str, int]:
    """How many there are, by state."""
    found: dict[str, int] = daemon.json("function", "show", name)["instances"]
    return found


def starts(daemon: Daemon, name: str) -> int:
    """How many instances of a function have begun or failed to, so far: from its events."""
    text = daemon.cli("-o", "json", "events", "--no-follow")
    events = [json.loads(line) for line in text.splitlines()]
    kinds = ("instance.init_failed",)
    return sum(event["type"] in kinds and event["subject"] == name for event in events)


def test_min_is_kept_ready_and_replaced(functions: Daemon, source: Path) -> None:
    """The first request is warm, and so is the one after all that was there is killed."""
    deploy(functions, source, "ready", "sleep")
    functions.cli("function", "scale", "ready", "--min", "2", "--max", "4")
    until(lambda: instances(functions, "ready").get("paused") == 2, "two are ready")
    answer = invoke(functions, "ready", 0)
    assert answer["start"] == "warm" and set(answer["phases_ms"]) == {"route", "run"}
    there = functions.json("ls")
    for clone in there:
        os.kill(clone["pid"], signal.SIGKILL)
    killed = {clone["name"] for clone in there}

    def replaced() -> bool:
        names = {clone["name"] for clone in functions.json("ls")}
        return not names & killed and instances(functions, "ready").get("paused") == 2

    until(replaced, "two others are ready")
    assert invoke(functions, "ready", 0)["start"] == "warm"
    functions.cli("function", "publish", "ready")
    functions.cli("function", "scale", "ready:1", "--min", "1")
    until(
        lambda: functions.json("function", "show", "ready")["provisioned"][0]["status"] == "READY",
        "one of version 1",
    )
    assert invoke(functions, "ready:1", 0)["start"] == "warm"
    error = functions.fails("function", "scale", "ready", "--min", "4")
    assert "4 by its min + 1 for 1 = 5 instances, and its max is 4" in error


class Load:
    """Callers that ask one after the other, each from a thread of its own, until they are told."""

    def __init__(self, daemon: Daemon, name: str, qualifier: str, payload: Any) -> None:
        self._client = daemon.client
        self._asked = name, json.dumps(payload).encode(), qualifier
        self._ends = threading.Event()
        self.answers: list[tuple[str, str, str | None]] = []
        self.errors: list[str] = []

    def _ask(self) -> None:
        name, payload, qualifier = self._asked
        while not self._ends.is_set():
            try:
                view = self._client.invoke_function(name, payload, qualifier=qualifier)
                self.answers.append((view.version, view.start, view.error))
            except TemplatedError as error:
                self.errors.append(repr(error))

    @contextlib.contextmanager
    def running(self, callers: int) -> Iterator[None]:
        threads = [threading.Thread(target=self._ask) for _ in range(callers)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self._ends.set()
            for thread in threads:
                thread.join(30)

    def served(self, version: str) -> Counter[str]:
        """How requests of a version were served."""
        return Counter(start for found, start, _ in self.answers if found == version)


def test_an_alias_moves_under_load(functions: Daemon, source: Path, tmp_path: Path) -> None:
    """In steps, and back: no error, and the new version's requests find an instance."""
    deploy(functions, source, "blue", "sleep")
    functions.cli("function", "publish", "blue")
    shutil.copytree(source, tmp_path / "new")
    with (tmp_path / "new/app.py").open("a") as file:
        file.write("# another version\n")
    deploy(functions, tmp_path / "new", "blue", "sleep")
    functions.cli("function", "publish", "blue")
    functions.cli("function", "alias", "blue", "prod", "1")
    load = Load(functions, "blue", "prod", 0.02)
    with load.running(2):
        until(lambda: load.served("1")["warm"] > 20, "version 1 serves")
        for words in (("1=0.9", "2=0.1"), ("1=0.5", "2=0.5"), ("2",), ("1",)):
            functions.cli("function", "alias", "blue", "prod", *words)
            seen = len(load.answers)
            until(lambda seen=seen: len(load.answers) > seen + 20, "requests go on")  # type: ignore[misc]
    assert load.errors == [] and {error for *_, error in load.answers} == {None}
    second = load.served("2")
    assert second["warm"] > 20 and set(second) == {"warm"}, second
    assert load.answers[-1][0] == "1"


def test_a_deploy_under_load(functions: Daemon, source: Path, tmp_path: Path) -> None:
    """The code before serves until the new one is ready; the first that reaches it is warm."""
    deploy(functions, source, "rolled", "sleep")
    functions.cli("function", "publish", "rolled")
    load = Load(functions, "rolled", "$LATEST", 0.02)
    with load.running(1):
        until(lambda: load.served("$LATEST")["warm"] > 5, "it serves")
        colds = len(load.answers) - load.served("$LATEST")["warm"]
        words = ("--timeout", "20s", "--wait", "30")
        done = functions.run("function", "deploy", "rolled", *words)
        assert "rolled: requests go to the new code" in done.stderr, done.stderr
        time.sleep(0.5)
    assert load.errors == [] and {error for *_, error in load.answers} == {None}
    assert len(load.answers) - load.served("$LATEST")["warm"] == colds


def test_an_init_that_fails_makes_no_storm(functions: Daemon, source: Path) -> None:
    """Everybody is told why, by a handful of starts; an alias does not move to it."""
    deploy(functions, source, "sound", "sleep")
    functions.cli("function", "publish", "sound")
    functions.cli("function", "alias", "sound", "prod", "1")
    assert invoke(functions, "sound:prod", 0)["start"] != "warm"
    done = functions.run("function", "deploy", "sound", "--handler", "broken.handler")
    assert done.returncode == 0, done.stderr
    functions.cli("function", "publish", "sound")
    before = starts(functions, "sound")
    error = functions.fails("function", "alias", "sound", "prod", "2", "--wait", "20")
    assert "has not moved" in error and "no_such_module" in error
    assert invoke(functions, "sound:prod", 0)["version"] == "1"
    answers: list[Any] = []
    threads = [
        threading.Thread(target=lambda: answers.append(outcome(functions, "sound:2")))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    kinds = {answer["payload"]["errorType"] for answer in answers}
    assert kinds == {"Runtime.ImportModuleError"} and len(answers) == 8
    assert starts(functions, "sound") - before <= 6
    events = functions.cli("events", "--no-follow")
    assert "function.backing_off" in events
