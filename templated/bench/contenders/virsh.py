"""`virsh save` and `virsh restore`, with a libvirtd of the bench's own."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from uuid import uuid4
from xml.sax.saxutils import escape, quoteattr

from templated.bench.bare import BOUND, Line, Stopwatch, identity
from templated.bench.contenders.base import Once, shared_memory
from templated.bench.libvirtd import Libvirtd, private_libvirtd
from templated.bench.session import Session
from templated.drivers.hypervisor.qemu.command import AGENT_PORT, MACHINES
from templated.errors import HostError, HypervisorError, TemplatedError, Timeout
from templated.model.units import seconds
from templated.services.machines.generation import Generation

_DOMAIN = "templated-bench"
_MAC = "02:00:00:00:00:01"
_SETTLE, _PING = 2.0, 0.5


@dataclass(frozen=True)
class VirshRestore:
    """The image booted under libvirt, saved once when its agent is idle, and restored each time."""

    session: Session
    name: str = "virsh-restore"
    about: str = "virsh restore FILE with a running libvirtd, all memory in FILE; identify"

    @contextmanager
    def opened(self) -> Iterator[Once]:
        generation = self.session.generation()
        with (
            TemporaryDirectory(prefix="tpl.", dir="/tmp") as places,
            shared_memory(generation) as shm,
            private_libvirtd() as daemon,
        ):
            domain = Domain(daemon, generation, Path(places), Path(shm) / "saved")
            with domain.removed():
                domain.save()
                yield domain.restore


@dataclass(frozen=True)
class Domain:
    """A transient domain: libvirt forgets it when it ends."""

    daemon: Libvirtd
    generation: Generation
    places: Path
    saved: Path

    def save(self) -> None:
        """Boot the template's guest, let it do what a base VM does before its freeze, save it."""
        image = Path(self.generation.manifest.kernel).parent / "disk.qcow2"
        _overlay(image, self.places / "disk.qcow2")
        (self.places / "domain.xml").write_text(domain_xml(self.generation, self.places))
        self.daemon.virsh("create", str(self.places / "domain.xml"))
        with contextlib.closing(self._booted()) as agent:
            agent.ask({"cmd": "identify", **identity(str(uuid4()), _MAC)})
            time.sleep(_SETTLE)
            agent.ask({"cmd": "quiesce"})
        self.daemon.virsh("save", _DOMAIN, str(self.saved))
        (self.places / "disk.qcow2").rename(self.places / "frozen.qcow2")

    def restore(self) -> dict[str, float]:
        """One start."""
        # Layer 3 is made beforehand here too.
        shutil.copyfile(self.places / "frozen.qcow2", self.places / "disk.qcow2")
        with self.removed():
            watch = Stopwatch()
            self.daemon.virsh("restore", str(self.saved))
            watch.mark("restore")
            with contextlib.closing(Line(self.places / "agent")) as agent:
                agent.ask({"cmd": "identify", **identity(str(uuid4()), _MAC)})
            watch.mark("identify")
        return watch.row()

    @contextmanager
    def removed(self) -> Iterator[None]:
        """Destroys the domain at the end, if it is there."""
        try:
            yield
        finally:
            with contextlib.suppress(HypervisorError):
                self.daemon.virsh("destroy", _DOMAIN)

    def _booted(self) -> Line:
        """A connection to the agent, once it answers; earlier messages to it are lost."""
        spec = self.generation.manifest.spec
        deadline = time.monotonic() + seconds(spec.boot_timeout)
        while True:
            line = Line(self.places / "agent", timeout=_PING)
            try:
                line.ask({"cmd": "ping"})
                line.patience(BOUND)
                return line
            except Timeout:
                line.close()
                if time.monotonic() > deadline:
                    raise
            except TemplatedError:
                line.close()
                raise


def _overlay(image: Path, target: Path) -> None:
    command = [
        "qemu-img",
        "create",
        "-q",
        "-f",
        "qcow2",
        "-F",
        "qcow2",
        "-b",
        str(image),
        str(target),
    ]
    done = subprocess.run(command, capture_output=True, timeout=60, check=False)
    if done.returncode != 0:
        raise HostError(f"qemu-img failed: {done.stderr.decode(errors='replace').strip()}")


def domain_xml(generation: Generation, places: Path) -> str:
    """The template's guest as libvirt can have it.

    The same QEMU, machine type, CPU, memory, kernel, initrd and image, with virtio disk, NIC, RNG
    and agent port. libvirt knows of microvm only that QEMU has it: every device is told where it
    is, and what `-machine` has beyond that is passed on.
    """
    hardware, manifest = generation.hardware, generation.manifest
    where = "<address type='virtio-mmio'/>" if hardware.type == "microvm" else ""
    machine, _, extra = MACHINES[hardware.type].partition(",")
    kernel = Path(manifest.kernel)
    kind = "kvm" if hardware.accel == "kvm" else "qemu"
    return f"""
<domain type='{kind}' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
  <name>{_DOMAIN}</name>
  <memory unit='b'>{hardware.memory_bytes}</memory>
  <vcpu>{hardware.vcpus}</vcpu>
  <os>
    <type arch='x86_64' machine='{machine}'>hvm</type>
    <kernel>{escape(str(kernel))}</kernel>
    <initrd>{escape(str(kernel.with_name("initrd")))}</initrd>
    <cmdline>{escape(manifest.kernel_cmdline)}</cmdline>
  </os>
  <features><acpi/></features>
  {_cpu(hardware.cpu)}
  <on_reboot>destroy</on_reboot>
  <devices>
    <emulator>{escape(manifest.qemu.path)}</emulator>
    <disk type='file' device='disk'>
      <driver name='qemu' type='qcow2'/>
      <source file={quoteattr(str(places / "disk.qcow2"))}/>
      <target dev='vda' bus='virtio'/>{where}
    </disk>
    <interface type='user'>
      <mac address='{_MAC}'/><model type='virtio'/>{where}
    </interface>
    <controller type='virtio-serial' index='0'>{where}</controller>
    <controller type='usb' model='none'/>
    <channel type='unix'>
      <source mode='bind' path={quoteattr(str(places / "agent"))}/>
      <target type='virtio' name='{AGENT_PORT}'/>
    </channel>
    <serial type='file'><source path={quoteattr(str(places / "serial.log"))}/></serial>
    <memballoon model='none'/>
    <rng model='virtio'><backend model='random'>/dev/urandom</backend>{where}</rng>
  </devices>
  <qemu:commandline>
    <qemu:arg value='-machine'/><qemu:arg value='{extra}'/>
  </qemu:commandline>
</domain>
"""


def _cpu(cpu: str) -> str:
    """QEMU's `MODEL,+FEATURE,...` in libvirt's words."""
    model, *features = cpu.split(",")
    if model == "host":
        return "<cpu mode='host-passthrough'/>"
    policies = {"+": "require", "-": "disable"}
    named = "".join(
        f"<feature policy='{policies[feature[0]]}' name={quoteattr(feature[1:])}/>"
        for feature in features
        if feature[:1] in policies
    )
    exact = "<cpu mode='custom' match='exact' check='none'>"
    return f"{exact}<model>{escape(model)}</model>{named}</cpu>"
