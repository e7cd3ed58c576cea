"""The lab as a machine: QEMU emulates one that has KVM, and SSH on the loopback runs commands.

The disk is never written: what the lab writes lies in a file without a name, which is gone when
QEMU ends. QEMU ends with the process that started it, however that one ends.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import socket
import subprocess
import tarfile
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.lab.image import CHECKOUT, ROOT, Image

_BOOT = 600.0
_COMMAND = 600.0
# What a checkout consists of, for whom runs it.
_PARTS = [
    "LICENSE",
    "README.md",
    "CHANGELOG.md",
    "setup.cfg",
    "pyproject.toml",
    "docs",
    "scripts",
    "systemd",
    "templated",
    "templates",
]


class LabError(Exception):
    """The lab does not come up, or ended; the console's last lines are in the message."""


class Lab:
    """One lab. `start` boots it; as a context it ends with the block."""

    def __init__(self, image: Image, share: Path | None = None) -> None:
        """`share`: a directory that can be mounted in the lab, read-only; see `share_at`."""
        self._image = image
        self._share = share
        self.folder = Path(tempfile.mkdtemp(prefix="tplab.", dir="/tmp"))
        self.console = self.folder / "console.log"
        self._qemu: subprocess.Popen[bytes] | None = None
        self._master: subprocess.Popen[bytes] | None = None
        self._port = 0

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def start(self) -> None:
        """Boot, and wait until commands can be run. Raises LabError with the console's end."""
        try:
            self._qemu = subprocess.Popen(self._command(), stdin=subprocess.DEVNULL)
            self._port = self._forwarded_port()
            self.connect()
        except BaseException:
            self.close()
            raise

    def renew(self) -> None:
        """Boot once more, from the image as it is. Raises as `start` does."""
        self.close()
        self.folder.mkdir(mode=0o700)
        self.start()

    def close(self) -> None:
        """End the lab and remove what it left. Its disk is lost."""
        for process in (self._master, self._qemu):
            if process is not None:
                process.kill()
                process.wait()
        self._master = self._qemu = None
        shutil.rmtree(self.folder, ignore_errors=True)

    def run(
        self, script: str, *, timeout: float = _COMMAND, stdin: bytes = b""
    ) -> subprocess.CompletedProcess[str]:
        """Run a shell script as root and return how it ended."""
        command = [*self.ssh(), f"bash -c {shlex.quote(script)}"]
        done = subprocess.run(
            command, input=stdin, capture_output=True, timeout=timeout, check=False
        )
        return subprocess.CompletedProcess(
            script, done.returncode, done.stdout.decode(), done.stderr.decode(errors="replace")
        )

    def do(self, script: str, *, timeout: float = _COMMAND, stdin: bytes = b"") -> str:
        """Run a shell script that must succeed and return its stdout."""
        done = self.run(script, timeout=timeout, stdin=stdin)
        assert done.returncode == 0, f"{script}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def json(self, script: str, *, timeout: float = _COMMAND) -> Any:
        """Run a shell script that prints JSON."""
        return json.loads(self.do(script, timeout=timeout))

    def put(self, path: str, content: str | bytes) -> None:
        """Write a file."""
        data = content.encode() if isinstance(content, str) else content
        self.do(f"cat >{shlex.quote(path)}", stdin=data)

    def put_checkout(self) -> None:
        """Lay this checkout where the operator's guide has it, without what was built in it."""
        with tempfile.TemporaryFile() as file:
            with tarfile.open(fileobj=file, mode="w") as tar:
                for part in _PARTS:
                    tar.add(ROOT / part, part, filter=_as_checked_out)
            file.seek(0)
            self.do(f"mkdir -p {CHECKOUT} && tar -xC {CHECKOUT}", stdin=file.read())

    def share_at(self, path: str) -> None:
        """Mount the shared directory, until the next boot."""
        options = "trans=virtio,ro,version=9p2000.L,msize=262144"
        self.do(f"mkdir -p {path} && mount -t 9p -o {options} share {path}")

    def reboot(self) -> None:
        """Reboot, and wait until commands can be run again."""
        before = self.do("cat /proc/sys/kernel/random/boot_id")
        self.run("systemctl reboot")
        deadline = time.monotonic() + _BOOT
        while True:
            self.connect()
            done = self.run("cat /proc/sys/kernel/random/boot_id")
            if done.returncode == 0 and done.stdout != before:
                return
            self._check(deadline)
            time.sleep(0.5)

    def connect(self) -> None:
        """Log in once, for all commands that follow: each of its own would cost a handshake."""
        deadline = time.monotonic() + _BOOT
        if self._master is not None:
            self._master.kill()
            self._master.wait()
        (self.folder / "ssh").unlink(missing_ok=True)
        while not self._listens():
            self._check(deadline)
            time.sleep(0.2)
        self._master = subprocess.Popen([*_ending_with_us(), *self.ssh("-MN")])
        while self.run("true").returncode != 0:
            self._check(deadline)
            time.sleep(0.2)

    def ssh(self, *options: str) -> list[str]:
        """The command that logs in."""
        return [
            *("ssh", "-F", "none", "-q", "-S", str(self.folder / "ssh"), *options),
            *("-i", str(self._image.key), "-p", str(self._port)),
            *("-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null"),
            *("-o", "BatchMode=yes", "-o", "ConnectTimeout=60", "root@127.0.0.1"),
        ]

    def _check(self, deadline: float) -> None:
        ended = self._qemu is None or self._qemu.poll() is not None
        if ended or time.monotonic() > deadline:
            end = self.console.read_text(errors="replace")[-3000:] if self.console.exists() else ""
            raise LabError(f"the lab {'ended' if ended else 'does not answer'}: {end}")

    def _listens(self) -> bool:
        """QEMU accepts connections before the lab does; SSH speaks first."""
        address = "127.0.0.1", self._port
        try:
            with socket.create_connection(address, timeout=5) as connection:
                return connection.recv(4) == b"SSH-"
        except OSError:
            return False

    def _command(self) -> list[str]:
        image = self._image
        return [
            *_ending_with_us(),
            # All its threads on one CPU of the host. When VMRUN finds an interrupt that waits for
            # the guest, QEMU 7.2 sets a bit in a word in which its main loop sets others, with a
            # plain instruction and no lock: on two CPUs one of the bits can get lost. When it was
            # the timer's, the lab stood still until something else interrupted it.
            *("taskset", "--cpu-list", str(max(os.sched_getaffinity(0)))),
            # Before the tests beside it: it is slow enough, and systemd ends a slow daemon.
            *("nice", "-n", "-10"),
            *("qemu-system-x86_64", "-name", "templated-lab", "-no-user-config", "-nodefaults"),
            # AMD's virtualisation, with nested paging, is what TCG emulates. It has no five-level
            # paging there. One CPU: QEMU 7.2 may go on with code that another CPU has changed
            # meanwhile, and the lab's kernel changes its own whenever a first VM starts.
            *("-M", "q35", "-accel", "tcg,thread=single", "-cpu", "max,la57=off"),
            *("-smp", "1", "-m", "6G", "-display", "none"),
            *("-kernel", str(image.kernel), "-initrd", str(image.initrd)),
            *("-append", "root=/dev/vda rw console=ttyS0 mitigations=off rootflags=noinit_itable"),
            "-drive",
            f"file={image.disk},format=raw,if=none,id=disk,snapshot=on,cache=unsafe",
            *("-device", "virtio-blk-pci,drive=disk"),
            # Restricted: nothing leads out, only our way in.
            *("-netdev", "user,id=net,restrict=on,hostfwd=tcp:127.0.0.1:0-:22"),
            *("-device", "virtio-net-pci,netdev=net,romfile="),
            *("-device", "virtio-rng-pci"),
            *self._virtfs(),
            *("-serial", f"file:{self.console}"),
            *("-qmp", f"unix:{self.folder}/qmp,server=on,wait=off"),
        ]

    def _virtfs(self) -> list[str]:
        if self._share is None:
            return []
        options = "mount_tag=share,security_model=none,readonly=on"
        return ["-virtfs", f"local,path={self._share},{options}"]

    def _forwarded_port(self) -> int:
        """The port that the kernel chose for the way in."""
        deadline = time.monotonic() + 60
        while not (self.folder / "qmp").exists():
            self._check(deadline)
            time.sleep(0.05)
        with socket.socket(socket.AF_UNIX) as qmp:
            qmp.settimeout(60)
            qmp.connect(str(self.folder / "qmp"))
            with qmp.makefile("rw") as stream:
                stream.readline()
                _execute(stream, "qmp_capabilities", {})
                line = {"command-line": "info usernet"}
                text: str = _execute(stream, "human-monitor-command", line)
        row = next(line.split() for line in text.splitlines() if "HOST_FORWARD" in line)
        return int(row[3])


def _execute(stream: Any, command: str, arguments: dict[str, str]) -> Any:
    stream.write(json.dumps({"execute": command, "arguments": arguments}) + "\n")
    stream.flush()
    while True:
        answer = json.loads(stream.readline())
        if "return" in answer or "error" in answer:
            return answer["return"]


def _ending_with_us() -> list[str]:
    """What makes the kernel end a process with the one that started it."""
    return ["setpriv", "--pdeathsig=KILL"]


def _as_checked_out(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
    if Path(entry.name).name == "__pycache__" or entry.name.endswith(".egg-info"):
        return None
    entry.uid = entry.gid = 0
    entry.uname = entry.gname = "root"
    return entry
