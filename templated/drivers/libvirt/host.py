"""What libvirt says of this host: what it can run, and what its own check of the host finds.

Nothing is changed. Sources: https://libvirt.org/formatcaps.html,
https://libvirt.org/manpages/virt-host-validate.html
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from typing import Literal
from xml.etree import ElementTree as ET

from templated.drivers.libvirt.connection import Connection
from templated.errors import HostError

_VALIDATED_WITHIN = 30.0
# Elsewhere, such as in sbin, daemons are not in everybody's PATH.
_DAEMONS = ("libvirtd", "virtqemud")
_LINE = re.compile(
    r"\s*QEMU: Checking (?:for |if )?(?P<what>.+?)\s*: (?P<status>PASS|WARN|FAIL)"
    r"(?: \((?P<why>.*)\))?\s*"
)


@dataclass(frozen=True)
class Named:
    """A network or a storage pool."""

    name: str
    active: bool


@dataclass(frozen=True)
class Validated:
    """One line of virt-host-validate; `why` is its advice, empty where it passes."""

    what: str
    status: Literal["PASS", "WARN", "FAIL"]
    why: str


def installed() -> str | None:
    """The path of the daemon that has QEMU's driver; None when libvirt is not installed."""
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    return next(filter(None, (shutil.which(name, path=path) for name in _DAEMONS)), None)


def networks(connection: Connection) -> list[Named]:
    """All of them, by name. Raises as `Connection.call`."""
    return connection.call(
        "the list of networks",
        lambda handle: sorted(
            (Named(one.name(), bool(one.isActive())) for one in handle.listAllNetworks()),
            key=lambda one: one.name,
        ),
    )


def pools(connection: Connection) -> list[Named]:
    """All storage pools, by name. Raises as `Connection.call`."""
    return connection.call(
        "the list of storage pools",
        lambda handle: sorted(
            (Named(one.name(), bool(one.isActive())) for one in handle.listAllStoragePools()),
            key=lambda one: one.name,
        ),
    )


def has_kvm(connection: Connection) -> bool:
    """Whether it can run x86-64 guests under KVM. Raises as `Connection.call`."""
    xml = connection.call("the capabilities", lambda handle: handle.getCapabilities())
    capabilities = ET.fromstring(xml)  # noqa: S314 - it is libvirt's own
    kinds = capabilities.iterfind("guest/arch[@name='x86_64']/domain")
    return any(kind.get("type") == "kvm" for kind in kinds)


def validate() -> list[Validated]:
    """Run virt-host-validate. HostError when it is not there, does not end or says nothing."""
    command = ["virt-host-validate", "qemu"]
    try:
        # It exits with 1 when one of its checks fails.
        done = subprocess.run(
            command,
            env={**os.environ, "LC_ALL": "C"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_VALIDATED_WITHIN,
            check=False,
        )
    except FileNotFoundError:
        raise HostError(
            "virt-host-validate is not installed", hint="apt install libvirt-clients"
        ) from None
    except subprocess.TimeoutExpired:
        raise HostError(f"virt-host-validate did not end in {_VALIDATED_WITHIN:g} s") from None
    except OSError as error:
        raise HostError(f"cannot start virt-host-validate: {error.strerror}") from error
    found = validated(done.stdout.decode(errors="replace"))
    if not found:
        raise HostError("virt-host-validate says nothing of QEMU")
    return found


def validated(printed: str) -> list[Validated]:
    """The lines of virt-host-validate's output; what has another form is left out."""
    found = filter(None, map(_LINE.fullmatch, printed.splitlines()))
    return [Validated(one["what"], _STATUS[one["status"]], one["why"] or "") for one in found]


_STATUS: dict[str, Literal["PASS", "WARN", "FAIL"]] = {
    "PASS": "PASS",
    "WARN": "WARN",
    "FAIL": "FAIL",
}
