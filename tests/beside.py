"""The tests of the lab beside all others, in a process of their own, in one run.

The lab keeps a CPU busy for a quarter of an hour; the other tests want the rest of a machine with
two. What the other process reports is reported here, after what runs here. The tests in Debian 13
come last in each, and each of them is run by the process that gets to it first. A third process,
for the units, was tried: it saves four minutes, and the clocks of tests with bounds run out.
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
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.again import Again, Summary

_REPORTS = "TEMPLATED_TEST_REPORTS"
_IMAGES = "TEMPLATED_TEST_IMAGES"
_SHARED = "debian13"
"""The mark of what any process runs."""
_PAUSE = 0.2
_ENDS_WITHIN = 60.0


class Folder:
    """What the processes of one run have in common: their reports, claims of tests, images."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="tplab-tests.")
        self.path = Path(self._folder.name)
        # One of each image for all: the lab's tests make the first.
        os.environ.setdefault(_IMAGES, self._folder.name)

    def close(self) -> None:
        """Remove it."""
        self._folder.cleanup()


class Beside:
    """A plugin of the run that shows the reports of one process. It begins when it is made."""

    def __init__(
        self,
        config: pytest.Config,
        folder: Folder,
        name: str,
        items: list[pytest.Item],
        shared: list[pytest.Item],
    ) -> None:
        """`items` are its own, and it takes of `shared` what nobody has begun then."""
        self._config = config
        self.name = name
        self._own = {item.nodeid for item in items}
        self._reported: dict[str, list[Any]] = defaultdict(list)
        self._log = folder.path / f"{name}.log"
        reports, words = folder.path / name, folder.path / f"{name}.items"
        words.write_text("".join(f"{item.nodeid}\n" for item in (*items, *shared)))
        with self._log.open("wb") as log:
            self._child = subprocess.Popen(
                [
                    # Interrupted once: by us, or by the kernel when we are killed.
                    *("setpriv", "--pdeathsig=INT", sys.executable),
                    *("-m", "pytest", "-p", "no:cacheprovider", f"@{words}"),
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
        if item.nodeid not in self._own:
            return None
        self.report(item)
        return True

    def report(self, item: pytest.Item) -> None:
        """Wait for the reports of a test that this process runs, and show them."""
        item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        try:
            reports = self._reports_of(item)
        except pytest.fail.Exception as failure:  # pytest-timeout, from its signal
            reports = [_failed(item, f"{failure.msg}; the other run said:\n{self._said()}")]
        for report in reports:
            item.ihook.pytest_runtest_logreport(report=report)
        item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)

    def pytest_unconfigure(self) -> None:
        """End the other run, after an interrupt too; it cleans up when it is interrupted."""
        if self._child.poll() is None:
            self._child.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._child.wait(_ENDS_WITHIN)
        self._child.kill()
        self._child.wait()
        self._lines.close()

    def _reports_of(self, item: pytest.Item) -> list[pytest.TestReport]:
        while True:
            ended = self._child.poll() is not None
            found = self._reports(item.nodeid)
            if found and found[-1].when == "teardown":
                return found
            if ended:
                words = f"the other run ended with {self._child.returncode}:\n{self._said()}"
                return [*found, _failed(item, words)]
            time.sleep(_PAUSE)

    def _reports(self, nodeid: str) -> list[pytest.TestReport]:
        self._read()
        return self._reported[nodeid]

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
            if isinstance(report.longrepr, list):  # of a skip; JSON has no tuples
                report.longrepr = tuple(report.longrepr)
            self._reported[report.nodeid].append(report)


class Shared:
    """A plugin of the run: a test that is shared is run here, or another process reports it."""

    def __init__(self, folder: Folder, others: list[Beside]) -> None:
        self._folder = folder
        self._others = others

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> bool | None:
        """Run it, unless another process has begun it; then wait for that one."""
        if item.get_closest_marker(_SHARED) is None:
            return None
        owner = _claimed(self._folder.path, item, "")
        for other in self._others:
            if other.name == owner:
                other.report(item)
                return True
        return None

    def pytest_unconfigure(self) -> None:
        """Remove what the processes have in common, when all of them have ended."""
        for other in self._others:
            other.pytest_unconfigure()
        self._folder.close()


class Reporter:
    """A plugin of another run: writes a line for each report."""

    def __init__(self, config: pytest.Config, path: str) -> None:
        self._config = config
        self._folder, self._name = Path(path).parent, Path(path).name
        self._file = open(path, "a")  # noqa: SIM115 - until the end of the process

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> bool | None:
        """Leave out what another process has begun."""
        if item.get_closest_marker(_SHARED) is None:
            return None
        return None if _claimed(self._folder, item, self._name) == self._name else True

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Written at once, as somebody waits for it."""
        data = self._config.hook.pytest_report_to_serializable(config=self._config, report=report)
        self._file.write(json.dumps(data) + "\n")
        self._file.flush()

    def pytest_unconfigure(self) -> None:
        self._file.close()


def divide(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Start the tests that go beside, when a run has others as well; they are reported last."""
    if path := os.environ.get(_REPORTS):
        # The last one is asked first.
        config.pluginmanager.register(Again())
        config.pluginmanager.register(Reporter(config, path))
        return
    config.pluginmanager.register(Summary())
    lab = _chosen(items, lambda item: item.get_closest_marker("lab"))
    shared = _chosen(items, lambda item: item.get_closest_marker(_SHARED))
    here = [item for item in items if item not in {*lab, *shared}]
    config.pluginmanager.register(Again())
    if lab and here and os.geteuid() == 0 and not config.option.collectonly:
        folder = Folder()
        beside = Beside(config, folder, "lab", lab, shared)
        config.pluginmanager.register(beside)
        config.pluginmanager.register(Shared(folder, [beside]))
        items[:] = [*here, *shared, *lab]


def _chosen(items: list[pytest.Item], by: Callable[[pytest.Item], object]) -> list[pytest.Item]:
    return [item for item in items if by(item)]


def _claimed(folder: Path, item: pytest.Item, name: str) -> str:
    """Who runs a test: the first process that asks here."""
    claim = folder / f"claim-{hashlib.sha256(item.nodeid.encode()).hexdigest()}"
    own = folder / f"{claim.name}.{os.getpid()}"
    own.write_text(name)
    with contextlib.suppress(FileExistsError):
        os.link(own, claim)  # whole, or not there
    return claim.read_text()


def _failed(item: pytest.Item, words: str) -> pytest.TestReport:
    return pytest.TestReport(
        nodeid=item.nodeid,
        location=item.location,
        keywords={},
        outcome="failed",
        longrepr=words,
        when="call",
    )
