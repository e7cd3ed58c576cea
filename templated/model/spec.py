"""The contents of a template's YAML file."""

from __future__ import annotations

import hashlib
from typing import Annotated, Any, Literal, TypeAlias

from msgspec import Meta, Struct, structs, to_builtins
from msgspec.structs import replace

from templated.model.policy import KEYS, PolicyKeys
from templated.model.units import Duration, Size, seconds, size_bytes

TemplateName = Annotated[str, Meta(pattern=r"^[a-z0-9]([a-z0-9-]{0,47}[a-z0-9])?$(?!\n)")]
PackageName = Annotated[str, Meta(pattern=r"^[a-z0-9][a-z0-9+.:-]{0,99}$(?!\n)")]
Port = Annotated[int, Meta(ge=1, le=65535)]
PoolSize = Annotated[int, Meta(ge=0, le=10000)]
Percent = Annotated[float, Meta(gt=0, le=100)]
_SEED = 256 << 10
"""Characters of one file for cloud-init."""


class _Spec(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of all parts of a spec: immutable, and a key it does not know is an error."""


def _digest(text: str) -> str:
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


class SeedSpec(_Spec, frozen=True, kw_only=True):
    """What cloud-init is given at an image's first boot: the files of its NoCloud source."""

    user_data: Annotated[str, Meta(max_length=_SEED)] = "#cloud-config\n"
    meta_data: Annotated[str, Meta(max_length=_SEED)] = "instance-id: templated\n"
    network_config: Annotated[str, Meta(max_length=_SEED)] = ""

    def hidden(self) -> SeedSpec:
        """The same with digests in place of the texts: passwords and keys may be in them."""
        texts = to_builtins(self).items()
        return SeedSpec(**{name: _digest(text) if text else "" for name, text in texts})


class ImageSpec(_Spec, frozen=True, kw_only=True):
    """Disk layer 1, kept by the digest of this struct: a Debian that is built once, or a file."""

    path: Annotated[str, Meta(pattern=r"^/[ -~]{1,1000}$(?!\n)")] | None = None
    """A qcow2 file with a system of its own, which is copied; nothing is built then."""
    seed: SeedSpec | None = None
    """For cloud-init in such a file."""
    boot: Literal["kernel", "disk"] = "kernel"
    """`kernel`: a root of ours, which QEMU starts by its kernel. `disk`: a stock Debian, which
    its own boot loader starts."""
    suite: Annotated[str, Meta(pattern=r"^[a-z]{3,32}$(?!\n)")] = "bookworm"
    packages: tuple[PackageName, ...] = ()
    kernel: PackageName = "linux-image-cloud-amd64"
    size: Size = "1GiB"
    mirror: Annotated[str, Meta(pattern=r"^(https?|file)://[!-~]{1,300}$(?!\n)")] | None = None

    def __post_init__(self) -> None:
        if self.path is None and self.seed is not None:
            raise ValueError("seed is for an image that has a path")
        if self.path is not None and (self.boot == "disk" or self.packages or self.mirror):
            raise ValueError("an image that has a path has neither boot, packages nor mirror")

    @property
    def boots_itself(self) -> bool:
        """Whether a boot loader on the disk starts it."""
        return self.boot == "disk" or self.path is not None


class MachineSpec(_Spec, frozen=True, kw_only=True):
    """The virtual hardware. Clones get the same, since device state is restored into it."""

    type: Literal["microvm", "q35"] = "microvm"
    memory: Size = "128MiB"
    vcpus: Annotated[int, Meta(ge=1, le=64)] = 1
    cmdline: Annotated[str, Meta(pattern=r"^[ -~]{0,1000}$(?!\n)")] = ""
    firmware: Literal["bios", "uefi"] = "bios"
    """What starts the boot loader of an image that has one."""


class _Probe(_Spec, frozen=True, kw_only=True, tag_field="type"):
    """A QA check: tried every `interval` until it passes or `timeout` ends the build."""

    name: Annotated[str, Meta(pattern=r"^[a-z0-9][a-z0-9_-]{0,47}$(?!\n)")]
    timeout: Duration = "30s"
    interval: Duration = "250ms"


class SerialProbe(_Probe, frozen=True, kw_only=True, tag="serial"):
    """A regular expression that must appear on the serial console."""

    pattern: str


class AgentProbe(_Probe, frozen=True, kw_only=True, tag="agent"):
    """The agent answers a ping."""


class ExecProbe(_Probe, frozen=True, kw_only=True, tag="exec"):
    """A command in the guest ends with `exit_code`, its stdout matching `pattern`."""

    command: Annotated[tuple[str, ...], Meta(min_length=1)]
    exit_code: int = 0
    pattern: str = ""


class TcpProbe(_Probe, frozen=True, kw_only=True, tag="tcp"):
    """A TCP port accepts a connection, from inside the guest or through a forward on the host."""

    port: Port
    via: Literal["guest", "forward"] = "guest"


class HttpProbe(_Probe, frozen=True, kw_only=True, tag="http"):
    """An HTTP GET answers with `status`, its body matching `pattern`."""

    port: Port
    path: Annotated[str, Meta(pattern=r"^/[!-~]{0,1000}$(?!\n)")] = "/"
    status: Annotated[int, Meta(ge=100, le=599)] = 200
    pattern: str = ""
    via: Literal["guest", "forward"] = "guest"


class SettleProbe(_Probe, frozen=True, kw_only=True, tag="settle"):
    """The guest's CPU use stays below `cpu_percent` of one core for the duration `quiet`."""

    cpu_percent: Percent = 25.0
    quiet: Duration = "1s"

    def __post_init__(self) -> None:
        if seconds(self.quiet) <= 0:
            raise ValueError("quiet must be longer than nothing")


Probe: TypeAlias = SerialProbe | AgentProbe | ExecProbe | TcpProbe | HttpProbe | SettleProbe


AgentKind = Literal["templated", "qemu-ga"]
"""Which agent a guest has: ours, which is put into images that are built here, or QEMU's."""


class IdentitySpec(_Spec, frozen=True, kw_only=True):
    """By whom a clone is given its identity, how long it has to confirm it, and how exact its
    clock must be."""

    agent: AgentKind = "templated"
    timeout: Duration = "15s"
    clock_tolerance: Duration = "50ms"


class NetworkSpec(PolicyKeys, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which network a guest is on, its settings besides its own address, and its policy."""

    mode: Literal["daemon", "libvirt"] = "daemon"
    """The one of the daemon's configuration, or one of libvirt's."""
    name: Annotated[str, Meta(pattern=r"^[!-~]([ -~]{0,98}[!-~])?$(?!\n)")] | None = None
    """Of libvirt's network."""
    dns: Annotated[
        tuple[Annotated[str, Meta(pattern=r"^[0-9.]{7,15}$(?!\n)")], ...], Meta(max_length=8)
    ] = ()

    def __post_init__(self) -> None:
        if (self.mode == "libvirt") != (self.name is not None):
            raise ValueError("mode: libvirt and the name of a network go together")
        if self.mode == "libvirt" and self.any:
            raise ValueError(f"a network of libvirt has none of these keys: {', '.join(KEYS)}")


class PoolSpec(_Spec, frozen=True, kw_only=True):
    """How many VMs are kept ready ahead of requests; `templated pool set` overrides it."""

    standby: PoolSize = 0
    """Hypervisors that run and wait for their state."""
    warm: PoolSize = 0
    """VMs with their state loaded and their slot's identity, paused."""


class LimitSpec(_Spec, frozen=True, kw_only=True):
    """What each VM of a template may take of its host; what is left out has no limit."""

    memory: Size | None = None
    """All that it takes of the host's memory. The template's pages count once it writes them."""
    pids: Annotated[int, Meta(ge=1, le=100000)] | None = None
    """Threads and processes; at least LEAST_PIDS beside one for each virtual CPU."""
    cpus: Annotated[float, Meta(ge=0.01, le=1024)] | None = None
    """CPU time per time, from when the clone is up."""
    cpu_weight: Annotated[int, Meta(ge=1, le=10000)] | None = None
    """Its share of CPUs that others want as well; the usual is 100."""
    disk: Size | None = None
    """The most that disk layer 3 may come to take, at least 16MiB; without, as much as the image's
    disk has."""
    disk_read: Size | None = None
    """Bytes a second from the host's disk, as is `disk_write`."""
    disk_write: Size | None = None
    vms: Annotated[int, Meta(ge=1, le=60000)] | None = None
    """How many there may be of the template at once, members of its pools among them."""


LEAST_PIDS = 80
"""QEMU takes up to 64 threads for its disk (util/thread-pool.c), has some of its own, and ends when
it does not get one."""
_LEAST_DISK = 16 << 20


class TemplateSpec(_Spec, frozen=True, kw_only=True):
    """One file `NAME.yaml` in a template directory."""

    name: TemplateName
    description: str = ""
    image: ImageSpec = ImageSpec()
    hypervisor: Literal["qemu", "libvirt"] = "qemu"
    """Who starts its VMs: the daemon itself, or libvirt, which then shows them as domains."""
    machine: MachineSpec = MachineSpec()
    boot_timeout: Duration = "120s"
    start_timeout: Duration = "30s"
    probes: tuple[Probe, ...] = ()
    identity: IdentitySpec = IdentitySpec()
    network: NetworkSpec = NetworkSpec()
    limits: LimitSpec = LimitSpec()
    code: bool = False
    """VMs have a second, read-only disk for the code of a function."""
    pool: PoolSpec = PoolSpec()

    def __post_init__(self) -> None:
        least = LEAST_PIDS + self.machine.vcpus
        if self.limits.pids is not None and self.limits.pids < least:
            raise ValueError(f"limits.pids must be at least {least}, with these vcpus")
        if self.image.boots_itself:
            self._check_own_boot()
        elif self.identity.agent != "templated" or self.machine.firmware != "bios":
            raise ValueError(
                "identity.agent: qemu-ga and machine.firmware: uefi go with an image that boots "
                "itself (image.boot: disk, or image.path)"
            )
        if self.network.mode == "libvirt" and self.hypervisor != "libvirt":
            raise ValueError("network.mode: libvirt needs hypervisor: libvirt")
        if self.limits.disk is not None and size_bytes(self.limits.disk) < _LEAST_DISK:
            raise ValueError("limits.disk must be at least 16MiB")

    def hidden(self) -> TemplateSpec:
        """The same for who may not read what may be secret."""
        seed = self.image.seed
        return (
            self if seed is None else replace(self, image=replace(self.image, seed=seed.hidden()))
        )

    def _check_own_boot(self) -> None:
        what = "an image that boots itself (image.boot: disk, or image.path)"
        if self.machine.type != "q35":
            raise ValueError(f"{what} needs machine.type: q35")
        if self.identity.agent != "qemu-ga":
            raise ValueError(f"{what} has no file of ours: it needs identity.agent: qemu-ga")
        if self.machine.cmdline:
            raise ValueError(f"machine.cmdline has no use with {what}: its loader has its own")
        if self.code:
            raise ValueError(f"code: true needs our agent, which {what} has not")


_LATER: dict[type[Struct], tuple[str, ...]] = {
    TemplateSpec: ("hypervisor",),
    ImageSpec: ("path", "seed", "boot"),
    MachineSpec: ("firmware",),
    IdentitySpec: ("agent",),
    NetworkSpec: ("mode", "name", *KEYS),
}
"""Keys that came later: a version without them takes no file that has them."""


def stored(spec: TemplateSpec | ImageSpec) -> dict[str, Any]:
    """A spec as it is written into files, and digested: as ever, where it has nothing of later.

    What it was before goes on with it then, and an image keeps its digest.
    """
    return _stored(spec)


def _stored(part: Struct) -> dict[str, Any]:
    later, fields = _LATER.get(type(part), ()), {}
    for field in structs.fields(part):
        value = getattr(part, field.name)
        if field.name not in later or value != field.default:
            inner = type(value) in _LATER
            fields[field.name] = _stored(value) if inner else to_builtins(value)
    return fields
