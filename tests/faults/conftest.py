"""One daemon for all cases, replaced when a case failed; and how many cases there were."""

from __future__ import annotations

import os
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.faults.rig import Rig
from tests.real.conftest import built, image_store, prepare  # fixtures
from tests.real.harness import Daemon

__all__ = ["built", "image_store"]
_CASES = "cases"


class Rigs:
    """Makes rigs when they are needed, and keeps them until a case fails in one."""

    def __init__(self, make: Callable[[], Rig]) -> None:
        self._make = make
        self._rig: Rig | None = None

    def get(self) -> Rig:
        if self._rig is not None and not self._rig.clean:
            self.close()
        if self._rig is None:
            self._rig = self._make()
        return self._rig

    def close(self, before: Callable[[], None] = lambda: None) -> None:
        """End the daemon and its VMs, do `before`, and remove their places."""
        if self._rig is not None:
            self._rig.end()
            before()
            self._rig.close()
            self._rig = None


def make_rig(built: Daemon, image_store: Path, **config: Any) -> Rig:
    """A rig on a daemon of its own."""
    daemon = prepare(Daemon(), image_store)
    try:
        return Rig(daemon, built, **config)
    except BaseException:
        daemon.close()
        raise


@pytest.fixture(scope="session")
def user_rigs(built: Daemon, image_store: Path) -> Iterator[Rigs]:
    """Rigs in user mode."""
    rigs = Rigs(lambda: make_rig(built, image_store))
    yield rigs
    rigs.close()


@pytest.fixture
def rig(user_rigs: Rigs) -> Iterator[Rig]:
    """A daemon with two clones. A case that ends in the middle leaves it to be replaced."""
    yield from _lent(user_rigs)


@pytest.fixture(scope="session")
def small_rigs(built: Daemon, image_store: Path) -> Iterator[Rigs]:
    """Rigs whose state_dir and shm_dir are file systems of their own, to be filled up."""
    mounted: list[Path] = []

    def unmount() -> None:
        while mounted:
            subprocess.run(["umount", "--lazy", mounted.pop()], check=False)

    def make() -> Rig:
        unmount()
        daemon = Daemon()
        daemon.state.mkdir(mode=0o700)
        for place, size in ((daemon.state, "256m"), (daemon.shm, "256m")):
            subprocess.run(
                ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", place], check=True
            )
            mounted.append(place)
        (daemon.state / "images").symlink_to(image_store / "images")
        try:
            return Rig(daemon, built)
        except BaseException:
            daemon.close()
            raise

    rigs = Rigs(make)
    yield rigs
    rigs.close(unmount)


@pytest.fixture
def small(small_rigs: Rigs) -> Iterator[Rig]:
    """As `rig`, on file systems of its own."""
    yield from _lent(small_rigs)


def _lent(rigs: Rigs) -> Iterator[Rig]:
    rig = rigs.get()
    rig.clean = False
    yield rig
    # The test sets `clean`, as its last step.


@pytest.fixture(scope="session")
def bridge_rigs(built: Daemon, image_store: Path) -> Iterator[Rigs]:
    """Rigs on a bridge with guarded ports, in a network namespace of their own."""
    name = f"templated-faults-{os.getpid()}"
    network = {"mode": "bridge", "subnet": "10.97.0.0/24", "netns": name, "antispoof": True}

    def make() -> Rig:
        subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
        subprocess.run(["ip", "netns", "add", name], check=True)
        return make_rig(built, image_store, network=network)

    rigs = Rigs(make)
    yield rigs
    rigs.close()
    subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


@pytest.fixture
def bridged(bridge_rigs: Rigs) -> Iterator[Rig]:
    """As `rig`, on a bridge."""
    yield from _lent(bridge_rigs)


@pytest.fixture
def count(request: pytest.FixtureRequest) -> Callable[[int], None]:
    """Counts the cases of a test that passed; with its reports, as it may run beside others."""

    def add(cases: int = 1) -> None:
        request.node.user_properties.append((_CASES, cases))

    return add


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print how many cases there were, by their kind."""
    counts: Counter[str] = Counter()
    for report in terminalreporter.getreports("passed"):
        kind = Path(report.nodeid.partition("::")[0]).stem.removeprefix("test_")
        if report.when == "call":
            cases = [value for name, value in report.user_properties if name == _CASES]
            counts[kind] += sum(int(str(value)) for value in cases)
    counts += Counter()  # those that have any
    if counts:
        parts = ", ".join(f"{kind} {number}" for kind, number in sorted(counts.items()))
        terminalreporter.write_line(f"faults: {sum(counts.values())} cases passed ({parts})")
