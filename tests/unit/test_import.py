"""`template import`, with real disk images and a stand-in for libvirt."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from templated.cli import exit_codes
from templated.cli.main import main
from templated.drivers.libvirt import connection
from templated.errors import Conflict, HostError, InvalidRequest, NotFound, TemplatedError
from templated.model.config import Config
from templated.services import domain_import
from templated.services.domain_import import Imported, Order, import_domain
from tests.unit.libvirt_handle import UUID, Handle, Place
from tests.unit.qcow2_files import encrypted, qemu_img
from tests.unit.test_cli import _complete
from tests.unit.test_domain_xml import xml

Capture = pytest.CaptureFixture[str]
PATH = "/var/lib/libvirt/images/debian12.qcow2"


class Desk:
    """A host with a domain `web` and its disk, and where templates are written."""

    def __init__(self, place: Path, handle: Handle) -> None:
        self.handle = handle
        self.disk = place / "web.qcow2"
        self.templates = place / "templates"
        self.state = place / "state"
        self.file = place / "templated.yaml"
        self.said: list[str] = []
        self.handle.networks["default"] = Place()
        qemu_img("create", "-q", "-f", "qcow2", str(self.disk), "1M")
        self.define()
        settings = {"template_dirs": [str(self.templates)], "state_dir": str(self.state)}
        self.file.write_text(yaml.safe_dump(settings))

    def define(self, name: str = "web", *, image_format: str = "qcow2", **state: bool) -> None:
        text = xml("debian12").replace(PATH, str(self.disk))
        text = text.replace("type='qcow2'", f"type='{image_format}'")
        self.handle.define(name, text.replace("debian12<", f"{name}<"), **state)

    def run(self, **order: Any) -> Imported:
        from templated.drivers.configfile import load_config

        config: Config = load_config(self.file)
        return import_domain(Order(**{"domain": "web", **order}), config, self.said.append)

    def refused(self, kind: type[TemplatedError], match: str, **order: Any) -> TemplatedError:
        """It fails in one line with a hint, and the files are those of before."""
        before = self.files()
        with pytest.raises(kind, match=match) as caught:
            self.run(**order)
        assert self.files() == before
        assert caught.value.hint
        return caught.value

    def files(self) -> dict[str, bytes]:
        """All files, but for empty directories."""
        found = [path for path in self.disk.parent.rglob("*") if path.is_file()]
        return {str(path): path.read_bytes() for path in found}


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Desk:
    handle = Handle()
    monkeypatch.setattr(domain_import, "connect", handle.connect)
    return Desk(tmp_path, handle)


def test_a_domain(desk: Desk) -> None:
    before = desk.disk.read_bytes()
    done = desk.run()
    written = desk.templates / "web.yaml"
    assert (done.template, done.file, done.copied) == ("web", str(written), False)
    assert (
        yaml.safe_load(written.read_text())
        == done.spec
        == {
            "name": "web",
            "description": "libvirt domain web",
            "hypervisor": "libvirt",
            "image": {"path": str(desk.disk), "size": "1MiB"},
            "machine": {"type": "q35", "memory": "2GiB", "vcpus": 2, "firmware": "bios"},
            "identity": {"agent": "qemu-ga", "timeout": "60s"},
            "network": {"mode": "libvirt", "name": "default"},
            "boot_timeout": "300s",
            "probes": [
                {"type": "agent", "name": "agent", "timeout": "300s"},
                {"type": "settle", "name": "settle", "timeout": "120s"},
            ],
        }
    )
    assert desk.disk.read_bytes() == before
    assert desk.handle.closed == 1 and desk.said == []


def test_for_qemu(desk: Desk) -> None:
    """The network is the daemon's then, which is said."""
    done = desk.run(hypervisor="qemu")
    assert done.spec["hypervisor"] == "qemu" and "network" not in done.spec
    assert any(one.what == "network default" for one in done.leftovers)


def test_what_is_left_is_in_the_file(desk: Desk) -> None:
    done = desk.run()
    head = [line for line in done.text.splitlines() if line.startswith("# ")]
    assert head[0] == f"# Of the libvirt domain web ({UUID}, qemu:///system)."
    assert "# - graphics spice: clones have a serial console" in head
    assert len(head) == 4 + len(done.leftovers)


def test_a_copy(desk: Desk) -> None:
    """Of its own: the domain may run afterwards."""
    done = desk.run(copy=True)
    copied = desk.state / "imported" / "web.qcow2"
    assert done.copied and done.spec["image"]["path"] == str(copied)
    qemu_img("compare", str(copied), str(desk.disk))
    assert copied.stat().st_mode & 0o777 == 0o600
    assert "shut off" not in done.text
    assert desk.said and os.listdir(copied.parent) == ["web.qcow2"]
    desk.refused(Conflict, "web.qcow2 is there already", copy=True, file="-")
    assert desk.state.stat().st_mode & 0o777 == 0o700


def test_a_copy_that_was_killed(desk: Desk) -> None:
    """What it left is removed by the next one; another's work is not."""
    place = desk.state / "imported"
    place.mkdir(parents=True)
    (place / ".web.qcow2.99999999.part").touch()
    mine = place / f".web.qcow2.{os.getppid()}.part"
    mine.touch()
    desk.run(copy=True)
    assert sorted(os.listdir(place)) == [mine.name, "web.qcow2"]


def test_to_stdout(desk: Desk) -> None:
    done = desk.run(file="-")
    assert done.file is None and not desk.templates.exists()
    assert yaml.safe_load(done.text) == done.spec


def test_nothing_is_overwritten(desk: Desk, tmp_path: Path) -> None:
    desk.run()
    desk.refused(Conflict, "there is a template web")
    desk.run(name="web2", file=str(tmp_path / "x.yaml"))
    desk.refused(Conflict, "is there already", name="web3", file=str(tmp_path / "x.yaml"))
    (tmp_path / "link").symlink_to("nowhere")
    desk.refused(Conflict, "is there already", name="web3", file=str(tmp_path / "link"))


def test_a_raw_disk(desk: Desk) -> None:
    desk.disk.unlink()
    qemu_img("create", "-q", "-f", "raw", str(desk.disk), "1M")
    desk.define(image_format="raw")
    error = desk.refused(InvalidRequest, "is raw, not qcow2")
    assert "--copy" in error.hint
    qemu_img("check", "-f", "qcow2", desk.run(copy=True).disk)


def test_a_backing_file(desk: Desk, tmp_path: Path) -> None:
    base = tmp_path / "base.qcow2"
    desk.disk.rename(base)
    qemu_img("create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", str(base), str(desk.disk))
    desk.refused(InvalidRequest, "has a backing file")
    copied = desk.run(copy=True).disk
    base.unlink()
    qemu_img("check", copied)


def test_a_path_beyond_ascii(desk: Desk) -> None:
    """A template's file cannot name it, but a copy has another name."""
    moved = desk.disk.with_name("größe.qcow2")
    desk.disk.rename(moved)
    desk.disk = moved
    desk.define()
    desk.refused(InvalidRequest, "not ASCII")
    assert desk.run(copy=True).disk.isascii()


def test_a_data_file(desk: Desk, tmp_path: Path) -> None:
    desk.disk.unlink()
    options = f"data_file={tmp_path}/data.raw"
    qemu_img("create", "-q", "-f", "qcow2", "-o", options, str(desk.disk), "1M")
    desk.refused(InvalidRequest, "has its data in another file")


def test_an_encrypted_disk(desk: Desk) -> None:
    encrypted(desk.disk, "1M")
    desk.refused(InvalidRequest, "is encrypted")
    desk.refused(InvalidRequest, "is encrypted", copy=True)


def test_a_broken_disk(desk: Desk) -> None:
    """qcow2's bit 1 of the incompatible features, at offset 72, says so."""
    content = bytearray(desk.disk.read_bytes())
    content[79] |= 2
    desk.disk.write_bytes(content)
    desk.refused(InvalidRequest, "is marked as broken")


def test_not_what_it_is_said_to_be(desk: Desk) -> None:
    desk.disk.write_bytes(b"no qcow2 at all" * 100)
    desk.refused(HostError, "not in qcow2 format")
    desk.disk.unlink()
    desk.refused(HostError, "No such file")


def test_a_disk_in_use(desk: Desk) -> None:
    """Another process writes to it, which libvirt need not know."""
    command = ["qemu-io", "-f", "qcow2", str(desk.disk)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe) as writer:
        assert writer.stdin is not None and writer.stdout is not None
        writer.stdin.write(b"length\n")
        writer.stdin.flush()
        writer.stdout.readline()
        desk.refused(Conflict, "is in use")
        desk.refused(Conflict, "is in use", copy=True)


def test_a_domain_in_use(desk: Desk) -> None:
    desk.define("running", active=True)
    desk.define("saved", saved=True)
    assert "shutdown" in desk.refused(Conflict, "is running", domain="running").hint
    assert "start" in desk.refused(Conflict, "memory is saved", domain="saved").hint


@pytest.mark.parametrize("name", ["", "a\nb", "\x1b[31m", "x" * 501])
def test_what_is_no_domains_name(desk: Desk, name: str) -> None:
    desk.refused(InvalidRequest, "is not the name of a domain", domain=name, name="t")


@pytest.mark.parametrize(
    ("domain", "name"),
    [
        ("Web Server (old)", "web-server-old"),
        ("../../etc/passwd", "etc-passwd"),
        ("größe", "gr-e"),
        ("x" * 60, "x" * 49),
        ("___", "imported"),
        ("; rm -rf /", "rm-rf"),
    ],
)
def test_a_domains_name_that_no_template_can_have(desk: Desk, domain: str, name: str) -> None:
    """It is said before anything is asked; with another name for the template it goes."""
    error = desk.refused(InvalidRequest, "cannot be the name of a template", domain=domain)
    assert error.hint.endswith(f"--name {name}")
    desk.define(domain)
    assert desk.run(domain=domain, name=name).spec["description"].startswith("libvirt domain")


def test_a_domain_that_is_not_there(desk: Desk) -> None:
    error = desk.refused(NotFound, "there is no domain other on qemu:///system", domain="other")
    assert "list --all" in error.hint


def test_a_bad_name_for_the_template(desk: Desk) -> None:
    desk.refused(InvalidRequest, "cannot be the name of a template", name="../x")


def test_another_host(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(domain_import, "connect", connection.connect)
    desk.refused(InvalidRequest, "leads to another host", uri="qemu+ssh://root@h/system")


@pytest.mark.parametrize(
    ("network", "why"),
    [(None, "libvirt has no such network"), (Place(active=False), "it is not active")],
)
def test_a_network_that_is_not_there(desk: Desk, network: Place | None, why: str) -> None:
    desk.handle.networks = {} if network is None else {"default": network}
    done = desk.run()
    assert any(one.what == "network default" and why in one.why for one in done.leftovers)
    assert done.spec["network"]["name"] == "default"


def test_a_network_with_an_odd_name(desk: Desk) -> None:
    """It becomes neither a line of the file, nor a template that no daemon takes."""
    odd = "lan&#10;probes: []&#10;#"
    text = desk.handle.domains["web"].xml
    desk.handle.define("web", text.replace("network='default'", f"network='{odd}'"))
    assert "probes: []" in desk.handle.domains["web"].xml
    done = desk.run(hypervisor="qemu")
    assert done.file is not None
    written = Path(done.file).read_text()
    assert "network lan probes: [] #: clones are on the daemon's" in written
    assert yaml.safe_load(written) == done.spec and len(done.spec["probes"]) == 2
    Path(done.file).unlink()
    desk.handle.networks["lan\nprobes: []\n#"] = Place()
    desk.refused(InvalidRequest, r"the domain web makes no template: .*network\.name")


def test_a_network_of_the_hosts_nics(desk: Desk) -> None:
    desk.handle.networks["default"] = Place(xml="<network><forward mode='hostdev'/></network>")
    desk.refused(InvalidRequest, "network default hands out devices of the host")


def test_a_volume(desk: Desk) -> None:
    desk.handle.define("fedora", xml("session"))
    desk.refused(NotFound, "the volume fedora of the pool gnome-boxes", domain="fedora")
    desk.handle.pools["gnome-boxes"] = Place(volumes={"fedora": Place(location=str(desk.disk))})
    assert desk.run(domain="fedora").disk == str(desk.disk)


def test_devices_of_the_host(desk: Desk) -> None:
    desk.handle.define("gpu", xml("host-devices"))
    desk.refused(InvalidRequest, "has devices of the host", domain="gpu")


def test_a_place_that_cannot_be_written(desk: Desk, tmp_path: Path) -> None:
    """The copy, made before, is removed."""
    (tmp_path / "file").touch()
    desk.refused(HostError, "cannot write", file=str(tmp_path / "file/web.yaml"), copy=True)


def test_interrupted(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    before = desk.files()
    monkeypatch.setattr(domain_import, "_write", interrupt)
    with pytest.raises(KeyboardInterrupt):
        desk.run(copy=True)
    assert desk.files() == before


# The command


Cli = Callable[..., int]


@pytest.fixture
def cli(desk: Desk) -> Cli:
    def run(*arguments: str) -> int:
        return main(["template", "import", "--config", str(desk.file), *arguments])

    return run


def test_the_command(desk: Desk, cli: Cli, capsys: Capture) -> None:
    assert cli("--domain", "web") == 0
    captured = capsys.readouterr()
    assert captured.out == f"web: wrote {desk.templates}/web.yaml\n"
    said = captured.err.splitlines()
    assert (
        said[0] == "not carried over:" and "  graphics spice: clones have a serial console" in said
    )
    assert said[-2:] == [
        "keep the domain shut off until the template is built",
        "next: templated template build web",
    ]
    assert cli("--domain", "web") == exit_codes.for_error("conflict")


def test_the_command_for_programs(desk: Desk, cli: Cli, capsys: Capture) -> None:
    assert cli("--domain", "web", "-o", "json", "-q", "--copy") == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    found = json.loads(captured.out)
    assert (found["domain"], found["uri"], found["copied"]) == ("web", "qemu:///system", True)
    assert found["spec"]["image"]["path"] == found["disk"]
    assert {"what": "sound ich9", "why": "clones have none"} in found["not_carried_over"]


def test_the_command_in_a_pipe(desk: Desk, cli: Cli, capsys: Capture) -> None:
    assert cli("--domain", "web", "-f", "-", "-q") == 0
    captured = capsys.readouterr()
    assert yaml.safe_load(captured.out)["name"] == "web" and captured.err == ""


HOST = """
<node>
  <cpu><nodes>1</nodes><sockets>1</sockets><cores>1</cores><threads>1</threads></cpu>
  <domain type='test' xmlns:test='http://libvirt.org/schemas/domain/test/1.0'>
    <name>web</name><memory>1024</memory><os><type>hvm</type></os>
    <test:runstate>5</test:runstate>
  </domain>
  <domain type='test'>
    <name>web-running</name><memory>1024</memory><os><type>hvm</type></os>
  </domain>
</node>
"""


def test_domains_are_completed(tmp_path: Path) -> None:
    """Those that can be imported; and nothing where libvirt does not answer."""
    (tmp_path / "host.xml").write_text(HOST)
    given = f"template import --connect test://{tmp_path}/host.xml --domain w"
    assert _complete(given).split() == [b"plain,web"]
    given = f"template import --connect qemu+unix:///system?socket={tmp_path}/none --domain w"
    assert _complete(given).split() == []
