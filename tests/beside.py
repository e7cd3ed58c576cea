"""The tests of the lab beside all others, in a process of their own, in one run.

The lab keeps a CPU busy for a quarter of an hour; the other tests want the rest of a machine with
two. What the other process reports is reported here, in the place of each test. The tests in Debian
13 come last here and there, and each is run by the process that gets to it first.
pytest-xdist was tried: its workers are killed at an interrupt before all fixtures have cleaned up,
and with pytest 9 it does not keep tests of a group together.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from tests.again import Again, Summary

_REPORTS = "TEMPLATED_TEST_REPORTS"
_IMAGES = "TEMPLATED_TEST_IMAGES"
_OWN, _SHARED = "lab", "debian13"
"""The marks of what the other process alone runs, and of what either does."""
_PAUSE = 0.2
_ENDS_WITHIN = 60.0


class Beside:
    """A plugin of the run that shows the reports. The tests begin when it is made."""

    def __init__(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        self._config = config
        self._items = [item.nodeid for item in items]
        self._reported: dict[str, list[Any]] = defaultdict(list)
        self._folder = tempfile.TemporaryDirectory(prefix="tplab-tests.")
        self._log = Path(self._folder.name, "log")
        # One of each image for both: the lab's tests make the first.
        os.environ.setdefault(_IMAGES, self._folder.name)
        reports = Path(self._folder.name, "reports")
        with self._log.open("wb") as log:
            self._child = subprocess.Popen(
                [
                    # Interrupted once: by us, or by the kernel when we are killed.
                    *("setpriv", "--pdeathsig=INT", sys.executable),
                    *("-m", "pytest", "-p", "no:cacheprovider", *self._items),
                ],
                stdin=subprocess.DEVNULL,
                process_group=0,
                stdout=log,
                stderr=log,
                cwd=config.rootpath,
                env={**os.environ, _REPORTS: str(reports)},
            )
        self._lines = reports.open("a+")
        self._lines.seek(0)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> bool | None:
        """In place of running it, wait for its reports; the test's own bound holds here, too."""
        if item.nodeid not in self._items:
            return None
        if item.get_closest_marker(_SHARED) and _claimed(Path(self._folder.name), item):
            return None
        item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        try:
            reports = self._reports_of(item)
        except pytest.fail.Exception as failure:  # pytest-timeout, from its signal
            reports = [_failed(item, f"{failure.msg}; the other run said:\n{self._said()}")]
        for report in reports:
            item.ihook.pytest_runtest_logreport(report=report)
        item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
        return True

    def pytest_unconfigure(self) -> None:
        """End the other run, after an interrupt too; it cleans up when it is interrupted."""
        if self._child.poll() is None:
            self._child.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._child.wait(_ENDS_WITHIN)
        self._child.kill()
        self._child.wait()
        self._lines.close()
        self._folder.cleanup()

    def _reports_of(self, item: pytest.Item) -> list[pytest.TestReport]:
        while True:
            ended = self._child.poll() is not None
            self._read()
            found = self._reported[item.nodeid]
            if found and found[-1].when == "teardown":
                return found
            if ended:
                words = f"the other run ended with {self._child.returncode}:\n{self._said()}"
                return [*found, _failed(item, words)]
            time.sleep(_PAUSE)

    def _said(self) -> str:
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-50:])

    def _read(self) -> None:
        while line := self._lines.readline():
            while not line.endswith("\n"):  # it is still being written
                line += self._lines.readline()
            hook = self._config.hook
            report = hook.pytest_report_from_serializable(
                config=self._config, data=json.loads(line)
            )
            self._reported[report.nodeid].append(report)


class Reporter:
    """A plugin of the other run: writes a line for each report."""

    def __init__(self, config: pytest.Config, path: str) -> None:
        self._config = config
        self._folder = Path(path).parent
        self._file = open(path, "a")  # noqa: SIM115 - until the end of the process

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> bool | None:
        """Leave out what the run that started this one has begun."""
        shared = item.get_closest_marker(_SHARED) is not None
        return True if shared and not _claimed(self._folder, item) else None

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Written at once, as somebody waits for it."""
        data = self._config.hook.pytest_report_to_serializable(config=self._config, report=report)
        self._file.write(json.dumps(data) + "\n")
        self._file.flush()

    def pytest_unconfigure(self) -> None:
        self._file.close()


def divide(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Start the tests that go beside, when a run has others as well."""
    if path := os.environ.get(_REPORTS):
        config.pluginmanager.register(Reporter(config, path))
        config.pluginmanager.register(Again())
        return
    config.pluginmanager.register(Summary())
    marked = [item for mark in (_OWN, _SHARED) for item in items if item.get_closest_marker(mark)]
    if marked and len(marked) < len(items) and os.geteuid() == 0 and not config.option.collectonly:
        config.pluginmanager.register(Beside(config, marked))
    else:
        config.pluginmanager.register(Again())


def _claimed(folder: Path, item: pytest.Item) -> bool:
    """Whether this process is the first that asks for a test."""
    name = hashlib.sha256(item.nodeid.encode()).hexdigest()
    try:
        (folder / f"claim-{name}").touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def _failed(item: pytest.Item, words: str) -> pytest.TestReport:
    return pytest.TestReport(
        nodeid=item.nodeid,
        location=item.location,
        keywords={},
        outcome="failed",
        longrepr=words,
        when="call",
    )
