"""The settings in `templated.yaml`, and the default places of files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from msgspec import Meta, Struct

from templated.model.access import Right, Role
from templated.model.network import BridgeNetwork, Subnet, UserNetwork, parse_subnet
from templated.model.socket import SOCKET, default_runtime
from templated.model.spec import Percent
from templated.model.uids import UidRange
from templated.model.units import Duration, Size, seconds, size_bytes

AbsolutePath = Annotated[str, Meta(pattern=r"^/[^\0]{0,4000}$(?!\n)")]


class _Section(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of all sections: immutable, and a key it does not know is an error."""


class MetricsConfig(_Section, frozen=True, kw_only=True):
    """Where Prometheus scrapes."""

    listen: Annotated[str, Meta(pattern=r"^[0-9A-Za-z.:\[\]-]{0,260}:[0-9]{1,5}$(?!\n)")] = (
        "127.0.0.1:9177"
    )


class RestoreConfig(_Section, frozen=True, kw_only=True):
    """How device state reaches a clone: a descriptor that QEMU inherits, or `exec:cat FILE`."""

    transport: Literal["exec", "fd"] = "fd"


class LibvirtConfig(_Section, frozen=True, kw_only=True):
    """Where VMs of templates with `hypervisor: libvirt` are started. Connected to when needed."""

    uri: Annotated[
        str, Meta(pattern=r"^qemu(\+unix)?:///(system|session)(\?socket=/[ -~]{1,200})?$(?!\n)")
    ] = "qemu:///system"
    """Of this host: VMs are handed descriptors."""


class SocketConfig(_Section, frozen=True, kw_only=True):
    """Who may connect to the daemon; `access` says what they may do then."""

    mode: Annotated[str, Meta(pattern=r"^0?[0-7]{3}$(?!\n)")] = "0660"
    group: str | None = None


class AccessRule(_Section, frozen=True, kw_only=True):
    """Gives a role to one user, by uid or name, or to the members of a group."""

    role: Role
    uid: Annotated[int, Meta(ge=0, lt=2**32 - 1)] | None = None
    user: str | None = None
    group: str | None = None
    rights: tuple[Right, ...] | None = None
    """In place of those of the role: an operator has `exec` and `copy`, a viewer has none."""

    def __post_init__(self) -> None:
        if sum(value is not None for value in (self.uid, self.user, self.group)) != 1:
            raise ValueError("a rule has one of uid, user and group")
        if self.role is Role.ADMIN and self.rights is not None:
            raise ValueError("an admin has all rights; leave out `rights`")


class AccessConfig(_Section, frozen=True, kw_only=True):
    """What callers may do. Root and the daemon's own user are admins; others need a rule."""

    roles: tuple[AccessRule, ...]


class AuditConfig(_Section, frozen=True, kw_only=True):
    """The log of who changed what. At most two files of `size` are kept."""

    size: Size = "8MiB"

    def __post_init__(self) -> None:
        if size_bytes(self.size) < 64 << 10:
            raise ValueError("size must be at least 64KiB")


class SlotConfig(_Section, frozen=True, kw_only=True):
    """How many slots per template are kept ready ahead of requests."""

    ready: Annotated[int, Meta(ge=0, le=1024)] = 4


class PressureConfig(_Section, frozen=True, kw_only=True):
    """The host's pressure (`some`, percent of the last 10 s) at which pools are not refilled."""

    cpu: Percent = 80.0
    memory: Percent = 10.0
    io: Percent = 80.0


class PoolConfig(_Section, frozen=True, kw_only=True):
    """How pools are refilled; their sizes are in the templates."""

    concurrent_refills: Annotated[int, Meta(ge=1, le=64)] | None = None
    """Members made at once; None: half of the host's CPUs."""
    max_age: Duration = "360m"
    """The age at which a warm member is replaced."""
    check_interval: Duration = "30s"
    """How often waiting members are checked."""
    pressure: PressureConfig = PressureConfig()

    def __post_init__(self) -> None:
        for name in ("max_age", "check_interval"):
            if seconds(getattr(self, name)) < 1:
                raise ValueError(f"{name} must be at least 1s")


class LimitConfig(_Section, frozen=True, kw_only=True):
    """Bounds on concurrent work, and on what VMs are promised."""

    concurrent_starts: Annotated[int, Meta(ge=1, le=1024)] = 8
    clones: Annotated[int, Meta(ge=1, le=60000)] = 10000
    memory: Size | None = None
    """What all VMs together may come to use; each counts with its template's limits.memory, or
    else with the guest's memory. None: as much as there is, which clones share."""
    disk: Size | None = None
    """The same of the disk, by limits.disk or the size of the image."""
    stall: Duration = "60s"
    """How long a call of the host may take that should take none: the journal, files, netlink."""

    def __post_init__(self) -> None:
        if seconds(self.stall) < 1:
            raise ValueError("stall must be at least 1s")


class StoreConfig(_Section, frozen=True, kw_only=True):
    """The zone's store of code: any that speaks S3."""

    url: Annotated[str, Meta(pattern=r"^s3://[a-z0-9][a-z0-9.-]{1,62}(/[!-~]{0,200})?$(?!\n)")]
    """Bucket and prefix, as in s3://bucket/prefix."""
    endpoint: Annotated[str, Meta(pattern=r"^https?://[!-~]{1,300}$(?!\n)")] | None = None
    """None: Amazon's own."""
    region: Annotated[str, Meta(pattern=r"^[a-z0-9-]{1,64}$(?!\n)")] = "us-east-1"
    access_key: Annotated[str, Meta(pattern=r"^[!-~]{1,128}$(?!\n)")] | None = None
    """None: anonymous, or what the environment of the daemon says (AWS_ACCESS_KEY_ID)."""
    secret_file: AbsolutePath | None = None
    """A file with the secret key alone, that only the daemon's user can read."""
    timeout: Duration = "30s"
    """How long one object may take."""
    parallel: Annotated[int, Meta(ge=1, le=64)] = 8
    """Objects that are sent or fetched at once."""


class CodeConfig(_Section, frozen=True, kw_only=True):
    """Where the code of functions is kept: on this node, and in the zone."""

    cache_size: Size = "10GiB"
    """What code nobody needs at present may take of the disk, together with what is needed."""
    store: StoreConfig | None = None


class FunctionConfig(_Section, frozen=True, kw_only=True):
    """Bounds on functions, and how long their instances stay."""

    concurrency: Annotated[int, Meta(ge=1, le=10000)] = 100
    """Requests that run at once, of all functions; each takes an instance. What is reserved for
    single functions is taken from it, and these are refused what goes beyond."""
    queue: Annotated[int, Meta(ge=0, le=100000)] = 1000
    """Requests of one function that wait for their turn while that many run."""
    init_timeout: Duration = "10s"
    freeze_after: Duration = "1s"
    """How long an instance without a request runs on before it is paused."""
    keep_alive: Duration = "10m"
    """How long an instance without a request stays."""
    log_size: Size = "4MiB"
    """What the log of one function may take; two files of half that size are kept."""


class ScalingConfig(_Section, frozen=True, kw_only=True):
    """How many instances of functions are kept ready; what of it is learned lies in state_dir."""

    enabled: bool = True
    """False: instances are started when requests wait, and stay for functions.keep_alive."""
    memory: Size | None = None
    """What all instances that are kept may take; None: no bound."""
    price: Annotated[float, Meta(ge=0, le=1000)] = 0.16
    """What a GiB kept for a minute has to earn: the chance to avoid a cold start."""
    buffer_share: Annotated[float, Meta(ge=0, le=10)] = 0.2
    """Instances in reserve, as a share of the demand, rounded."""
    buffer_floor: Annotated[int, Meta(ge=0, le=1000)] = 0
    """Instances in reserve of a function with demand, at least."""
    window: Duration = "60s"
    """Of which the mean demand is followed, or that of a tenth of it while it is more."""
    pools: bool = True
    """Warm pools of templates that have no sizes of their own follow what functions need."""
    cool_down: Duration = "5m"
    """How long surplus of a function stays that was busy all the time; of others shorter."""

    def __post_init__(self) -> None:
        if not 6 <= seconds(self.window) <= 60:
            raise ValueError("window must be at least 6s and at most 60s")


class GatewayKey(_Section, frozen=True, kw_only=True):
    """An access key by which requests to the gateway are signed."""

    id: Annotated[str, Meta(pattern=r"^[A-Za-z0-9_]{3,128}$(?!\n)")]
    secret: Annotated[str, Meta(pattern=r"^[!-~]{8,256}$(?!\n)")] | None = None
    secret_file: AbsolutePath | None = None
    """In place of `secret`: a file with it alone, that only the daemon's user can read."""
    role: Role = Role.ADMIN
    """A viewer reads, an operator invokes, too, an admin changes functions."""

    def __post_init__(self) -> None:
        if (self.secret is None) == (self.secret_file is None):
            raise ValueError("a key has one of secret and secret_file")


class GatewayConfig(_Section, frozen=True, kw_only=True):
    """Lambda's API over TCP. Without a key nothing listens."""

    listen: Annotated[str, Meta(pattern=r"^[0-9A-Za-z.:\[\]-]{0,260}:[0-9]{1,5}$(?!\n)")] = (
        "127.0.0.1:9178"
    )
    region: Annotated[str, Meta(pattern=r"^[a-z0-9-]{1,64}$(?!\n)")] = "us-east-1"
    account: Annotated[str, Meta(pattern=r"^[0-9]{12}$(?!\n)")] = "000000000000"
    """Both only go into ARNs, and the region into signatures."""
    keys: tuple[GatewayKey, ...] = ()


class EgressConfig(_Section, frozen=True, kw_only=True):
    """What named ways out of the host share; they are made by `templated egress create`."""

    links: Subnet = "100.127.0.0/16"
    """Addresses between this host and forwarders, which nobody else sees: a /28 for each egress."""

    quiet: Duration = "60s"
    """For so long fewer lanes must have been enough before one takes no new flows any more."""
    drain: Duration = "60m"
    """For so long a lane that takes no new flows waits for the end of those that it has."""

    def __post_init__(self) -> None:
        if parse_subnet(self.links).prefixlen > 26:
            raise ValueError("links must have room for a few /28: at most /26")


class Config(_Section, frozen=True, kw_only=True):
    """The daemon's configuration; every key has a default (see `defaults`)."""

    state_dir: AbsolutePath
    runtime_dir: AbsolutePath
    shm_dir: AbsolutePath
    template_dirs: tuple[AbsolutePath, ...]
    socket: AbsolutePath
    socket_access: SocketConfig = SocketConfig()
    access: AccessConfig | None = None
    """None: whoever can connect is an admin."""
    audit: AuditConfig | None = AuditConfig()
    metrics: MetricsConfig | None = MetricsConfig()
    accel: Literal["auto", "kvm", "tcg"] = "auto"
    qemu: str = "qemu-system-x86_64"
    network: UserNetwork | BridgeNetwork = UserNetwork()
    restore: RestoreConfig = RestoreConfig()
    libvirt: LibvirtConfig = LibvirtConfig()
    confine: bool = True
    """Take from hypervisors what they do not need; false exists to compare with."""
    uids: UidRange | None = None
    """Who VMs run as, when the daemon is root; None: a range that follows from state_dir."""
    slots: SlotConfig = SlotConfig()
    pools: PoolConfig = PoolConfig()
    limits: LimitConfig = LimitConfig()
    code: CodeConfig = CodeConfig()
    functions: FunctionConfig = FunctionConfig()
    scaling: ScalingConfig = ScalingConfig()
    egress: EgressConfig = EgressConfig()
    gateway: GatewayConfig | None = GatewayConfig()


SYSTEM_CONFIG = Path("/etc/templated/templated.yaml")


def default_config_path(env: Mapping[str, str], uid: int) -> Path:
    """Where `serve` looks when no `--config` is given."""
    if uid == 0:
        return SYSTEM_CONFIG
    return _xdg(env, "XDG_CONFIG_HOME", ".config") / "templated/templated.yaml"


def defaults(env: Mapping[str, str], uid: int) -> dict[str, object]:
    """The places for root, or those of the XDG Base Directory Specification for anyone else."""
    if uid == 0:
        state = Path("/var/lib/templated")
        shm, templates = Path("/dev/shm/templated"), Path("/etc/templated/templates")
    else:
        state = _xdg(env, "XDG_STATE_HOME", ".local/state") / "templated"
        shm = Path(f"/dev/shm/templated-{uid}")
        templates = _xdg(env, "XDG_CONFIG_HOME", ".config") / "templated/templates"
    runtime = default_runtime(env, uid)
    return {
        "state_dir": str(state),
        "runtime_dir": runtime,
        "shm_dir": str(shm),
        "template_dirs": [str(templates)],
        "socket": f"{runtime}/{SOCKET}",
    }


def _xdg(env: Mapping[str, str], variable: str, fallback: str) -> Path:
    return Path(env.get(variable) or Path(env.get("HOME") or "/") / fallback)
