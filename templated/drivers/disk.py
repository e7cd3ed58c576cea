"""Disk layers 2 and 3: qcow2 overlays.

A generation keeps one empty overlay over its layer 2. A clone's layer 3 is a copy of that file
(a few hundred KB, mostly holes), so that no qemu-img runs when a clone is requested.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from templated import failpoints
from templated.drivers.host.programs import run
from templated.errors import HostError


async def create_overlay(target: Path, backing: Path) -> None:
    """Make an empty qcow2 layer over `backing`. Raises HostError; leaves no file then."""
    try:
        await run(
            *("qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2"),
            *("-o", "lazy_refcounts=off,cluster_size=65536"),
            *("-b", str(backing), str(target)),
        )
    except BaseException:
        target.unlink(missing_ok=True)
        raise


def copy_overlay(empty: Path, target: Path) -> None:
    """Copy an empty layer; HostError, and no file, when the disk is full. Blocks for ~0.1 ms."""
    try:
        if failpoints.armed:
            failpoints.hit("slot.overlay")
        shutil.copyfile(empty, target)
        os.chmod(target, 0o600)
    except OSError as error:
        target.unlink(missing_ok=True)
        raise HostError(
            f"cannot write the disk layer {target}: {error.strerror}",
            hint="free some space in state_dir, or point state_dir elsewhere",
        ) from error
