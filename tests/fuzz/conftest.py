"""How many cases each target was given, at the end of the run."""

from __future__ import annotations

import pytest

from tests.fuzz.cases import counts


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for target, text in counts.items():
        terminalreporter.write_line(f"fuzz: {target}: {text}")
