"""A test that fails is tried once more, and the run's summary says so.

Much runs side by side on two CPUs, and a bound that is generous on a quiet machine may be reached.
Also, the lab emulates a CPU with virtualisation, on which now and then a guest never begins to run:
about one boot in some hundred, for no reason that was found yet. What is wrong for good fails
twice; what fails once is shown with its whole report. One that has used up its time is not tried
again.
"""

from __future__ import annotations

import pytest
from _pytest.runner import runtestprotocol

_FIRST = "failed at the first try"


class Again:
    """A plugin of each process that runs tests."""

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item, nextitem: pytest.Item | None) -> bool:
        """Run it, and once more when it failed; only the last try is reported."""
        item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        reports = runtestprotocol(item, nextitem=nextitem, log=False)
        failed = [report for report in reports if report.failed]
        if failed and not any("Timeout" in report.longreprtext for report in failed):
            _forget(item)
            reports = runtestprotocol(item, nextitem=nextitem, log=False)
            for report in reports:
                report.user_properties += [(_FIRST, first.longreprtext) for first in failed]
        for report in reports:
            item.ihook.pytest_runtest_logreport(report=report)
        item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
        return True


def _forget(item: pytest.Item) -> None:
    """Have its fixtures made anew, those that failed too; as pytest-rerunfailures does."""
    item._initrequest()  # type: ignore[attr-defined]
    for fixtures in item._fixtureinfo.name2fixturedefs.values():  # type: ignore[attr-defined]
        for fixture in fixtures:
            if fixture.cached_result is not None and fixture.cached_result[2] is not None:
                fixture.finish(item._request)  # type: ignore[attr-defined]


class Summary:
    """A plugin of the process that a person looks at."""

    def __init__(self) -> None:
        self._seen: dict[str, list[str]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Collect what was tried again."""
        said = [str(text) for name, text in report.user_properties if name == _FIRST]
        if said:
            self._seen[report.nodeid] = said

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Show the first failures, so that nobody takes them for successes."""
        for nodeid, texts in self._seen.items():
            terminalreporter.section(f"{nodeid} {_FIRST}")
            for text in texts:
                terminalreporter.line(text)
