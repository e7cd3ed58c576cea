"""Disk layers 2 and 3: qcow2 overlays.

A generation keeps one empty overlay over its layer 2. A clone's layer 3 is a copy of that file
(a few hundred KB, mostly holes), so that no qemu-img runs when a clone is asked for.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
from pathlib import Path

from templated.errors import HostError

_TIMEOUT = 60.0


async def run(*arguments: str, timeout: float = _TIMEOUT) -> str:
    """Run a program and return its stdout; HostError with its last line when it fails."""
    try:
        child = await asyncio.create_subprocess_exec(
            *arguments,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
    except FileNotFoundError:
        raise HostError(
            f"{arguments[0]} is not installed",
            hint="run scripts/setup, or apt install qemu-utils",
        ) from None
    try:
        async with asyncio.timeout(timeout):
            out, err = await child.communicate()
    except BaseException as error:
        with contextlib.suppress(ProcessLookupError):
            child.kill()
        await child.wait()
        if isinstance(error, TimeoutError):
            raise HostError(f"{arguments[0]} did not end within {timeout:g} s") from None
        raise
    if child.returncode != 0:
        lines = err.decode(errors="replace").strip().splitlines() or ["no message"]
        raise HostError(f"{arguments[0]} failed: {lines[-1]}")
    return out.decode(errors="replace")


async def create_overlay(target: Path, backing: Path) -> None:
    """Make an empty qcow2 layer over `backing`; nothing is left behind on failure."""
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
        shutil.copyfile(empty, target)
        os.chmod(target, 0o600)
    except OSError as error:
        target.unlink(missing_ok=True)
        raise HostError(
            f"cannot write the disk layer {target}: {error.strerror}",
            hint="free some space in state_dir, or point state_dir elsewhere",
        ) from error
