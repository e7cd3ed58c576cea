"""A bound on the time of every test, and which tests may run beside which."""

from __future__ import annotations

from pathlib import Path

import pytest

# Seconds, by the folder; setup.cfg has the default. The first test of a run makes images.
_BOUNDS = {"real": 600, "debian13": 1800, "lab": 1800}
_TESTS = Path(__file__).parent


# Before pytest-xdist, which reads the groups.
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give each test the bound of its folder, unless it has one of its own, and a group.

    With `-n 2 --dist loadgroup` the lab's tests run beside all others, and those one by one: the
    lab has one CPU, and the machine's other one must be there for who measures clocks and pools.
    """
    for item in items:
        folder = item.path.relative_to(_TESTS).parts[0]
        if folder in _BOUNDS and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(_BOUNDS[folder]))
        item.add_marker(pytest.mark.xdist_group("lab" if folder == "lab" else "host"))
