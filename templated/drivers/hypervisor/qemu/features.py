"""What QEMU can do, by its version: the one place that knows.

From QEMU's documents "Deprecated features" (docs/about/deprecated.rst), qapi/qom.json and
docs/devel/migration. A feature is here only while a version that lacks it is supported.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass

PROVEN = {(7, 2): "Debian 12", (10, 0): "Debian 13"}
"""The versions that all tests run on, and where they are from."""


@dataclass(frozen=True)
class Features:
    """What differs between the versions that are supported."""

    read_only_memory: bool
    """`memory-backend-file,readonly=on,rom=off`: a private mapping of a file that is opened for
    reading only (8.2). Before, QEMU opens the file for writing too."""
    file_uri: bool
    """Saved state goes to and comes from `file:` (8.2); `fd:` of a plain file is deprecated since
    9.1. Before, it goes by `fd:` both ways."""
    set_active: bool
    """`blockdev-set-active` (10.0). Who saves a VM that never ran after its restore needs it: the
    disks of such a VM are inactive, and `savevm` refuses those. Before, it takes them."""


@functools.cache
def features(version: str) -> Features:
    """What the QEMU of this version can do; an unreadable version counts as the oldest."""
    number = release(version)
    return Features(
        read_only_memory=number >= (8, 2),
        file_uri=number >= (8, 2),
        set_active=number >= (10, 0),
    )


def release(version: str) -> tuple[int, int]:
    """Major and minor number of a version; zeros when it is not readable."""
    found = re.match(r"(\d+)\.(\d+)", version)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def proven() -> str:
    """The proven versions, for people."""
    return " and ".join(f"{major}.{minor} ({host})" for (major, minor), host in PROVEN.items())
