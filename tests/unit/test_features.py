"""What QEMU can do by its version, and what is said of versions that are not proven."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from templated.drivers.hypervisor.base import SavedState
from templated.drivers.hypervisor.qemu.features import PROVEN, features, release
from templated.drivers.hypervisor.qemu.machine import incoming_uri
from templated.model.config import RestoreConfig
from templated.services.doctor import run_checks
from tests.unit.fake_daemon import configured


@pytest.mark.parametrize(
    ("version", "number"),
    [("7.2.22", (7, 2)), ("10.0.13", (10, 0)), ("8.2.0-rc1", (8, 2)), ("9", (0, 0)), ("", (0, 0))],
)
def test_release(version: str, number: tuple[int, int]) -> None:
    assert release(version) == number


@pytest.mark.parametrize(
    ("version", "read_only", "uri"),
    [
        ("7.2.22", False, "fd:7"),
        ("8.1.5", False, "fd:7"),
        ("8.2.0", True, "file:/dev/fdset/1"),
        ("10.0.13", True, "file:/dev/fdset/1"),
        ("nonsense", False, "fd:7"),
    ],
)
def test_by_version(version: str, read_only: bool, uri: str) -> None:
    """The newer way where there is one; an unknown version gets the oldest."""
    can = features(version)
    assert can.read_only_memory is read_only
    assert incoming_uri(SavedState(Path("/s"), "fd", 7), can) == uri
    assert incoming_uri(SavedState(Path("/s s")), can) == "exec:exec cat '/s s'"


@pytest.mark.parametrize(
    ("version", "status"),
    [("7.2.22", "PASS"), ("10.0.13", "PASS"), ("7.1.0", "WARN"), ("8.2.2", "WARN")],
)
def test_doctor_says_what_is_proven(tmp_path: Path, version: str, status: str) -> None:
    """A QEMU that no test has seen is a warning that names those that are proven."""
    config = msgspec.structs.replace(configured(tmp_path), qemu=str(tmp_path / "q"), accel="tcg")
    qemu = Path(config.qemu)
    qemu.write_text(f"#!/bin/sh\necho QEMU emulator version {version}\n")
    qemu.chmod(0o755)
    check = next(check for check in run_checks(config) if check.name == "qemu")
    assert check.status == status and version in check.detail
    if status == "WARN":
        assert all(host in check.fix for host in PROVEN.values())


@pytest.mark.parametrize(
    ("settings", "answer", "status", "detail"),
    [
        ("", "exit 0", "PASS", "starts no program"),
        ("", "echo There is no option group >&2; exit 1", "FAIL", "There is no option group"),
        ("transport", "exit 0", "WARN", "may start programs"),
        ("confine", "exit 0", "WARN", "confine is false"),
    ],
)
def test_doctor_says_whether_vms_are_confined(
    tmp_path: Path, settings: str, answer: str, status: str, detail: str
) -> None:
    """A QEMU that knows no filter, and a configuration that does not want one, are named."""
    config = msgspec.structs.replace(configured(tmp_path), qemu=str(tmp_path / "q"), accel="tcg")
    if settings == "transport":
        config = msgspec.structs.replace(config, restore=RestoreConfig(transport="exec"))
    elif settings == "confine":
        config = msgspec.structs.replace(config, confine=False)
    qemu = Path(config.qemu)
    qemu.write_text(f'#!/bin/sh\n[ "$1" != -sandbox ] && exit 3\n{answer}\n')
    qemu.chmod(0o755)
    check = next(check for check in run_checks(config) if check.name == "confinement")
    assert check.status == status and detail in check.detail
    assert bool(check.fix) is (status != "PASS")
