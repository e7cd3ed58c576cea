"""The contract of hypervisors, kept by libvirt; and VMs that a real libvirtd shows."""

from __future__ import annotations

import errno
import json
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from templated.drivers import disk
from templated.drivers.hypervisor.base import Hypervisor, Kernel, Launch, Machine, SavedState
from templated.drivers.hypervisor.chosen import QemuOrLibvirt
from templated.drivers.hypervisor.libvirt import machine as libvirt_machine
from templated.drivers.hypervisor.libvirt.driver import LentPlaces, Libvirt
from templated.drivers.hypervisor.process import Process
from templated.drivers.image.store import Image
from templated.model.spec import TemplateSpec
from templated.services.machines.boot import full_boot
from tests.hypervisor_contract import Frozen, HypervisorContract, Rig
from tests.real.conftest import prepare
from tests.real.harness import Daemon
from tests.real.libvirtd import USER, Restartable, restartable_libvirtd

pytestmark = pytest.mark.real
QEMU = "qemu-system-x86_64"
_STOCK = """
name: stock
hypervisor: libvirt
image: {boot: disk, suite: trixie, size: 2GiB}
machine: {type: q35, memory: 512MiB, firmware: uefi}
identity: {agent: qemu-ga, timeout: 120s}
boot_timeout: 900s
probes: [{type: agent, name: agent, timeout: 200s}]
"""
_NETWORK = """
<network>
  <name>lent</name>
  <bridge name='virbr-lent' stp='off' delay='0'/>
  <dns enable='no'/>
  <ip address='192.168.222.1' netmask='255.255.255.0'/>
</network>
"""


@pytest.fixture(scope="module")
def libvirtd() -> Iterator[Restartable]:
    """One for all tests; it takes seconds to start."""
    with restartable_libvirtd() as daemon:
        yield daemon


class LibvirtRig(Rig):
    """libvirt, which runs QEMU as a user of its own, with an image for what it boots."""

    def __init__(self, image: Image, directory: Path, libvirtd: Restartable) -> None:
        self._lent = LentPlaces(directory / "lent", directory / "lent-memory")
        super().__init__(self._hypervisor(libvirtd.uri, directory), directory)
        self._image = image
        self._libvirtd = libvirtd

    def _hypervisor(self, uri: str, directory: Path) -> Hypervisor:
        return QemuOrLibvirt(QEMU, directory / "proof.json", Libvirt(uri, self._lent))

    async def overlay(self, target: Path, backing: Path | None) -> None:
        await disk.create_overlay(target, backing or self._image.disk)

    def kernel(self) -> Kernel:
        boot = full_boot(self.hypervisor, self._image, TemplateSpec(name="t"), "tcg")
        assert isinstance(boot, Kernel)
        return boot

    def missing(self) -> Hypervisor:
        uri = f"qemu+unix:///system?socket={self.directory}/nobody"
        return self._hypervisor(uri, self.directory)

    def spoiled(self, machine: Machine, state: SavedState) -> SavedState:
        path = self.directory / "spoiled"
        path.write_bytes(b"\0" * 4096)
        return replace(state, path=path)

    def silent(self, machine: Machine) -> AbstractContextManager[None]:
        return self._libvirtd.held()

    @contextmanager
    def immortal(self, machine: Machine) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Process, "kill", lambda process: None)
            yield

    @contextmanager
    def hurry(self) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(libvirt_machine, "_REPLY_TIMEOUT", 0.2)
            yield

    @asynccontextmanager
    async def launch(self, base: Frozen | None) -> AsyncIterator[Launch]:
        async with super().launch(base) as launch:
            backing = (base.disk, self._image.disk) if base else (self._image.disk,)
            hardware = replace(launch.hardware, hypervisor="libvirt")
            yield replace(launch, hardware=hardware, backing=backing, template="t")


@pytest.fixture(scope="module")
def rig(shared_image: Image, libvirtd: Restartable) -> Iterator[Rig]:
    """One for all tests, so that only the first boots a VM. It leaves no process behind."""
    directory = Path(tempfile.mkdtemp(prefix="tph.", dir="/tmp"))
    try:
        rig = LibvirtRig(shared_image, directory, libvirtd)
        rig.hypervisor.prepare()
        yield rig
    finally:
        shutil.rmtree(directory, ignore_errors=True)


class TestLibvirt(HypervisorContract):
    """See `HypervisorContract`."""


def test_the_contract_leaves_nothing(rig: Rig, libvirtd: Restartable) -> None:
    """No domain, and nothing that is lent."""
    _eventually(lambda: not libvirtd.domains())
    for name in ("lent", "lent-memory"):
        assert list((rig.directory / name).iterdir()) == []


@pytest.fixture(scope="module")
def daemon(image_store: Path, libvirtd: Restartable) -> Iterator[Daemon]:
    """A daemon with a template of libvirt's, for functions, too; and python-fn beside it."""
    made = prepare(Daemon(libvirt={"uri": libvirtd.uri}), image_store)
    # libvirt's user gets no further than here; a daemon's own places are below /var/lib.
    made.places.chmod(0o711)
    try:
        made.variant("shown", "hypervisor: libvirt", "code: true")
        made.start()
        made.build("shown")
        yield made
    finally:
        made.close()


@pytest.fixture
def host(daemon: Daemon, libvirtd: Restartable) -> Iterator[Daemon]:
    """The shared daemon; whatever a test leaves is removed, and nothing must be left then."""
    yield daemon
    daemon.cli("pool", "set", "shown", "--warm", "0", "--standby", "0", "--wait")
    daemon.cli("rm", "--all", "--yes")
    _eventually(lambda: not daemon.qemus() and not libvirtd.domains())
    _eventually(lambda: not list((daemon.state / "libvirt").iterdir()))
    assert not list((daemon.shm / ".libvirt").iterdir())


def test_what_virsh_shows(host: Daemon, libvirtd: Restartable) -> None:
    """A clone is a transient domain with its name as title, and template and generation beside."""
    generation = str(host.json("template", "show", "shown")["active"])
    host.cli("clone", "fn-1", "--template", "shown")
    domain = _only(libvirtd)
    _eventually(lambda: "fn-1" in libvirtd.virsh("list", "--title"))
    told = libvirtd.virsh("metadata", domain, "https://templated.dev/libvirt/1")
    for value in ('name="fn-1"', 'template="shown"', f'generation="{generation}"'):
        assert value in told.replace("'", '"')
    info = libvirtd.virsh("dominfo", domain)
    assert "Persistent:     no" in info and "running" in info
    figures = libvirtd.virsh("domstats", domain)
    assert "cpu.time=" in figures and "block.0.name=vda" in figures
    assert libvirtd.virsh("ttyconsole", domain).startswith("/dev/pts/")
    identity = host.json("show", "fn-1")
    assert libvirtd.virsh("domuuid", domain).strip() == identity["uuid"]
    assert host.guest("fn-1", "import socket; print(socket.gethostname())").strip() == "fn-1"
    user = Path(f"/proc/{identity['pid']}/status").read_text().split("\nUid:\t")[1].split()[0]
    assert int(user) == pwd.getpwnam(USER).pw_uid


@pytest.mark.parametrize("path", ["direct", "standby", "warm", "cold"])
def test_paths(host: Daemon, path: str) -> None:
    """Each way to start leads to a clone with an identity of its own."""
    if path in ("standby", "warm"):
        host.cli("pool", "set", "shown", f"--{path}", "2", "--wait")
    names = [f"{path}-{number}" for number in range(2)]
    seen = set()
    for name in names:
        shown = host.json("clone", name, "--template", "shown", "--path", path)
        assert shown["path"] == path
        code = "print(open('/etc/machine-id').read().strip())"
        seen.add(host.guest(name, code).strip())
    assert len(seen) == len(names)


def test_a_domain_that_is_destroyed_behind_our_back(host: Daemon, libvirtd: Restartable) -> None:
    host.cli("clone", "fn-1", "--template", "shown")
    libvirtd.virsh("destroy", _only(libvirtd))
    _eventually(lambda: host.json("show", "fn-1")["state"] == "dead")
    host.cli("rm", "fn-1")


def test_libvirtd_is_restarted(host: Daemon, libvirtd: Restartable) -> None:
    """Clones and members of pools go on; a start without libvirtd says so, and those after work."""
    host.cli("pool", "set", "shown", "--warm", "1", "--standby", "1", "--wait")
    host.cli("clone", "before", "--template", "shown", "--path", "direct")
    pid = host.json("show", "before")["pid"]
    libvirtd.stop()
    try:
        said = host.fails("clone", "during", "--template", "shown", "--path", "direct")
        assert "libvirt" in said
        assert host.guest("before", "print(1)").strip() == "1"
    finally:
        libvirtd.start()
    for path in ("warm", "standby", "direct"):
        host.cli("clone", path, "--template", "shown", "--path", path)
    assert host.json("show", "before")["pid"] == pid


@pytest.mark.parametrize("away", [False, True], ids=["libvirtd is up", "no libvirtd at start"])
def test_the_daemon_is_restarted(host: Daemon, libvirtd: Restartable, *, away: bool) -> None:
    """A killed daemon's clones are adopted, also while nobody speaks for libvirt."""
    host.cli("clone", "fn-1", "--template", "shown")
    before = host.json("show", "fn-1")
    host.stop(signal.SIGKILL)
    if away:
        libvirtd.stop()
    try:
        host.start()
        assert host.json("show", "fn-1")["pid"] == before["pid"]
        if away:
            assert "fn-1 runs but does not answer" in host.log
    finally:
        if away:
            libvirtd.start()
    _eventually(lambda: host.run("exec", "fn-1", "--", "true").returncode == 0)
    host.cli("rm", "fn-1")


def test_q35(host: Daemon, libvirtd: Restartable) -> None:
    """The disk comes first on its PCI bus, before that of a function's code; it has figures."""
    host.variant("pc", "hypervisor: libvirt", "machine: {type: q35}", "code: true",
                 without_probes=True)  # fmt: skip
    host.build("pc")
    host.cli("clone", "pc-1", "--template", "pc")
    assert "block.0.rd.bytes=" in libvirtd.virsh("domstats", _only(libvirtd))
    serial = "print(open('/sys/block/vdb/serial').read())"
    assert host.guest("pc-1", serial).strip() == "templated-code"
    host.cli("rm", "pc-1")
    host.cli("template", "rm", "pc")


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_a_stock_debian(host: Daemon) -> None:
    """UEFI, its own boot loader and qemu-ga: nothing of ours is in the guest."""
    host.template("stock", _STOCK)
    host.cli("-q", "template", "build", "stock", timeout=1500)
    host.cli("clone", "stock-1", "--template", "stock")
    assert host.output("stock-1", "hostname").strip() == "stock-1"
    host.cli("rm", "stock-1")
    host.cli("template", "rm", "stock")


def test_a_tap_of_ours(fresh: Daemon, libvirtd: Restartable) -> None:
    """In bridge mode a domain gets the slot's tap by its descriptor."""
    name = f"templated-test-{os.getpid()}"
    subprocess.run(["ip", "netns", "add", name], check=True, timeout=30)
    try:
        fresh.config["network"] = {"mode": "bridge", "subnet": "10.99.0.0/24", "netns": name}
        fresh.config["libvirt"] = {"uri": libvirtd.uri}
        fresh.places.chmod(0o711)
        fresh.variant("bridged", "hypervisor: libvirt", without_probes=True)
        fresh.start()
        fresh.build("bridged")
        address = fresh.json("clone", "b-1", "--template", "bridged")["identity"]["ip"]
        # Nothing listens there: the guest answers with a reset.
        probe = f"import socket; print(socket.socket().connect_ex(('{address}', 9)))"
        command = ["ip", "netns", "exec", name, "python3", "-c", probe]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        assert int(done.stdout) == errno.ECONNREFUSED
        fresh.cli("rm", "b-1")
    finally:
        fresh.close()
        subprocess.run(["ip", "netns", "del", name], check=True, timeout=30)


def test_a_network_of_libvirt(host: Daemon, libvirtd: Restartable, tmp_path: Path) -> None:
    """A clone is on it, with an address of it, and reaches the host."""
    network = tmp_path / "network.xml"
    network.write_text(_NETWORK)
    libvirtd.virsh("net-create", str(network))
    try:
        host.variant("on-net", "hypervisor: libvirt", "network: {mode: libvirt, name: lent}")
        host.build("on-net")
        shown = host.json("clone", "net-1", "--template", "on-net")
        assert shown["identity"]["ip"].startswith("192.168.222.")
        domain = _only(libvirtd)
        assert "lent" in libvirtd.virsh("domiflist", domain)
        # Nothing listens there: the host's end answers with a reset.
        code = (
            "import errno, socket\n"
            "s = socket.socket(); s.settimeout(20)\n"
            "print(s.connect_ex(('192.168.222.1', 9)) == errno.ECONNREFUSED)"
        )
        assert host.guest("net-1", code).strip() == "True"
        host.cli("rm", "net-1")
    finally:
        libvirtd.virsh("net-destroy", "lent")
    assert "no network lent" in host.fails("template", "build", "on-net")
    host.cli("template", "rm", "on-net")


def test_a_function(host: Daemon, tmp_path: Path) -> None:
    """Its code comes to VMs of libvirt by every path."""
    (tmp_path / "app.py").write_text("def handler(event, context):\n    return event['n'] + 1\n")
    host.cli("function", "deploy", "f", "--code", str(tmp_path), "--handler", "app.handler",
             "--template", "shown")  # fmt: skip
    try:
        for path in ("direct", "standby", "warm"):
            if path != "direct":
                host.cli("pool", "set", "shown", f"--{path}", "1", "--wait")
            host.cli("function", "deploy", "f", "--code", str(tmp_path), "--handler",
                     "app.handler", "--template", "shown", "--env", f"P={path}")  # fmt: skip
            answer = json.loads(host.cli("invoke", "f", "--payload", '{"n": 41}'))
            assert answer == 42
    finally:
        host.cli("function", "rm", "f")


def _only(libvirtd: Restartable) -> str:
    """The name of the domain that runs; libvirt forgets others a moment after their end."""
    _eventually(lambda: len(libvirtd.domains()) == 1)
    return libvirtd.domains()[0]


def _eventually(holds: Callable[[], bool], within: float = 60.0) -> None:
    """libvirt hears of some things a moment later."""
    deadline = time.monotonic() + within
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.1)
