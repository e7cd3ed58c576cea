"""What QEMU may open by a path: Landlock holds it to that, where this host can."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from templated.drivers.hypervisor import landlock
from templated.drivers.hypervisor.base import Launch
from templated.drivers.hypervisor.landlock import READ, RUN, WRITE, rule
from templated.drivers.hypervisor.qemu.command import reopened_files
from templated.model.network import Slirp

_SYSTEM = Path("/usr")
_MERGED = ("/bin", "/lib", "/lib64")
"""Links into /usr, but on some hosts."""
_LIBRARIES = Path("/etc/ld.so.cache")
_RESOLVER = "/etc/resolv.conf"
_GENERAL = ("/", "/etc", "/run", "/tmp")
"""Directories of all kinds of files."""


class Reach:
    """The same for all VMs, but for the files of each. Made once: it runs QEMU, for 0.1 s."""

    def __init__(self, program: str) -> None:
        """`program` is QEMU's path."""
        found = shutil.which(program)
        rules = _always(found)
        # Its libraries may lie where no rule is: better without Landlock than without VMs.
        command = (found, "-version") if found else ("true",)
        self.problem = landlock.problem(rules, *command)
        """Why it does not hold VMs to anything; empty when it does."""
        self._always = () if self.problem else landlock.options(rules)

    def options(self, launch: Launch) -> tuple[str, ...]:
        """For setpriv; none when Landlock cannot be used."""
        return (*self._always, *_of(launch)) if self._always else ()


def _always(program: str | None) -> list[str]:
    """Programs, libraries and firmware."""
    return [
        *(rule(path, RUN) for path in _directories(program)),
        *([rule(_LIBRARIES)] if _LIBRARIES.exists() else []),
        # What GLib seeds its random numbers from.
        rule("/dev/urandom"),
        # On which QEMU tries whether there are locks.
        rule("/dev/null", WRITE),
    ]


def _directories(program: str | None) -> list[Path]:
    places = [Path(path) for path in _MERGED]
    if program is not None:
        own = Path(os.path.realpath(program)).parent
        # QEMU looks for its firmware there, or beside it, and for its modules.
        places += [own, own.parent / "share/qemu", own.parent / "lib"]
    elsewhere = (place for place in places if not place.resolve().is_relative_to(_SYSTEM))
    return [_SYSTEM, *(place for place in elsewhere if place.is_dir())]


def _of(launch: Launch) -> list[str]:
    """What one VM has beside that."""
    rights = WRITE if launch.memory_shared else READ
    rules = [
        rule(f"/proc/self/fd/{fd}", rights if path == launch.memory else READ)
        for path, fd in reopened_files(launch)
    ]
    if launch.hardware.accel == "kvm" and os.path.exists("/dev/kvm"):
        rules.append(rule("/dev/kvm", WRITE))
    if isinstance(launch.network, Slirp) and not launch.network.restrict:
        rules += _resolver()
    return rules


def _resolver() -> list[str]:
    """Who slirp asks for names: it reads that again when it has changed.

    A directory of its own is named as a whole, since the file may be replaced in it by another.
    """
    file = os.path.realpath(_RESOLVER)
    if not os.path.exists(file):
        return []
    directory = os.path.dirname(file)
    return [rule(file if directory in _GENERAL else directory)]
