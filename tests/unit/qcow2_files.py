"""Disk images that qemu-img makes for tests."""

from __future__ import annotations

import subprocess
from pathlib import Path

_TRIES = 20


def qemu_img(*arguments: str | Path) -> None:
    """Run it, which must succeed."""
    subprocess.run(["qemu-img", *map(str, arguments)], check=True, capture_output=True, timeout=60)


def encrypted(path: Path, size: str) -> None:
    """Make a qcow2 file that is encrypted with LUKS, in place of what is there.

    qemu-img times its own work for that, and gives up when a busy host lets it have no time.
    """
    secret = ("--object", "secret,id=s,data=secret")
    options = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10"
    for left in reversed(range(_TRIES)):
        path.unlink(missing_ok=True)
        try:
            qemu_img("create", "-q", *secret, "-f", "qcow2", "-o", options, path, size)
            break
        except subprocess.CalledProcessError as error:
            if left == 0 or b"CPU usage" not in error.stderr:
                raise
