"""The programs of an image build: what they need, how they are started, and how they end.

Programs that must see the owners of files run in namespaces made by unshare(1). Under root these
are a mount and a process namespace. Any other user gets a user namespace too, in which he is root
(`--map-root-user --map-auto`, newuidmap(1)). So both build in the same way, and a killed build
leaves neither processes nor mounts.
"""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path

from templated.drivers.host.programs import missing, started
from templated.errors import HostError

Progress = Callable[[str], None]
"""Called with a line for people whenever a build has come further."""
_TOOLS = ("mmdebstrap", "unshare", "mkfs.ext4", "qemu-img", "dpkg-deb")
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def check_programs(*names: str) -> None:
    """Raises HostError, with the package's name, when a program is missing."""
    for name in names:
        if shutil.which(name, path=_PATH) is None:
            raise missing(name)


def check_tools() -> None:
    """Raises HostError, with the package's name, when a program of the build is missing."""
    check_programs(*_TOOLS)
    if os.geteuid() != 0 and shutil.which("newuidmap", path=_PATH) is None:
        raise HostError(
            "newuidmap is not installed, which a build without root needs",
            hint="apt install uidmap, and give the user a range in /etc/subuid and /etc/subgid",
        )


def namespace_prefix() -> list[str]:
    """The unshare command that runs a program as root of namespaces of its own."""
    user = [] if os.geteuid() == 0 else ["--map-root-user", "--map-auto"]
    return ["unshare", *user, "--mount", "--pid", "--fork", "--kill-child", "--"]


def start(
    command: list[str], *, namespace: bool, folder: Path, keep: tuple[int, ...] = ()
) -> AbstractAsyncContextManager[asyncio.subprocess.Process]:
    """A program of the build, as `programs.started`; `namespace`: as root of its own namespaces.

    `folder` is for its temporary files; it inherits the descriptors `keep`.
    """
    environment = {**os.environ, "PATH": _PATH, "LC_ALL": "C.UTF-8", "TMPDIR": str(folder)}
    return started(
        # The daemon's own umask is strict, and these files are for the guest.
        *("sh", "-c", 'umask 022; exec "$@"', "sh"),
        *(namespace_prefix() if namespace else []),
        *command,
        env=environment,
        cwd="/",
        pass_fds=keep,
        limit=1 << 20,
    )


async def ended(command: list[str], folder: Path) -> tuple[int | None, str]:
    """Run a program of the build to its end: its exit code, and the last line that it printed."""
    async with start(command, namespace=False, folder=folder) as process:
        out, _ = await process.communicate()
    lines = out.decode(errors="replace").strip().splitlines()
    return process.returncode, lines[-1] if lines else ""


async def remove_tree(path: Path) -> None:
    """Delete a directory of a build. Raises HostError when something is mounted in it.

    Runs in the namespaces of a build, as some files may belong to its mapped users.
    """
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        if Path(line.split(" ")[4]).is_relative_to(path.resolve()):
            raise HostError(f"{path} has a mount in it", hint=f"umount {line.split(' ')[4]}")
    command = ["rm", "-rf", "--one-file-system", "--", str(path)]
    for _ in range(5):  # a process that was just killed may still be writing
        async with start(command, namespace=os.geteuid() != 0, folder=path.parent) as process:
            await process.wait()
        if not path.exists():
            return
        await asyncio.sleep(0.2)
