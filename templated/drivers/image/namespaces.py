"""The programs of an image build: what they need, how they are started, and how they end.

What must see the owners of files runs in namespaces made by unshare(1): as root with its own
mount and process namespaces, otherwise with a user namespace too, in which the user is root
(`--map-root-user --map-auto`, newuidmap(1)). So one way serves both, and a killed build leaves
neither processes nor mounts.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
from pathlib import Path

from templated.errors import HostError

_TOOLS = {
    "mmdebstrap": "mmdebstrap",
    "unshare": "util-linux",
    "mkfs.ext4": "e2fsprogs",
    "qemu-img": "qemu-utils",
    "dpkg-deb": "dpkg",
}
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def check_tools() -> None:
    """HostError that names the package when a program of the build is missing."""
    for tool, package in _TOOLS.items():
        if shutil.which(tool, path=_PATH) is None:
            raise HostError(
                f"{tool} is not installed",
                hint=f"apt install {package}, or run scripts/setup",
            )
    if os.geteuid() != 0 and shutil.which("newuidmap", path=_PATH) is None:
        raise HostError(
            "newuidmap is not installed, which a build without root needs",
            hint="apt install uidmap, and give the user a range in /etc/subuid and /etc/subgid",
        )


def namespace_prefix() -> list[str]:
    """The unshare command that runs a program as root of namespaces of its own."""
    user = [] if os.geteuid() == 0 else ["--map-root-user", "--map-auto"]
    return ["unshare", *user, "--mount", "--pid", "--fork", "--kill-child", "--"]


async def start(
    command: list[str], *, namespace: bool, folder: Path, keep: tuple[int, ...] = ()
) -> asyncio.subprocess.Process:
    """Start a program in its own process group, stdout and stderr in one pipe."""
    environment = {
        **os.environ,
        "PATH": _PATH,
        "LC_ALL": "C.UTF-8",
        "TMPDIR": str(folder),
    }
    return await asyncio.create_subprocess_exec(
        # The daemon's own umask is strict, and what is made here is for the guest.
        *("sh", "-c", 'umask 022; exec "$@"', "sh"),
        *(namespace_prefix() if namespace else []),
        *command,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env=environment,
        cwd="/",
        pass_fds=keep,
        start_new_session=True,
        limit=1 << 20,
    )


async def kill_group(process: asyncio.subprocess.Process) -> None:
    """Kill what is left of a process group, and reap its leader."""
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()


async def remove_tree(path: Path) -> None:
    """Delete a directory of a build; HostError when something is mounted in it.

    Runs in the namespaces of a build, as some files may belong to its mapped users.
    """
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        if Path(line.split(" ")[4]).is_relative_to(path.resolve()):
            raise HostError(f"{path} has a mount in it", hint=f"umount {line.split(' ')[4]}")
    command = ["rm", "-rf", "--one-file-system", "--", str(path)]
    for _ in range(5):  # a process that was just killed may still be writing
        process = await start(command, namespace=os.geteuid() != 0, folder=path.parent)
        try:
            await process.wait()
        finally:
            await kill_group(process)
        if not path.exists():
            return
        await asyncio.sleep(0.2)
