"""Images: built for real, booted under TCG, their agent spoken to; and builds that must fail."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import socket
import subprocess
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from templated.drivers.guest import Confirmation, IdentityOrder
from templated.drivers.hypervisor.qemu.command import MACHINES
from templated.drivers.image.store import Image, ImageStore
from templated.errors import BuildError
from templated.model.spec import ImageSpec
from tests.real.harness import processes

pytestmark = pytest.mark.real
SPEC = ImageSpec()


def quiet(line: str) -> None:
    """A progress callback that shows nothing."""


@contextmanager
def machine(image: Image, folder: Path, kind: str, append: str = "") -> Iterator[Path]:
    """A booting VM; yields the file that its serial console is written to."""
    overlay, serial, bus = folder / "disk", folder / "serial", "device"
    if kind == "q35":
        bus = "pci"
    backing = ["-b", str(image.disk), "-F", "qcow2", str(overlay)]
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", *backing], check=True)
    # The guest cannot measure its TSC on a busy host, and a microvm then hangs early.
    megahertz = Path("/proc/cpuinfo").read_text().split("cpu MHz\t\t: ")[1].split("\n")[0]
    line = f"console=ttyS0 quiet reboot=t panic=-1 tsc_early_khz={int(float(megahertz) * 1000)}"
    command = ["qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none"]
    command += ["-M", MACHINES[kind], "-accel", "tcg", "-cpu", "qemu64,+arat", "-m", "128"]
    command += ["-kernel", str(image.kernel), "-initrd", str(image.initrd), "-no-reboot"]
    command += ["-append", f"{line} {append}", "-serial", f"file:{serial}"]
    command += ["-drive", f"file={overlay},if=none,id=d,format=qcow2"]
    command += ["-device", f"virtio-blk-{bus},drive=d", "-device", f"virtio-serial-{bus}"]
    command += ["-chardev", f"socket,id=a,path={folder}/agent,server=on,wait=off"]
    command += ["-device", "virtserialport,name=templated.agent.0,chardev=a"]
    command += ["-netdev", "user,id=n,restrict=on", "-device", f"virtio-net-{bus},netdev=n"]
    command += ["-device", f"virtio-rng-{bus}"]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    try:
        yield serial
    finally:
        process.kill()
        process.wait()


def wait_for(serial: Path, text: str, timeout: float = 120) -> None:
    end = time.monotonic() + timeout
    while not serial.exists() or text not in serial.read_text(errors="replace"):
        assert time.monotonic() < end, serial.read_text(errors="replace")
        time.sleep(0.05)


class Host:
    """A connection to the agent of a VM."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(str(path))  # blocks while QEMU has an earlier one to accept
        self._socket.settimeout(60)
        self._lines = self._socket.makefile("rb")
        self._socket.sendall(b"\n")

    def request(self, command: str, **arguments: Any) -> tuple[Any, bytes]:
        """The result of a request, and the stdout that was streamed before it."""
        number, output = str(uuid.uuid4()), b""
        body = {"id": number, "cmd": command, **arguments}
        self._socket.sendall(json.dumps(body).encode() + b"\n")
        while True:
            message = json.loads(self._lines.readline())
            if message["id"] != number:
                continue  # the answer to what an earlier connection left half-written
            if "stream" not in message:
                assert message["ok"], message
                return message["result"], output
            output += base64.b64decode(message["data"])

    def leave(self, rest: bytes = b"") -> None:
        self._socket.sendall(rest)
        self._lines.close()
        self._socket.close()


@pytest.mark.parametrize("kind", ["microvm", "q35"])
def test_guest_boots_and_takes_an_identity(shared_image: Image, tmp_path: Path, kind: str) -> None:
    with machine(shared_image, tmp_path, kind) as serial:
        wait_for(serial, "templated: agent ready")
        for _ in range(3):
            Host(tmp_path / "agent").leave(b'{"id": 1, "cmd": "pi')
        host = Host(tmp_path / "agent")
        assert not host.request("ping")[0]["identified"]
        command = "wc -c </etc/machine-id; mount; python3 -V; ls /etc/ssh /var/lib/dbus"
        output = host.request("exec", argv=["sh", "-c", command])[1]
        assert b" / type ext4 (rw,noatime)" in output and b"Python 3" in output
        assert output.startswith(b"0\n")  # no machine-id is baked in
        begin = time.time()
        host.request("quiesce")
        wanted = IdentityOrder(
            hostname="clone-1",
            machine_id="0123456789abcdef" * 2,
            boot_id=str(uuid.uuid4()),
            uuid=str(uuid.uuid4()),
            mac="52:54:00:12:34:99",
            ip="10.9.8.7",
            prefix=24,
            gateway="10.9.8.1",
            dns=["10.9.8.2"],
            time=time.time() + 1000,
            entropy=os.urandom(64),
        )
        result, _ = host.request("identify", **wanted.fields())
        seen = Confirmation.of(msgspec.Raw(json.dumps(result).encode()))
        for name in ("hostname", "machine_id", "boot_id", "uuid", "mac", "ip", "prefix"):
            assert getattr(seen, name) == getattr(wanted, name)
        passed = time.time() - begin
        assert begin <= seen.time - 1000 <= begin + 2 * passed
        files = "/proc/sys/kernel/random/boot_id /etc/machine-id /etc/hostname /etc/resolv.conf"
        shown = host.request("exec", argv=["sh", "-c", f"cat {files}; ip route"])[1].decode()
        host.leave()
        for text in (wanted.boot_id, wanted.machine_id, "clone-1", "via 10.9.8.1", "10.9.8.2"):
            assert text in shown


def test_proof_boot_ends_by_itself(shared_image: Image, tmp_path: Path) -> None:
    with machine(shared_image, tmp_path, "microvm", "templated.proof") as serial:
        wait_for(serial, "templated: guest runs")


def fail(spec: ImageSpec, root: Path, timeout: float = 300) -> BuildError:
    """The error of a build that must fail and must leave a log at most."""
    with pytest.raises(BuildError) as caught:
        asyncio.run(ImageStore(root).ensure(spec, on_progress=quiet, timeout=timeout))
    left = {path.name.split("-")[0] for path in (root / "images").iterdir()}
    assert left <= {".lock", "build"}
    assert "\n" not in caught.value.message
    return caught.value


@pytest.mark.long
def test_unknown_package(tmp_path: Path) -> None:
    error = fail(ImageSpec(packages=("no-such-package-at-all",)), tmp_path)
    assert "no-such-package-at-all" in error.message
    assert "image.packages" in error.hint and "build-" in error.hint


def test_unreachable_mirror(tmp_path: Path) -> None:
    error = fail(ImageSpec(mirror="http://127.0.0.1:9/"), tmp_path)
    assert "127.0.0.1" in error.message
    assert "image.mirror" in error.hint


def test_timeout_leaves_nothing(tmp_path: Path) -> None:
    error = fail(SPEC, tmp_path, timeout=4)
    assert "within 4 s" in error.message
    assert not [line for _, line in processes() if str(tmp_path) in line]
