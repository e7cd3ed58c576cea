"""Runs programs of the host: each for a bounded time, and none is left behind."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from templated import failpoints
from templated.errors import HostError

PACKAGES = {
    "conntrackd": "conntrackd",
    "dpkg-deb": "dpkg",
    "mkfs.erofs": "erofs-utils",
    "mkfs.ext4": "e2fsprogs",
    "mmdebstrap": "mmdebstrap",
    "newuidmap": "uidmap",
    "nft": "nftables",
    "ip": "iproute2",
    "keepalived": "keepalived",
    "mcopy": "mtools",
    "mkfs.vfat": "dosfstools",
    "qemu-img": "qemu-utils",
    "qemu-system-x86_64": "qemu-system-x86",
    "ssh-keygen": "openssh-client",
    "unshare": "util-linux",
}
"""The Debian packages of the programs that this project runs."""
_TIMEOUT = 60.0


@asynccontextmanager
async def started(
    *arguments: str, stderr: int = asyncio.subprocess.STDOUT, **options: Any
) -> AsyncIterator[asyncio.subprocess.Process]:
    """A program in a process group of its own; the rest of the group is killed at the end.

    Its stdout is a pipe, and takes stderr too unless that is given. `options` are those of
    asyncio.create_subprocess_exec. Raises HostError when the program cannot be started.
    """
    try:
        if failpoints.armed:
            await failpoints.reach("program.start")
        process = await asyncio.create_subprocess_exec(
            *arguments,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=stderr,
            start_new_session=True,
            **options,
        )
    except FileNotFoundError:
        raise missing(arguments[0]) from None
    except OSError as error:
        raise _not_started(arguments[0], error) from error
    try:
        yield process
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()


async def run(*arguments: str, timeout: float = _TIMEOUT) -> str:
    """Run a program, at most `timeout` seconds, and return its stdout.

    Raises HostError when it is not installed, does not end, or fails: then with its last line.
    """
    try:
        # Around its start, too: that waits for the program's file to be read.
        async with (
            asyncio.timeout(timeout),
            started(*arguments, stderr=asyncio.subprocess.PIPE) as process,
        ):
            out, err = await process.communicate()
    except TimeoutError:
        raise _endless(arguments[0], timeout) from None
    if process.returncode != 0:
        raise _failed(arguments[0], process.returncode, _lines(err)[-1:])
    return out.decode(errors="replace")


def run_here(*arguments: str, stdin: str, timeout: float = _TIMEOUT, hint: str = "") -> str:
    """As `run`, in the namespaces of the calling thread, which it blocks.

    Raises HostError with the first line that the program prints, and `hint`.
    """
    try:
        if failpoints.armed:
            failpoints.hit("program.here")
        done = subprocess.run(
            arguments, input=stdin.encode(), capture_output=True, timeout=timeout, check=False
        )
    except FileNotFoundError:
        raise missing(arguments[0]) from None
    except OSError as error:
        raise _not_started(arguments[0], error) from error
    except subprocess.TimeoutExpired:
        raise _endless(arguments[0], timeout) from None
    if done.returncode != 0:
        raise _failed(arguments[0], done.returncode, _lines(done.stderr)[:1], hint)
    return done.stdout.decode(errors="replace")


def find(program: str) -> str | None:
    """Where a program is; also beside PATH, where Debian has those of root. None: nowhere."""
    return shutil.which(program, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


def missing(program: str) -> HostError:
    """The error for a program that is not installed."""
    package = PACKAGES.get(os.path.basename(program))
    return HostError(
        f"{program} is not installed",
        hint=f"apt install {package}" if package else "run scripts/setup",
    )


def _not_started(program: str, error: OSError) -> HostError:
    """There is no process or no descriptor left."""
    return HostError(f"cannot start {program}: {error.strerror or error}")


def _failed(program: str, code: int | None, said: list[str], hint: str = "") -> HostError:
    return HostError(f"{program} failed: {said[0] if said else f'exit code {code}'}", hint=hint)


def _endless(program: str, timeout: float) -> HostError:
    return HostError(f"{program} did not end within {timeout:g} s")


def _lines(output: bytes) -> list[str]:
    return output.decode(errors="replace").strip().splitlines()
