"""A bound on the time of every test, and the long ones beside the others."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.beside import divide
from tests.fuzz import SECONDS
from tests.sample import leave_out

# Seconds, by the folder; setup.cfg has the default. The first test of a run makes images.
_BOUNDS = {"real": 600, "faults": 180, "debian13": 1800, "lab": 1800, "fuzz": SECONDS + 85}
_TESTS = Path(__file__).parent


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what takes long, and give each test the bound of its folder, unless it has one."""
    leave_out(config, items)
    for item in items:
        bound = _BOUNDS.get(item.path.relative_to(_TESTS).parts[0])
        if bound is not None and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(bound))


def pytest_collection_finish(session: pytest.Session) -> None:
    """After `-k` and `-m` have chosen."""
    divide(session.config, session.items)


@pytest.hookimpl(tryfirst=True)
def pytest_keyboard_interrupt(excinfo: pytest.ExceptionInfo[BaseException]) -> None:
    """Keep the last entry: all are formatted, which took a minute on a busy host, and only then
    do fixtures clean up."""
    excinfo.traceback = excinfo.traceback[-1:]
