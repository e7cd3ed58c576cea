"""QEMU's command line, as a pure function of a Launch; golden files in the tests hold it.

Sources: QEMU 7.2's and 10.0's manuals, "System Emulation: Invocation" and "'microvm' virtual
platform"; docs/devel/migration for `x-ignore-shared`. What depends on the version is in `features`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from templated.drivers.hypervisor.base import Hardware, Kernel, Launch
from templated.drivers.hypervisor.qemu.features import features
from templated.errors import Defect
from templated.model.network import Attachment, Forward, OfLibvirt, Tap

AGENT_PORT = "templated.agent.0"
AGENT_PORTS = {"templated": AGENT_PORT, "qemu-ga": "org.qemu.guest_agent.0"}
"""How a guest's agent finds its port."""
UPLINK = "uplink"
"""The network of a VM that boots, as QMP names it."""
CODE_SERIAL = "templated-code"
"""How the guest knows the second disk: /sys/block/vdb/serial."""

SANDBOX = "on,obsolete=deny,elevateprivileges=deny,resourcecontrol=deny"
"""`-sandbox`, but for `spawn`, which depends on the launch."""

UEFI_CODE = Path("/usr/share/OVMF/OVMF_CODE_4M.fd")
UEFI_VARIABLES = Path("/usr/share/OVMF/OVMF_VARS_4M.fd")
"""Of Debian's package ovmf: without Secure Boot, which needs SMM."""

STATE_SET, CODE_SET = 1, 2
STATE_FILE = f"/dev/fdset/{STATE_SET}"
"""The saved state's descriptor, as a QEMU that takes `file:` names it."""
CODE_FILE = f"/dev/fdset/{CODE_SET}"
"""That of an image that is put behind the second disk later."""

# No PCI and no option ROMs: the state file is 64 KB and the boot short. Without option ROMs only
# qboot can start a kernel. It has to be named: by default microvm with ACPI has the SeaBIOS of
# bios-microvm.bin, which is a link to qboot in Debian 12 and SeaBIOS in Debian 13.
_MICROVM = "firmware=qboot.rom,x-option-roms=off,isa-serial=on,rtc=on"
MACHINES = {"microvm": f"microvm,{_MICROVM}", "q35": "q35,smm=off,vmport=off"}
"""`-machine`, by a template's `machine.type`. Of a guest's boot, too, that proves something."""


def qemu_arguments(qemu: str, launch: Launch) -> list[str]:
    """The whole argument vector."""
    hardware = launch.hardware
    arguments = [
        qemu,
        *("-name", f"guest=templated-{launch.slot}"),
        *("-uuid", launch.uuid),
        *("-no-user-config", "-nodefaults", "-display", "none"),
        # A reset would need the kernel of the template's boot. So the VM ends, which is reported.
        "-no-reboot",
        *_sandbox(launch),
        *_machine(launch),
        *_migration(),
        *_devices(launch),
    ]
    if launch.boot is None:
        if launch.state_fd is not None and features(hardware.version).file_uri:
            arguments += ["-add-fd", f"fd={launch.state_fd},set={STATE_SET}"]
        arguments += ["-incoming", "defer"]
    elif isinstance(launch.boot, Kernel):
        arguments += [
            "-kernel",
            _reopened(launch, launch.boot.kernel),
            "-initrd",
            _reopened(launch, launch.boot.initrd),
        ]
        arguments += ["-append", launch.boot.cmdline]
    if hardware.type == "q35":
        arguments += ["-vga", "none"]
    return arguments


def _sandbox(launch: Launch) -> list[str]:
    """A filter of system calls (seccomp) that QEMU gives itself before the guest runs.

    Who breaks out of the guest into QEMU can start no program, and change neither uid nor priority.
    """
    if not launch.confined:
        return []
    by_program = launch.boot is None and launch.state_fd is None
    return ["-sandbox", f"{SANDBOX},spawn={'allow' if by_program else 'deny'}"]


def _machine(launch: Launch) -> list[str]:
    hardware = launch.hardware
    flash = ",pflash0=firmware,pflash1=variables" if launch.variables else ""
    return [
        *("-machine", f"{MACHINES[hardware.type]},memory-backend=ram,dump-guest-core=off{flash}"),
        *("-accel", _accelerator(hardware)),
        *("-cpu", hardware.cpu),
        *("-smp", str(hardware.vcpus)),
        *("-m", f"{hardware.memory_bytes >> 10}k"),
        *("-object", _memory(launch)),
    ]


def _memory(launch: Launch) -> str:
    hardware = launch.hardware
    if launch.memory is None:
        return f"memory-backend-ram,id=ram,size={hardware.memory_bytes}"
    path = _escaped(_reopened(launch, launch.memory))
    backend = f"memory-backend-file,id=ram,size={hardware.memory_bytes},mem-path={path}"
    if launch.memory_shared:
        return f"{backend},share=on"
    # A private mapping of a file that QEMU, and who breaks out into it, cannot write.
    read_only = ",readonly=on,rom=off" if features(hardware.version).read_only_memory else ""
    return f"{backend},share=off{read_only}"


def _accelerator(hardware: Hardware) -> str:
    # One thread for all virtual CPUs: it is spared the atomic operations that TCG makes when it
    # translates for several threads. And with several, QEMU 7.2 may go on with code that another
    # CPU has just changed: Linux changes its own while it boots, and panics at an int3.
    return "tcg,thread=single" if hardware.accel == "tcg" else hardware.accel


def _migration() -> list[str]:
    return [
        # An event tells the end of a restore sooner than polling does.
        *("-global", "migration.x-events=on"),
        # A restored NIC still has the template's MAC: never announce it.
        *("-global", "migration.announce-rounds=0"),
    ]


def _devices(launch: Launch) -> list[str]:
    bus = "device" if launch.hardware.type == "microvm" else "pci"
    rom = "" if bus == "device" else ",romfile="
    # status=off: QEMU drops packets while the link is down, and the guest has nothing to do when
    # it comes up.
    # Firmware that is told nothing looks at all that there is.
    first = ",bootindex=1" if launch.hardware.firmware else ""
    nic = f"id=nic0,netdev=net0,mac={launch.mac},status=off"
    return [
        *("-chardev", f"socket,id=qmp,fd={launch.control_fd},server=on,wait=off"),
        *("-mon", "chardev=qmp,mode=control"),
        *_descriptors(launch),
        *(
            "-chardev",
            f"file,id=serial,path={_escaped(_in_set(launch, launch.places.serial_log))},append=on",
        ),
        *("-serial", "chardev:serial"),
        *("-blockdev", _blockdev(launch)),
        *("-device", f"virtio-blk-{bus},drive=disk{first}"),
        *_code(launch, bus),
        *_seed(launch, bus),
        *_flash(launch),
        *_network(launch),
        *("-device", f"virtio-net-{bus},{nic}{rom}"),
        *("-device", f"virtio-serial-{bus},max_ports=2"),
        *("-chardev", f"socket,id=agent,fd={launch.agent_fd},server=on,wait=off"),
        *("-device", f"virtserialport,chardev=agent,name={AGENT_PORTS[launch.hardware.agent]}"),
        *("-object", "rng-builtin,id=rng"),
        *("-device", f"virtio-rng-{bus},rng=rng"),
    ]


def _blockdev(launch: Launch) -> str:
    # A clone's disk dies with it, so its flushes need not reach the platter; the template's
    # layers are synced once, when they are frozen.
    options: dict[str, Any] = {
        "driver": "qcow2",
        "node-name": "disk",
        "discard": "unmap",
        "cache": {"no-flush": True},
        "file": _unlocked(_in_set(launch, launch.disk)),
    }
    above = options
    for layer in launch.backing:
        file = {**_unlocked(_in_set(launch, layer)), "read-only": True}
        above["backing"] = {"driver": "qcow2", "read-only": True, "file": file}
        above = above["backing"]
    return json.dumps(options)


def _unlocked(name: str) -> dict[str, Any]:
    """A file without QEMU's locks (fcntl(2)): who may read one can lock it against all others.

    Nothing is lost: each layer is either read-only for good or one VM's own.
    """
    return {"driver": "file", "filename": name, "locking": "off"}


def _code(launch: Launch, bus: str) -> list[str]:
    """The second disk, by two nodes: what is below the upper one can be exchanged later."""
    if launch.code is None:
        return []
    name = _escaped(_in_set(launch, launch.code))
    file = f"driver=file,node-name=code-file,filename={name},locking=off,read-only=on"
    return [
        *("-blockdev", file),
        *("-blockdev", "driver=raw,node-name=code,read-only=on,file=code-file"),
        *("-device", f"virtio-blk-{bus},id=code0,drive=code,serial={CODE_SERIAL}"),
    ]


def _seed(launch: Launch, bus: str) -> list[str]:
    if launch.seed is None:
        return []
    file = {**_unlocked(_in_set(launch, launch.seed)), "read-only": True}
    drive = {"driver": "raw", "node-name": "seed", "read-only": True, "file": file}
    return [
        *("-blockdev", json.dumps(drive)),
        *("-device", f"virtio-blk-{bus},id=seed0,drive=seed"),
    ]


def _flash(launch: Launch) -> list[str]:
    """UEFI in its two flash chips: its code, which all share, and a VM's own variables."""
    if launch.variables is None:
        return []
    code = {"driver": "file", "filename": str(UEFI_CODE), "read-only": True, "locking": "off"}
    store = _unlocked(_in_set(launch, launch.variables))
    chips = (
        {"driver": "raw", "node-name": "firmware", "read-only": True, "file": code},
        {"driver": "raw", "node-name": "variables", "file": store},
    )
    return [word for chip in chips for word in ("-blockdev", json.dumps(chip))]


def _network(launch: Launch) -> list[str]:
    """What the NIC is on: of a VM that boots a hub, so that UPLINK can be taken away from it.

    What is on a NIC itself stays until the NIC goes, since QEMU 10; and slirp that is still there
    has a section in the saved state, with which a VM on a tap does not load it.
    """
    if launch.boot is None:
        return ["-netdev", netdev(launch.network, "net0")]
    return [
        *("-netdev", netdev(launch.network, UPLINK)),
        *("-netdev", f"hubport,id=hub0,hubid=0,netdev={UPLINK}"),
        *("-netdev", "hubport,id=net0,hubid=0"),
    ]


def netdev(network: Attachment, name: str) -> str:
    """The value of `-netdev`; a network of libvirt has none."""
    if isinstance(network, OfLibvirt):
        raise Defect("QEMU cannot make a NIC on a network of libvirt")
    if isinstance(network, Tap):
        return f"tap,id={name},fd={network.fd}"
    options = [
        f"user,id={name}",
        # IPv6 would be on by itself, beside the only address that the clone is told.
        "ipv6=off",
        f"net={network.subnet},host={network.gateway},dns={network.dns}",
        # A guest that asks by DHCP gets the same address as one that is told.
        f"dhcpstart={network.address}",
        f"restrict={'on' if network.restrict else 'off'}",
    ]
    # The guest's address is named: slirp would forward to dhcpstart of its own defaults.
    options += [_hostfwd(forward, network.address) for forward in network.forwards]
    return ",".join(options)


def _hostfwd(forward: Forward, guest: str) -> str:
    host = f"{_escaped(forward.host_address)}:{forward.host_port}"
    return f"hostfwd={forward.protocol}:{host}-{guest}:{forward.guest_port}"


def inherited(launch: Launch) -> tuple[int, ...]:
    """The descriptors that the command line names: QEMU must have them under these numbers."""
    network = (launch.network.fd,) if isinstance(launch.network, Tap) else ()
    state = () if launch.state_fd is None else (launch.state_fd,)
    return (launch.control_fd, launch.agent_fd, *network, *state, *launch.opened.values())


def reopened_files(launch: Launch) -> list[tuple[Path, int]]:
    """The inherited files that are opened once more, by QEMU or the program that it starts.

    But for sealed memory, which has no place in any file system.
    """
    sealed = not launch.memory_shared and not features(launch.hardware.version).read_only_memory
    others = (*_in_sets(launch), *((launch.memory,) if sealed else ()))
    return [(path, fd) for path, fd in launch.opened.items() if path not in others]


def _reopened(launch: Launch, path: Path) -> str:
    """A file for an option that takes only paths: QEMU opens an inherited one once more."""
    fd = launch.opened.get(path)
    return str(path) if fd is None else f"/proc/self/fd/{fd}"


def _in_set(launch: Launch, path: Path) -> str:
    """A file for an option that takes a member of a descriptor set, too."""
    fd = launch.opened.get(path)
    return str(path) if fd is None else f"/dev/fdset/{_set(fd)}"


def _descriptors(launch: Launch) -> list[str]:
    """The sets, of one descriptor each, with a path that tells people what it is."""
    words: list[str] = []
    for file in _in_sets(launch):
        if (fd := launch.opened.get(file)) is not None:
            words += ["-add-fd", f"fd={fd},set={_set(fd)},opaque={_escaped(file)}"]
    return words


def _in_sets(launch: Launch) -> tuple[Path, ...]:
    """The files that `_in_set` is asked for."""
    others = (launch.code, launch.seed, launch.variables)
    files = (file for file in others if file is not None)
    return (launch.disk, *launch.backing, launch.places.serial_log, *files)


def _set(fd: int) -> int:
    """A set's number: QEMU asks for one that is not 0, and the first ones are taken."""
    return fd + CODE_SET + 1


def _escaped(value: object) -> str:
    """QEMU's option parser takes a doubled comma for a comma."""
    return str(value).replace(",", ",,")
