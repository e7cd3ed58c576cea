"""A private libvirtd whose daemon a test stops, holds and starts again; its VMs go on."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from templated.bench.libvirtd import Libvirtd, private_libvirtd
from templated.errors import HypervisorError

USER = "libvirt-qemu"
"""As whom Debian's libvirt runs QEMU."""
_BOUND = 60.0


@dataclass
class Restartable:
    """A libvirtd in namespaces that outlive it."""

    libvirtd: Libvirtd
    pid: int
    namespaces: tuple[int, int]
    """Of its mounts and its network."""
    started: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def uri(self) -> str:
        """How to connect to it."""
        return self.libvirtd.uri

    def virsh(self, *arguments: str) -> str:
        """The output of virsh, which must succeed."""
        return self.libvirtd.virsh(*arguments)

    def domains(self) -> list[str]:
        """The names of all domains that run."""
        return self.virsh("list", "--name").split()

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Meanwhile it answers nothing."""
        os.kill(self.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(self.pid, signal.SIGCONT)

    def stop(self) -> None:
        """End the daemon alone."""
        os.kill(self.pid, signal.SIGTERM)
        deadline = time.monotonic() + _BOUND
        while _runs(self.pid) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not _runs(self.pid)

    def start(self) -> None:
        """Start it again where it was, and wait until it answers."""
        base = self.libvirtd.base
        mounts, network = (f"/proc/self/fd/{fd}" for fd in self.namespaces)
        with open(base / "log/libvirtd", "ab") as log:
            child = subprocess.Popen(
                [
                    *("nsenter", f"--mount={mounts}", f"--net={network}"),
                    *("libvirtd", "--config", f"{base}/libvirtd.conf", "--pid-file", f"{base}/pid"),
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=self.namespaces,
                env={**os.environ, "PATH": os.environ["PATH"] + ":/usr/sbin:/sbin"},
                start_new_session=True,
            )
        self.started.append(child)
        self.pid = child.pid
        deadline = time.monotonic() + _BOUND
        while True:
            try:
                self.virsh("list")
                return
            except HypervisorError:
                assert child.poll() is None and time.monotonic() < deadline
                time.sleep(0.1)

    def restart(self) -> None:
        """As an upgrade of libvirt does."""
        self.stop()
        self.start()


@contextlib.contextmanager
def restartable_libvirtd() -> Iterator[Restartable]:
    """One for tests; nothing of it is left at the end."""
    with private_libvirtd(USER) as daemon, contextlib.ExitStack() as stack:
        # Its first look at every QEMU takes long, and no start of a VM should wait for that.
        daemon.virsh("capabilities")
        pid = int((daemon.base / "pid").read_text())
        fds = []
        for kind in ("mnt", "net"):
            fds.append(os.open(f"/proc/{pid}/ns/{kind}", os.O_RDONLY | os.O_CLOEXEC))
            stack.callback(os.close, fds[-1])
        made = Restartable(daemon, pid, (fds[0], fds[1]))
        try:
            yield made
        finally:
            for child in made.started:
                child.terminate()
                child.wait(_BOUND)


def _runs(pid: int) -> bool:
    """Whether a process has not ended; one that nobody has waited for has."""
    try:
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
