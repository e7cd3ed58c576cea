"""Debian 13 holds what Debian 12 does: the demo and the tests, run in it as they are."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.debian13.root import CHECKOUT, debian_root, run
from tests.sample import ALL, PART

pytestmark = [
    pytest.mark.debian13,
    pytest.mark.skipif(os.geteuid() != 0, reason="only root can make and enter a Debian"),
]

_BOUND = 1500.0
# What depends on QEMU, or on the guest's Python. The demo has made an image.
_REAL = [
    *("clones.py", "escape.py", "hypervisor.py", "identity_hooks.py", "network.py", "suites.py"),
    *("egress.py::test_life", "egress.py::test_failover"),
    "daemon.py::test_q35",
    "libvirt.py::test_paths",
    "daemon.py::test_transport_exec",
    "functions.py::test_the_first_request_and_the_next",
    "functions.py::test_paused_between_requests",
    "functions.py::test_from_a_pool",
    "functions.py::test_much_output_and_large_payloads",
    "functions.py::test_a_bootstrap_of_its_own",
    "functions.py::test_killed_in_the_middle",
]
_PART = 0.2
_REPEATED = "tests/real/test_clones.py::test_fifty_clones_share_no_identity"
_PYTEST = [".venv/bin/python", "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider"]


@pytest.fixture(scope="module")
def root() -> Iterator[Path]:
    """A Debian 13 in which `scripts/setup` has been run and nothing else."""
    with debian_root() as root:
        yield root


def passes(root: Path, log: Path, *command: str) -> str:
    """Run a command that must succeed, and return its output; fail with the end of it."""
    with log.open("wb") as output:
        code = run(root, *command, output=output, timeout=_BOUND)
    said = log.read_text(errors="replace")
    if code != 0:
        shown = "\n".join(said.splitlines()[-300:])
        pytest.fail(f"{' '.join(command)} ended with {code}:\n{shown}", pytrace=False)
    return said


def test_it_is_debian_13(root: Path, tmp_path: Path) -> None:
    """What runs in it are its own programs, and it needs nothing more."""
    script = "cat /etc/debian_version; qemu-system-x86_64 --version; .venv/bin/python -V"
    said = passes(root, tmp_path / "log", "sh", "-c", f"{script}; scripts/setup")
    assert said.startswith("13") and "version 10.0" in said and "Python 3.13" in said
    assert "setup:" not in said


def test_demo(root: Path, tmp_path: Path) -> None:
    """The main job, from nothing."""
    said = passes(root, tmp_path / "log", "scripts/demo")
    assert "direct to floor" in said and "host: QEMU 10.0" in said
    assert "start pool" in said and "hello:prod: {'2': 100}" in said


def test_real(root: Path, tmp_path: Path) -> None:
    """The tests that talk to QEMU."""
    chosen = [f"tests/real/test_{name}" for name in _REAL]
    assert " passed" in passes(
        root, tmp_path / "log", *_PYTEST, *chosen, "--deselect", _REPEATED, "-m", "not long"
    )


def test_unit(root: Path, tmp_path: Path) -> None:
    """Unit tests under the Python of Debian 13: a part of them, or all when everything is taken."""
    part = () if ALL in os.environ else ("env", f"{PART}={_PART}")
    assert " passed" in passes(root, tmp_path / "log", *part, *_PYTEST, "tests/unit")


def test_nothing_stays(root: Path, tmp_path: Path) -> None:
    """What is written in it, and what is mounted for it, is gone with the command."""
    passes(
        root, tmp_path / "log", "sh", "-c", "for f in /root /dev/shm .; do echo x >$f/left; done"
    )
    said = passes(root, tmp_path / "log", "sh", "-c", "ls /root/left /dev/shm/left left; true")
    assert said.count("cannot access") == 3
    assert not (root / "root/left").exists() and not (CHECKOUT / "left").exists()
    assert str(root) not in Path("/proc/self/mountinfo").read_text()
