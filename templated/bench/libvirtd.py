"""A libvirtd of the bench's own, which no other one on the host gets to know of.

It runs in mount and network namespaces: its configuration, state, sockets and logs are in a
temporary directory, and any firewall or bridge that it makes stays in there.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from templated.bench.interrupts import deferred, uninterrupted
from templated.errors import HostError, HypervisorError, Timeout

# Its first look at a QEMU tries KVM too, which can hang for a minute where no guest runs.
_STARTS_WITHIN = 180.0
_ENDS_WITHIN = 10.0
_PAUSE = 0.05
# Each is mounted over the place that libvirtd would use. /run is a fresh one: without
# the system's D-Bus nothing is registered there either.
_PLACES = {
    "etc": "/etc/libvirt",
    "lib": "/var/lib/libvirt",
    "cache": "/var/cache/libvirt",
    "log": "/var/log/libvirt",
}
_SCRIPT = """
set -e
base=$1
shift
mount -t tmpfs tmpfs /run
mkdir /run/libvirt
mount --bind "$base/run" /run/libvirt
for place; do
    mount --bind "$base/${place%%:*}" "${place#*:}"
done
# A KVM that root may open and QEMU's user not makes libvirt look at QEMU again before each VM.
if [ -e /dev/kvm ]; then
    mknod "$base/kvm" c 10 232
    chmod 666 "$base/kvm"
    mount --bind "$base/kvm" /dev/kvm
fi
exec libvirtd --config "$base/libvirtd.conf" --pid-file "$base/pid"
"""
_QEMU_CONF = """
user = "{user}"
group = "{user}"
dynamic_ownership = {changes_owners}
remember_owner = 0
security_driver = "none"
namespaces = []
cgroup_controllers = []
stdio_handler = "file"
"""


@dataclass(frozen=True)
class Libvirtd:
    """One that answers on a socket in `base`."""

    base: Path

    @property
    def uri(self) -> str:
        """How to connect to it."""
        return f"qemu+unix:///system?socket={self.base}/run/libvirt-sock"

    def virsh(self, *arguments: str, timeout: float = _STARTS_WITHIN) -> str:
        """Run virsh and return its output; HypervisorError with its last line, or Timeout."""
        try:
            done = subprocess.run(
                ["virsh", "--quiet", "--connect", self.uri, *arguments],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=timeout,
                check=False,
                start_new_session=True,
            )
        except subprocess.TimeoutExpired:
            raise Timeout(f"virsh {arguments[0]} did not end within {timeout:g} s") from None
        if done.returncode != 0:
            said = done.stderr.decode(errors="replace").strip().splitlines() or ["no message"]
            raise HypervisorError(f"virsh {arguments[0]}: {said[-1]}")
        return done.stdout.decode(errors="replace")


@contextlib.contextmanager
def private_libvirtd(user: str = "root") -> Iterator[Libvirtd]:
    """A libvirtd, ended with all its VMs at the end. HostError with the reason where none runs.

    It runs QEMU as `user`, which has a group of the same name.
    """
    check_host()
    base = Path(tempfile.mkdtemp(prefix="tpl.", dir="/tmp"))
    try:
        _furnish(base, user)
        with contextlib.ExitStack() as stack:
            with deferred():
                child = _spawn(base)
                stack.callback(_end, child, base)
            daemon = Libvirtd(base)
            _answering(daemon, child)
            yield daemon
    finally:
        shutil.rmtree(base, ignore_errors=True)


def check_host() -> None:
    """HostError unless a private libvirtd can be started here."""
    missing = [p for p in ("libvirtd", "virsh", "unshare") if shutil.which(p, path=_path()) is None]
    missing += [place for place in _PLACES.values() if not Path(place).is_dir()]
    if missing:
        raise HostError(
            f"no libvirt: {', '.join(missing)} is not there",
            hint="apt install libvirt-daemon-system libvirt-clients",
        )
    if os.geteuid() != 0:
        raise HostError("a private libvirtd needs root", hint="run the bench as root")


def _furnish(base: Path, user: str) -> None:
    # Its package has the last one, and networks need it.
    for name in (*_PLACES, "run", "lib/dnsmasq"):
        (base / name).mkdir()
    (base / "etc/qemu.conf").write_text(
        _QEMU_CONF.format(user=user, changes_owners=int(user != "root"))
    )
    (base / "libvirtd.conf").write_text(
        f'unix_sock_dir = "{base}/run"\nauth_unix_rw = "none"\nlog_outputs = "3:stderr"\n'
    )


def _spawn(base: Path) -> subprocess.Popen[bytes]:
    unshare = ["unshare", "--mount", "--net", "--propagation", "private"]
    arguments = [str(base), *(f"{name}:{place}" for name, place in _PLACES.items())]
    with open(base / "log/libvirtd", "wb") as log:
        return subprocess.Popen(
            [*unshare, "sh", "-c", _SCRIPT, "sh", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={**os.environ, "PATH": _path()},
            start_new_session=True,
        )


def _answering(daemon: Libvirtd, child: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + _STARTS_WITHIN
    while True:
        try:
            daemon.virsh("list")
            return
        except HypervisorError as error:
            if child.poll() is not None:
                raise HostError(f"libvirtd ended at once: {_last_line(daemon.base)}") from error
            if time.monotonic() > deadline:
                raise Timeout(f"libvirtd did not answer in {_STARTS_WITHIN:g} s") from error
        time.sleep(_PAUSE)


def _end(child: subprocess.Popen[bytes], base: Path) -> None:
    """End libvirtd, and then all that it has started: VMs and QEMUs that it asks what they can do,
    all of which would outlive it, and what serves its networks."""
    with uninterrupted():
        child.terminate()
        try:
            child.wait(_ENDS_WITHIN)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
        deadline = time.monotonic() + _ENDS_WITHIN
        # Again, for what one of them started before its own end.
        while (left := _inside(base)) and time.monotonic() < deadline:
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(_PAUSE)


def _inside(base: Path) -> list[int]:
    """The processes that have our places mounted, as nobody outside has."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            mounted = (process / "mountinfo").read_text()
            if f"{base}/run " in mounted or f"/{base.name}/run " in mounted:
                found.append(int(process.name))
    return found


def _last_line(base: Path) -> str:
    lines = (base / "log/libvirtd").read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else "it said nothing"


def _path() -> str:
    """libvirtd is in sbin, which not everybody has in PATH."""
    return os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
