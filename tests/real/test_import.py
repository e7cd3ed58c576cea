"""`template import` and doctor, with a real libvirtd of the tests' own."""

from __future__ import annotations

import hashlib
import json
import os
import select
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from templated.bench.libvirtd import Libvirtd, private_libvirtd
from templated.cli import exit_codes
from templated.cli.main import main
from templated.drivers.libvirt.connection import connect
from templated.errors import HypervisorError, Timeout
from templated.services import libvirt_checks

Capture = pytest.CaptureFixture[str]
pytestmark = [pytest.mark.real, pytest.mark.skipif(os.geteuid() != 0, reason="libvirtd needs root")]

HOSTDEV = """
    <hostdev mode='subsystem' type='pci' managed='yes'>
      <source><address domain='0x0000' bus='0x01' slot='0x00' function='0x0'/></source>
    </hostdev>
"""
NETWORK = "<network><name>lan</name><bridge name='tplbr0'/></network>"


@dataclass
class Host:
    """A libvirtd with one network, and a place for disks and templates."""

    daemon: Libvirtd
    place: Path

    def virsh(self, *arguments: str) -> str:
        return self.daemon.virsh(*arguments)

    def disk(self, name: str) -> Path:
        path = self.place / f"{name}.qcow2"
        command = ["qemu-img", "create", "-q", "-f", "qcow2", str(path), "8M"]
        subprocess.run(command, check=True, timeout=60)
        return path

    def define(self, name: str, more: str = "", os_attributes: str = "") -> Path:
        """A domain as virt-install would give it to libvirt, which adds what it adds."""
        disk = self.disk(name.replace("/", "_"))
        xml = self.place / "domain.xml"
        xml.write_text(f"""
<domain type='qemu'>
  <name>{name}</name>
  <title>For the tests</title>
  <memory unit='MiB'>64</memory>
  <vcpu>2</vcpu>
  <os {os_attributes}><type arch='x86_64' machine='q35'>hvm</type></os>
  <features><acpi/><apic/></features>
  <devices>
    <disk type='file' device='disk'>
      <driver name='qemu' type='qcow2'/>
      <source file='{disk}'/>
      <target dev='vda' bus='virtio'/>
    </disk>
    <interface type='network'>
      <source network='lan'/>
      <model type='virtio'/>
    </interface>
    <channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>
    <graphics type='vnc'><listen type='none'/></graphics>
    <sound model='ich9'/>
    {more}
  </devices>
</domain>
""")
        self.virsh("define", str(xml))
        return disk

    def run(self, *arguments: str) -> int:
        config = self.place / "templated.yaml"
        settings = {"template_dirs": [f"{self.place}/t"], "state_dir": f"{self.place}/s"}
        config.write_text(yaml.safe_dump(settings))
        connected = ("--connect", self.daemon.uri, "--config", str(config))
        return main(["template", "import", *connected, *arguments])


@pytest.fixture(scope="module")
def started() -> Iterator[Host]:
    place = Path(tempfile.mkdtemp(prefix="tpl.", dir="/tmp"))
    try:
        with private_libvirtd() as daemon:
            host = Host(daemon, place)
            (place / "network.xml").write_text(NETWORK)
            host.virsh("net-define", str(place / "network.xml"))
            yield host
    finally:
        shutil.rmtree(place, ignore_errors=True)


@pytest.fixture
def host(started: Host) -> Iterator[Host]:
    """Its domains and files are removed after each test."""
    yield started
    for name in filter(None, started.virsh("list", "--all", "--name").splitlines()):
        if started.virsh("domstate", name).strip() != "shut off":
            started.virsh("destroy", name)
        started.virsh("undefine", name, "--managed-save", "--nvram")
    for path in started.place.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def facts(host: Host, name: str, disk: Path) -> tuple[str, str, int]:
    """What an import must not change."""
    content = hashlib.sha256(disk.read_bytes()).hexdigest()
    return host.virsh("dumpxml", name), content, disk.stat().st_mtime_ns


def test_a_domain(host: Host, capsys: Capture) -> None:
    disk = host.define("web")
    before = facts(host, "web", disk)
    assert host.run("--domain", "web", "-o", "json") == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    spec = yaml.safe_load((host.place / "t/web.yaml").read_text())
    assert spec == found["spec"]
    assert (spec["name"], spec["description"]) == ("web", "For the tests")
    assert spec["image"] == {"path": str(disk), "size": "8MiB"}
    machine = {"type": "q35", "memory": "64MiB", "vcpus": 2, "firmware": "bios"}
    assert spec["machine"] == machine and spec["network"]["name"] == "lan"
    left = {one["what"] for one in found["not_carried_over"]}
    assert {"graphics vnc", "sound ich9", "network lan", "memballoon virtio"} <= left
    assert not {one for one in left if one.startswith(("emulator", "controller", "serial"))}
    assert not [one for one in found["not_carried_over"] if one["why"] == "not known here"]
    assert facts(host, "web", disk) == before


def test_uefi(host: Host, capsys: Capture) -> None:
    """The firmware is found by libvirt when the domain is defined."""
    try:
        host.define("modern", os_attributes="firmware='efi'")
    except HypervisorError as error:
        pytest.skip(f"no UEFI for libvirt here: {error.message}")
    assert host.run("--domain", "modern", "-f", "-") == 0
    assert yaml.safe_load(capsys.readouterr().out)["machine"]["firmware"] == "uefi"


def test_a_name_with_odd_characters(host: Host, capsys: Capture) -> None:
    name = "Web (ölt) %s $HOME"
    host.define(name)
    assert host.run("--domain", name) == exit_codes.for_error("invalid")
    assert "--name web-lt-s-home" in capsys.readouterr().err
    # Its disk is named as it is.
    assert host.run("--domain", name, "--name", "web") == exit_codes.for_error("invalid")
    assert "--copy" in capsys.readouterr().err
    assert host.run("--domain", name, "--name", "web", "--copy") == 0
    assert host.run("--domain", "x' or '1", "--name", "x") == exit_codes.for_error("not_found")


def test_a_domain_that_runs(host: Host, capsys: Capture) -> None:
    """Also paused, and saved; nothing of it is touched. Shut off again, it can be imported."""
    host.define("web", "<input type='tablet' bus='usb'/>")
    host.virsh("net-start", "lan")
    try:
        host.virsh("start", "web")
        refused(host, capsys, "is running")
        host.virsh("suspend", "web")
        refused(host, capsys, "is running")
        host.virsh("managedsave", "web")
        refused(host, capsys, "memory is saved")
        host.virsh("managedsave-remove", "web")
        assert host.run("--domain", "web", "-o", "json") == 0
        left = json.loads(capsys.readouterr().out)["not_carried_over"]
        assert "network lan" not in {one["what"] for one in left}
    finally:
        host.virsh("net-destroy", "lan")


def test_anothers_disk(host: Host, capsys: Capture) -> None:
    """A domain that runs has the disk of one that does not; QEMU's lock says so."""
    disk = host.define("web")
    host.define("other")
    xml = host.virsh("dumpxml", "other").replace(f"{host.place}/other.qcow2", str(disk))
    (host.place / "other.xml").write_text(xml.replace("type='network'", "type='user'"))
    text = (host.place / "other.xml").read_text().replace("<source network='lan'/>", "")
    (host.place / "other.xml").write_text(text)
    host.virsh("define", str(host.place / "other.xml"))
    host.virsh("start", "other")
    refused(host, capsys, "is in use")
    host.virsh("destroy", "other")
    assert host.run("--domain", "web", "--copy") == 0
    assert host.run("--domain", "web", "--name", "web2") == 0


def test_devices_of_the_host(host: Host, capsys: Capture) -> None:
    host.define("web", HOSTDEV)
    refused(host, capsys, "has devices of the host: hostdev pci")


def test_a_volume(host: Host, capsys: Capture) -> None:
    disk = host.define("web")
    host.virsh("pool-create-as", "images", "dir", "--target", str(host.place))
    try:
        xml = host.virsh("dumpxml", "web").replace(
            f"<source file='{disk}'/>", "<source pool='images' volume='web.qcow2'/>"
        )
        xml = xml.replace("<disk type='file'", "<disk type='volume'")
        (host.place / "volume.xml").write_text(xml)
        host.virsh("define", str(host.place / "volume.xml"))
        assert host.run("--domain", "web", "-f", "-") == 0
        assert yaml.safe_load(capsys.readouterr().out)["image"]["path"] == str(disk)
    finally:
        host.virsh("pool-destroy", "images")


def refused(host: Host, capsys: Capture, why: str) -> None:
    assert host.run("--domain", "web") != 0
    said = capsys.readouterr().err.splitlines()
    assert why in said[0] and said[1].startswith("hint: ") and len(said) == 2
    assert not (host.place / "t").exists()


def test_doctor(host: Host) -> None:
    found = libvirt_checks.libvirt_checks(needed=True, kvm=False, uri=host.daemon.uri)
    checks = {check.name: check for check in found}
    version = host.virsh("version").split("library: libvirt ")[1].split()[0]
    assert checks["libvirt"].status == "PASS"
    assert f"libvirt {version}, its QEMU " in checks["libvirt"].detail
    assert checks["libvirt network"].detail == "none is active: lan (inactive)"
    assert checks["libvirt storage"].status == "PASS"
    kvm = "<domain type='kvm'" in host.virsh("capabilities")
    assert checks["libvirt kvm"].status == ("PASS" if kvm else "WARN")


def libvirtd_pid(host: Host) -> int:
    return int((host.daemon.base / "pid").read_text())


def test_a_libvirtd_that_hangs(host: Host) -> None:
    """It is stopped in the middle: no call waits longer than its bound."""
    connection = connect(host.daemon.uri, read_only=True, bound=0.5)
    os.kill(libvirtd_pid(host), signal.SIGSTOP)
    try:
        with pytest.raises(Timeout):
            connection.versions()
        assert not connection.alive
        with pytest.raises(Timeout):
            connect(host.daemon.uri, bound=0.5)
    finally:
        os.kill(libvirtd_pid(host), signal.SIGCONT)
    fresh = connect(host.daemon.uri, read_only=True)
    assert fresh.versions().libvirt
    fresh.close()


def test_a_libvirtd_that_ends() -> None:
    """The next call says so in our words, and the connection knows it."""
    with private_libvirtd() as daemon:
        connection = connect(daemon.uri)
        ended = os.pidfd_open(int((daemon.base / "pid").read_text()))
        try:
            signal.pidfd_send_signal(ended, signal.SIGKILL)
            select.select([ended], [], [], 30)
        finally:
            os.close(ended)
        with pytest.raises(HypervisorError):
            connection.versions()
        assert not connection.alive
        connection.close()
