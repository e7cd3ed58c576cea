"""The checkout on Debian 13: its demo and the tests, on that release's QEMU and Python."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.debian13 import root

pytestmark = pytest.mark.debian13
_PYTEST = (".venv/bin/python", "-m", "pytest", "-q", "-p", "no:cacheprovider")
_TIMEOUT = 1700.0
_SHOWN = 150
"""Lines of a command that failed."""


@pytest.fixture(scope="session")
def debian() -> Iterator[Path]:
    """A Debian 13 with what scripts/setup installs in it."""
    if os.geteuid() != 0:
        pytest.skip("only root makes a Debian root and enters it")
    with root.debian_root() as made:
        yield made


def run(debian: Path, tmp_path: Path, *command: str) -> str:
    """Run a command in it that must succeed; returns its output."""
    log = tmp_path / "output"
    with log.open("wb") as output:
        code = root.run(debian, *command, output=output, timeout=_TIMEOUT)
    text = log.read_text(errors="replace")
    if code != 0:
        shown = "\n".join(text.splitlines()[-_SHOWN:])
        pytest.fail(f"{' '.join(command)} ended with {code} on Debian 13:\n{shown}", pytrace=False)
    return text


def test_it_is_debian_13(debian: Path, tmp_path: Path) -> None:
    """Another release, QEMU and Python than Debian 12's."""
    versions = "cat /etc/debian_version; qemu-system-x86_64 --version; .venv/bin/python --version"
    text = run(debian, tmp_path, "sh", "-c", versions)
    assert re.search(r"^13\.", text, re.MULTILINE)
    assert "version 10." in text and "Python 3.13" in text


def test_demo(debian: Path, tmp_path: Path) -> None:
    """The main job, with nothing done before: a template, clones by every path, a benchmark."""
    text = run(debian, tmp_path, "scripts/demo")
    assert "direct to floor" in text and "removed fn-123" in text


@pytest.mark.parametrize("folder", ["unit", "real"])
def test_tests(debian: Path, tmp_path: Path, folder: str) -> None:
    """The same tests as on this host."""
    text = run(debian, tmp_path, *_PYTEST, f"tests/{folder}")
    assert re.search(r"\d+ passed", text.splitlines()[-1])


def test_nothing_stays(debian: Path, tmp_path: Path) -> None:
    """What is written in it, and what is mounted for it, is gone with the command."""
    run(debian, tmp_path, "sh", "-c", "echo x >/root/x; echo x >/dev/shm/x; echo x >README.md")
    assert run(debian, tmp_path, "sh", "-c", "ls -A /dev/shm; ls /root/x; true").count("x\n") == 0
    assert not (debian / "root/x").exists()
    assert (root.CHECKOUT / "README.md").read_text() != "x\n"
    assert str(debian) not in Path("/proc/self/mountinfo").read_text()
