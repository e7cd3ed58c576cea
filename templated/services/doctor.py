"""What this host can and cannot do. Every finding that is not good says how to fix it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from templated.drivers.cgroups import CONTROLLERS, offered
from templated.drivers.configfile import load_template, template_files
from templated.drivers.host.capabilities import may_raise_priority
from templated.drivers.host.programs import PACKAGES, find
from templated.drivers.hypervisor.base import Hypervisor
from templated.drivers.image.store import ImageStore
from templated.drivers.network.foreign import blockers, judged_between_ports
from templated.drivers.network.worker import in_namespace
from templated.errors import HostError, TemplatedError
from templated.model.config import Config
from templated.model.egress import LINK_PREFIXES
from templated.model.network import BridgeNetwork
from templated.services.daemon import make_hypervisor, uid_range, uids_problem
from templated.services.egress.egresses import PROGRAMS
from templated.services.findings import Check, Status
from templated.services.libvirt_checks import libvirt_checks
from templated.services.places import Layout

_MIN_SHM = 256 << 20
_MIN_DISK = 2 << 30
_MIN_FILES = 4096


def run_checks(config: Config) -> list[Check]:
    """All checks, in a fixed order. Takes at most some 130 s, when KVM has to be proven."""
    checks: list[Callable[[Config], Iterator[Check]]] = [
        _qemu,
        _confinement,
        _users,
        _groups,
        _landlock,
        _accelerator,
        _tools,
        _places,
        _shm,
        _disk,
        _hugepages,
        _network,
        _nftables,
        _egresses,
        _foreign_rules,
        _bridged_frames,
        _libvirt,
        _limits,
        _pressure,
        _priority,
        _templates,
    ]
    return [found for check in checks for found in check(config)]


def _qemu(config: Config) -> Iterator[Check]:
    hypervisor = make_hypervisor(config)
    try:
        version = asyncio.run(hypervisor.version()).version
    except HostError as error:
        yield Check("qemu", "FAIL", error.message, "apt install qemu-system-x86")
        return
    support = hypervisor.support(version)
    if not support.host:
        fix = f"use a QEMU that is proven: {support.proven}"
        yield Check("qemu", "WARN", f"{config.qemu} {version} is not one that is proven", fix)
    else:
        yield Check("qemu", "PASS", f"{config.qemu} {version}, proven as that of {support.host}")


def _confinement(config: Config) -> Iterator[Check]:
    if not config.confine:
        detail = "confine is false: VMs may do all that the daemon's user may"
        yield Check("confinement", "WARN", detail, "confine: true")
        return
    if problem := asyncio.run(make_hypervisor(config).confinement_problem()):
        fix = "use a QEMU that is built with seccomp, as Debian's is, or set confine: false"
        yield Check("confinement", "FAIL", problem, fix)
    elif config.restore.transport == "exec":
        detail = "with restore.transport: exec, VMs may start programs"
        yield Check("confinement", "WARN", detail, "restore: {transport: fd}")
    else:
        yield Check("confinement", "PASS", "QEMU filters its system calls, and starts no program")


def _users(config: Config) -> Iterator[Check]:
    problem = uids_problem(config, make_hypervisor(config))
    if not problem:
        detail = f"each VM runs as a user of its own, of {uid_range(config)}"
        yield Check("users", "PASS", detail)
        if lacking := make_hypervisor(config).file_limit_problem():
            detail = f"what VMs write to the disk may have no limit: {lacking}"
            yield Check(
                "files", "WARN", detail, "give the daemon CAP_SYS_RESOURCE, as the unit does"
            )
        return
    fix = "run the daemon as root with util-linux installed, and give it unused `uids`"
    yield Check("users", "WARN", f"VMs run as the daemon's user: {problem}", fix)


def _groups(config: Config) -> Iterator[Check]:
    """What the host offers: which group the daemon gets to divide, only its own log can say."""
    version, controllers = offered()
    missing = [name for name in CONTROLLERS if name not in controllers]
    if not config.confine:
        detail = "confine is false: VMs have no control groups"
        yield Check("control groups", "WARN", detail, "confine: true")
    elif missing:
        fix = "mount control groups with these controllers, such as those of version 2"
        detail = f"some limits of templates do not hold: no controller for {', '.join(missing)}"
        yield Check("control groups", "WARN", detail, fix)
    else:
        yield Check("control groups", "PASS", f"version {version}: {', '.join(controllers)}")


def _landlock(config: Config) -> Iterator[Check]:
    hypervisor = make_hypervisor(config)
    if uids_problem(config, hypervisor):
        fix = "see `users`"
        yield Check("landlock", "WARN", "only VMs with users of their own are under Landlock", fix)
    elif problem := hypervisor.landlock_problem():
        fix = "use util-linux 2.40 and Linux 6.2 or newer, as Debian 13 does, with Landlock enabled"
        detail = f"VMs may open what every user of this host may: {problem}"
        yield Check("landlock", "WARN", detail, fix)
    else:
        yield Check("landlock", "PASS", "VMs open only QEMU's own files, by Landlock")


def _accelerator(config: Config) -> Iterator[Check]:
    """Check by running a guest: that /dev/kvm is there proves nothing."""
    hypervisor = make_hypervisor(config)
    if config.accel == "tcg":
        yield Check("accelerator", "PASS", "tcg, as configured")
    elif reason := hypervisor.kvm_problem():
        status: Status = "FAIL" if config.accel == "kvm" else "WARN"
        fix = "enable virtualisation, modprobe kvm_intel or kvm_amd, and join the group kvm"
        yield Check("accelerator", status, f"{reason}: guests run under TCG, slower", fix)
    else:
        yield _kvm_proof(config, hypervisor)
    if config.accel != "kvm" and (problem := hypervisor.clock_problem("tcg")):
        yield Check("clock", "WARN", problem, "boot a host kernel with a constant TSC, or use KVM")


def _kvm_proof(config: Config, hypervisor: Hypervisor) -> Check:
    try:
        asyncio.run(hypervisor.version())
        proof = hypervisor.remembered_proof()
        if proof is None and (kernel := ImageStore(Path(config.state_dir)).any_kernel()):
            proof = asyncio.run(hypervisor.prove_kvm(*kernel))
    except (TemplatedError, OSError) as error:
        return Check("accelerator", "WARN", f"KVM could not be proven: {error}", "see `qemu`")
    if proof is None:
        detail = "/dev/kvm opens; that a guest runs is proven at the first build"
        return Check("accelerator", "WARN", detail, "templated template build NAME")
    if proof.works:
        return Check("accelerator", "PASS", f"kvm: {proof.detail}")
    status: Status = "FAIL" if config.accel == "kvm" else "WARN"
    fix = "set accel: tcg to silence this, or use a host whose KVM runs guests; "
    fix += f"to prove it again: rm {Layout(config).kvm_proof}"
    return Check("accelerator", status, f"KVM does not run a guest: {proof.detail}", fix)


def _tools(config: Config) -> Iterator[Check]:
    packages = {
        "qemu-img": "qemu-utils",
        "mmdebstrap": "mmdebstrap",
        "mkfs.ext4": "e2fsprogs",
        "mkfs.erofs": "erofs-utils",
        "mkfs.vfat": "dosfstools",
        "mcopy": "mtools",
        "ssh-keygen": "openssh-client",
    }
    for tool, package in packages.items():
        found = shutil.which(tool, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
        if found:
            yield Check(tool, "PASS", found)
        else:
            yield Check(tool, "FAIL", "not installed", f"apt install {package}")


def _places(config: Config) -> Iterator[Check]:
    for key in ("state_dir", "runtime_dir", "shm_dir"):
        path = Path(getattr(config, key))
        existing = next(p for p in (path, *path.parents) if p.exists())
        if not os.access(existing, os.W_OK | os.X_OK):
            fix = f"run as root, or set {key} to a place of your own"
            yield Check(key, "FAIL", f"{existing} is not writable for uid {os.geteuid()}", fix)
        elif path.exists() and path.stat().st_uid != os.geteuid():
            fix = "run as that user, or choose another place"
            yield Check(key, "FAIL", f"{path} belongs to uid {path.stat().st_uid}", fix)
        else:
            yield Check(key, "PASS", str(path))


def _shm(config: Config) -> Iterator[Check]:
    size, free, kind = _space(config.shm_dir)
    detail = f"{free >> 20} of {size >> 20} MiB free"
    fix = "mount -o remount,size=80% /dev/shm"
    if kind not in ("tmpfs", "ramfs", "hugetlbfs"):
        fix = "put shm_dir on a tmpfs, such as /dev/shm"
        yield Check("shm", "WARN", f"{config.shm_dir} lies on {kind}, not in memory", fix)
    elif free < _MIN_SHM:
        yield Check("shm", "FAIL", detail + ", a template needs its memory in it", fix)
    else:
        yield Check("shm", "PASS", detail)


def _disk(config: Config) -> Iterator[Check]:
    _, free, _ = _space(config.state_dir)
    detail = f"{free >> 20} MiB free for images and disk layers"
    if free < _MIN_DISK:
        yield Check("disk", "WARN", detail, "free some space, or set state_dir elsewhere")
    else:
        yield Check("disk", "PASS", detail)


def _space(directory: str) -> tuple[int, int, str]:
    """Size and free bytes of a directory's file system, and its type."""
    path = Path(directory)
    existing = next(p for p in (path, *path.parents) if p.exists())
    status = os.statvfs(existing)
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    over = [m for m in mounts if existing.is_relative_to(m[1].encode().decode("unicode_escape"))]
    kind = max(over, key=lambda m: len(m[1]))[2] if over else "unknown"
    return status.f_blocks * status.f_frsize, status.f_bavail * status.f_frsize, kind


def _hugepages(config: Config) -> Iterator[Check]:
    path = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
    try:
        chosen = path.read_text().split("[")[1].split("]")[0]
    except (OSError, IndexError):
        yield Check("hugepages", "PASS", "not offered by this kernel")
        return
    if chosen in ("always", "force"):
        fix = f"echo advise > {path}"
        detail = f"shmem_enabled is {chosen}: a clone that writes one byte copies 2 MiB"
        yield Check("hugepages", "WARN", detail, fix)
    else:
        yield Check("hugepages", "PASS", f"shmem_enabled is {chosen}")


def _network(config: Config) -> Iterator[Check]:
    if not isinstance(config.network, BridgeNetwork):
        yield Check("network", "PASS", f"user mode, {config.network.subnet}")
    elif os.geteuid() != 0:
        fix = "run as root, or set network: {mode: user}"
        yield Check("network", "FAIL", "bridge mode needs CAP_NET_ADMIN", fix)
    elif not Path("/dev/net/tun").exists():
        yield Check("network", "FAIL", "/dev/net/tun is missing", "modprobe tun")
    else:
        detail = f"bridge {config.network.bridge}, {config.network.subnet}"
        yield Check("network", "PASS", detail)


def _nftables(config: Config) -> Iterator[Check]:
    network = config.network
    needed = isinstance(network, BridgeNetwork) and (network.nat or network.antispoof)
    found = find("nft")
    if found:
        yield Check("nftables", "PASS", found)
    else:
        detail = "nft is not installed" + ("" if needed else "; nat and antispoof need it")
        yield Check("nftables", "FAIL" if needed else "WARN", detail, "apt install nftables")


def _egresses(config: Config) -> Iterator[Check]:
    """What forwarders of egresses are made of; nobody needs it who has none."""
    network = config.network
    if not isinstance(network, BridgeNetwork) or not network.host_address:
        return
    lacking = [program for program in PROGRAMS if find(program) is None]
    if lacking:
        detail = f"{' and '.join(lacking)} not installed: no egress can be made"
        packages = " ".join(PACKAGES[program] for program in lacking)
        yield Check("egresses", "WARN", detail, f"apt install {packages}")
    else:
        yield Check("egresses", "PASS", "keepalived and conntrackd are installed")


def _foreign_rules(config: Config) -> Iterator[Check]:
    """Whether rules of others drop what clones send by the host: ours pass nothing for them."""
    network = config.network
    if not isinstance(network, BridgeNetwork) or not network.host_address or os.geteuid() != 0:
        return
    try:
        found = in_namespace(network.netns, lambda: blockers(network.bridge))
    except (OSError, HostError) as error:
        yield Check("foreign rules", "WARN", f"cannot be read: {error}", "nft list ruleset")
        return
    for one in found:
        whose = f", which is {one.owner}'s," if one.owner else ""
        detail = f"{one.chain}{whose} drops what clones send by the host"
        yield Check("foreign rules", "WARN", detail, one.fix)
    if not found:
        yield Check("foreign rules", "PASS", "none drops what clones send by the host")


def _bridged_frames(config: Config) -> Iterator[Check]:
    """Whether such rules also cut forwarders of egresses off from each other: both would send."""
    network = config.network
    if not isinstance(network, BridgeNetwork) or not network.host_address or os.geteuid() != 0:
        return

    def look() -> set[str]:
        found = (
            [blockers(f"{prefix}+") for prefix in LINK_PREFIXES] if judged_between_ports() else []
        )
        return {one.chain for some in found for one in some}

    name = "br_netfilter"
    try:
        chains = in_namespace(network.netns, look)
    except (OSError, HostError) as error:
        yield Check(name, "WARN", f"rules cannot be read: {error}", "nft list ruleset")
        return
    if chains:
        key = "net.bridge.bridge-nf-call-iptables"
        detail = f"{key} is 1: {' and '.join(sorted(chains))} drops what forwarders send each other"
        rules = "; ".join(f"iptables -I FORWARD -i {one}+ -j ACCEPT" for one in LINK_PREFIXES)
        yield Check(name, "WARN", detail, f"sysctl -w {key}=0, or {rules}")
    else:
        yield Check(name, "PASS", "no rule drops what stays on a bridge")


def _libvirt(config: Config) -> Iterator[Check]:
    yield from libvirt_checks(
        needed=_needs_libvirt(config), kvm=config.accel == "kvm", uri=config.libvirt.uri
    )


def _needs_libvirt(config: Config) -> bool:
    """Whether a template runs on it. One that is broken is reported as such elsewhere."""
    for name in template_files(config.template_dirs):
        with contextlib.suppress(TemplatedError):
            spec = load_template(config.template_dirs, name)
            if spec.hypervisor == "libvirt":
                return True
    return False


def _limits(config: Config) -> Iterator[Check]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # A clone costs the daemon its pidfd and two sockets.
    if hard != resource.RLIM_INFINITY and hard < _MIN_FILES:
        fix = "LimitNOFILE=65536 in the unit, or ulimit -Hn"
        yield Check(
            "limits",
            "WARN",
            f"at most {hard} open files: about {hard // 4} clones",
            fix,
        )
    else:
        yield Check("limits", "PASS", f"open files: {soft} now, up to {hard}")


def _priority(config: Config) -> Iterator[Check]:
    if may_raise_priority():
        yield Check("priority", "PASS", "members of pools are made at the lowest priority")
    else:
        fix = "run the daemon with CAP_SYS_NICE, or with LimitNICE=20 (a nice of 0)"
        detail = "members of pools are made at the usual priority, beside requests"
        yield Check("priority", "WARN", detail, fix)


def _pressure(config: Config) -> Iterator[Check]:
    if Path("/proc/pressure/memory").exists():
        yield Check("pressure", "PASS", "/proc/pressure is there")
    else:
        yield Check("pressure", "WARN", "no /proc/pressure", "boot the host with psi=1")


def _templates(config: Config) -> Iterator[Check]:
    files = template_files(config.template_dirs)
    if not files:
        fix = "put a template into " + " or ".join(config.template_dirs)
        yield Check("templates", "WARN", "there is none", fix)
    for name, path in files.items():
        try:
            load_template(config.template_dirs, name)
        except TemplatedError as error:
            yield Check(f"template {name}", "FAIL", error.message, f"edit {path}")
        else:
            yield Check(f"template {name}", "PASS", str(path))
