"""What doctor says of libvirt, over libvirt's own `test` driver."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from templated.drivers.libvirt import connection, host
from templated.errors import HostError, HypervisorError
from templated.services import libvirt_checks

FAKE = "test:///default"
SAID = """\
  QEMU: Checking for hardware virtualization                                 : PASS
  QEMU: Checking if device /dev/kvm exists                                   : FAIL (Check that \
the module is loaded (lsmod))
  QEMU: Checking if device /dev/vhost-net exists                             : WARN (Load it)
  QEMU: Checking for device assignment IOMMU support                         : WARN (Unknown)
  QEMU: Checking for secure guest support                                    : WARN (Unknown)
   LXC: Checking for Linux >= 2.6.26                                         : PASS
something else
"""


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[tuple[str, str, str]]]:
    """The checks of a host whose libvirt is the fake; name, status and detail."""
    validated = host.validated(SAID)

    def connect(uri: str, **options: Any) -> connection.Connection:
        return connection.connect(FAKE, **options)

    monkeypatch.setattr(host, "installed", lambda: "/usr/sbin/libvirtd")
    monkeypatch.setattr(host, "validate", lambda: validated)
    monkeypatch.setattr(libvirt_checks, "connect", connect)

    def run(*, needed: bool = False, kvm: bool = False) -> list[tuple[str, str, str]]:
        checks = list(libvirt_checks.libvirt_checks(needed=needed, kvm=kvm))
        assert all(check.fix for check in checks if check.status != "PASS")
        return [(check.name, check.status, check.detail) for check in checks]

    return run


def test_a_host_with_libvirt(found: Callable[..., list[tuple[str, str, str]]]) -> None:
    checks = found()
    assert [(name, status) for name, status, _ in checks] == [
        ("libvirt", "PASS"),
        ("libvirt kvm", "WARN"),
        ("libvirt network", "PASS"),
        ("libvirt storage", "PASS"),
        ("libvirt host", "PASS"),
        ("libvirt host", "WARN"),
        ("libvirt host", "WARN"),
    ]
    details = [detail for _, _, detail in checks]
    assert details[0].startswith(f"{FAKE}: libvirt ")
    assert details[2:4] == ["default", "default-pool"]
    assert details[4].startswith("virt-host-validate: 1 of 5 pass")
    assert details[5] == "virt-host-validate fails: device /dev/kvm exists"


def test_kvm_is_wanted(found: Callable[..., list[tuple[str, str, str]]]) -> None:
    """What libvirt's check calls a failure is one where guests must run under KVM."""
    statuses = [status for name, status, _ in found(kvm=True) if name == "libvirt host"]
    assert statuses == ["PASS", "FAIL", "WARN"]


@pytest.mark.parametrize(("needed", "status"), [(False, "PASS"), (True, "FAIL")])
def test_no_libvirt(monkeypatch: pytest.MonkeyPatch, needed: bool, status: str) -> None:
    """It is a failure only where a template runs on it."""
    monkeypatch.setattr(host, "installed", lambda: None)
    [check] = libvirt_checks.libvirt_checks(needed=needed, kvm=False)
    assert (check.name, check.status) == ("libvirt", status)
    assert "apt install" in check.fix


@pytest.mark.parametrize(("needed", "status"), [(False, "WARN"), (True, "FAIL")])
def test_nothing_answers(
    found: Callable[..., list[tuple[str, str, str]]],
    monkeypatch: pytest.MonkeyPatch,
    needed: bool,
    status: str,
) -> None:
    def refuse(uri: str, **options: Any) -> connection.Connection:
        raise HostError(f"cannot connect to {uri}", hint="systemctl start libvirtd")

    monkeypatch.setattr(libvirt_checks, "connect", refuse)
    first, *rest = found(needed=needed)
    assert first == ("libvirt", status, "/usr/sbin/libvirtd: cannot connect to qemu:///system")
    assert {name for name, _, _ in rest} == {"libvirt host"}


def test_one_answer_fails(
    found: Callable[..., list[tuple[str, str, str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others are given all the same."""

    def refuse(connection: object) -> bool:
        raise HypervisorError("the capabilities: no")

    monkeypatch.setattr(host, "has_kvm", refuse)
    checks = found()
    assert ("libvirt kvm", "WARN", "the capabilities: no") in checks
    assert ("libvirt network", "PASS", "default") in checks


@pytest.mark.parametrize(
    ("networks", "status", "detail"),
    [
        ([], "WARN", "there is none"),
        ([host.Named("a", False)], "WARN", "none is active: a (inactive)"),
        ([host.Named("a", False), host.Named("b", True)], "PASS", "a (inactive), b"),
    ],
)
def test_networks(
    found: Callable[..., list[tuple[str, str, str]]],
    monkeypatch: pytest.MonkeyPatch,
    networks: list[host.Named],
    status: str,
    detail: str,
) -> None:
    monkeypatch.setattr(host, "networks", lambda connection: networks)
    [check] = [check for check in found() if check[0] == "libvirt network"]
    assert check[1] == status and check[2].startswith(detail)


@pytest.mark.parametrize(
    ("pools", "status"),
    [([], "PASS"), ([host.Named("a", True), host.Named("b", False)], "WARN")],
)
def test_pools(
    found: Callable[..., list[tuple[str, str, str]]],
    monkeypatch: pytest.MonkeyPatch,
    pools: list[host.Named],
    status: str,
) -> None:
    monkeypatch.setattr(host, "pools", lambda connection: pools)
    assert [s for name, s, _ in found() if name == "libvirt storage"] == [status]


@pytest.mark.parametrize(
    ("version", "status"), [("8.1.9", "FAIL"), ("8.2.0", "PASS"), ("12.0.0", "PASS")]
)
def test_versions(
    found: Callable[..., list[tuple[str, str, str]]],
    monkeypatch: pytest.MonkeyPatch,
    version: str,
    status: str,
) -> None:
    versions = connection.Versions(libvirt=version, hypervisor="7.2.0")
    monkeypatch.setattr(connection.Connection, "versions", lambda self: versions)
    assert found(needed=True)[0][1] == status


def test_what_virt_host_validate_prints() -> None:
    assert host.validated(SAID)[:2] == [
        host.Validated("hardware virtualization", "PASS", ""),
        host.Validated("device /dev/kvm exists", "FAIL", "Check that the module is loaded (lsmod)"),
    ]
    assert len(host.validated(SAID)) == 5


@pytest.mark.parametrize(
    ("script", "message"),
    [
        (None, "is not installed"),
        ("exit 1", "says nothing"),
        ("sleep 60", "did not end"),
    ],
)
def test_virt_host_validate_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str | None, message: str
) -> None:
    if script is not None:
        program = tmp_path / "virt-host-validate"
        program.write_text(f"#!/bin/sh\nPATH=/usr/bin:/bin\nexec {script}\n")
        program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(host, "_VALIDATED_WITHIN", 0.2 if script == "sleep 60" else 30.0)
    with pytest.raises(HostError, match=message):
        host.validate()


def test_this_hosts_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real program, with whatever this host has."""
    monkeypatch.setenv("LANG", "de_DE.UTF-8")
    found = host.validate()
    assert len(found) > 3
    assert all(one.why for one in found if one.status != "PASS")
