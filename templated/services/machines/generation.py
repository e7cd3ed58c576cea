"""Generations on disk and in shm_dir: find, verify, describe, remove.

`Generation` is what the start path needs, read and checked once. On the path itself only stat(2)
runs: a file whose size, inode or modification time changed since is digested again.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import errno
import fcntl
import functools
import hashlib
import logging
import os
import secrets
import weakref
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from templated import failpoints
from templated.drivers.code.image import placeholder
from templated.drivers.host.files import Stamp, fsync, remove_directory, stamp
from templated.drivers.host.procfs import read_memory
from templated.drivers.hypervisor.base import Hardware, Hypervisor, SavedState
from templated.drivers.image.store import image_seed
from templated.errors import HostError, host_errors
from templated.model.generation import FileDigest, Manifest
from templated.model.limits import Limits
from templated.model.policy import template_group
from templated.model.spec import TemplateSpec, stored
from templated.model.units import seconds, size_bytes
from templated.services.machines.admission import Promise
from templated.services.machines.slots import GuestParts, Layer, OwnNetwork
from templated.services.machines.vm import require_space
from templated.services.places import Layout

log = logging.getLogger(__name__)
_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
MANIFEST_FORMAT = 3
"""2: the frozen agent takes its identity in one packed field."""
DISK, EMPTY, MANIFEST, MEMORY, STATE, VARIABLES = (
    "disk.qcow2",
    "empty.qcow2",
    "manifest.json",
    "memory",
    "state",
    "variables.fd",
)
_FROZEN = 0o444
_FLUSHED = 64 << 20
"""Bytes that are written to a disk at once: a sync of the journal may wait for all of them."""
_KEPT = (MEMORY, STATE)
"""The frozen files that shm_dir loses when the host boots."""


class Holder(enum.Enum):
    """Who can hold a lease."""

    CLONE = "clone"
    MEMBER = "member"


class Leases:
    """Who needs a generation's files: clones and pool members that map them, or are about to."""

    def __init__(self) -> None:
        self._held: Counter[Holder] = Counter()
        self.freed: Callable[[], Awaitable[None]] | None = None
        """Called when the last lease has ended; raises its errors to the caller who ended it."""

    def take(self, holder: Holder) -> Lease:
        """One more VM needs the files, until its lease ends."""
        self._held[holder] += 1
        return Lease(self, holder)

    def count(self, holder: Holder) -> int:
        """How many leases of this kind there are."""
        return self._held[holder]

    @property
    def free(self) -> bool:
        """Whether nobody needs the files."""
        return not self._held.total()

    async def give_back(self, holder: Holder) -> None:
        """Called by `Lease` alone. Raises as `freed` does; leaves the lease given back."""
        self._held[holder] -= 1
        if self.free and self.freed is not None:
            await self.freed()


@dataclass(eq=False)
class Lease:
    """One VM's hold on a generation's files."""

    _leases: Leases
    _holder: Holder
    _ended: bool = False

    async def end(self) -> None:
        """Give up the files. Idempotent. The last lease of a retired generation removes it.

        Raises HostError when that removal fails; leaves the lease ended.
        """
        if not self._ended:
            self._ended = True
            await self._leases.give_back(self._holder)


@dataclass(frozen=True)
class Terms:
    """A spec's settings for every start, parsed once: bounds in seconds, and the guest's DNS."""

    start_s: float
    boot_s: float
    identify_s: float
    clock_tolerance_s: float
    dns: tuple[str, ...]

    @classmethod
    def of(cls, spec: TemplateSpec) -> Terms:
        return cls(
            start_s=seconds(spec.start_timeout),
            boot_s=seconds(spec.boot_timeout),
            identify_s=seconds(spec.identity.timeout),
            clock_tolerance_s=seconds(spec.identity.clock_tolerance),
            dns=spec.network.dns,
        )

    @property
    def restored_s(self) -> float:
        """The bound on a whole start from a generation."""
        return self.start_s + self.identify_s

    @property
    def booted_s(self) -> float:
        """The bound on a whole start by a full boot."""
        return self.restored_s + self.boot_s


@dataclass
class Generation:
    """A frozen generation whose files were verified against its manifest."""

    manifest: Manifest
    directory: Path
    frozen: Path
    image: Path
    """Disk layer 1."""
    read_only_memory: bool
    """The hypervisor maps a file that it has opened for reading only. Otherwise clones get a
    sealed copy of the memory, which nobody can write: see `sealed_copy`."""
    placeholder: Path
    """The image behind the second disk, of VMs that have one, until they get a function's code."""
    leases: Leases = field(default_factory=Leases)
    stamps: dict[Path, Stamp] = field(default_factory=dict)
    _memory_fd: int | None = None

    @property
    def id(self) -> str:
        return self.manifest.id

    @property
    def memory(self) -> Path:
        return self.frozen / MEMORY

    @property
    def memory_fd(self) -> int:
        """What clones map, privately. Of a generation that was verified, and as long as it is."""
        assert self._memory_fd is not None
        return self._memory_fd

    @property
    def template(self) -> str:
        return self.manifest.template

    @functools.cached_property
    def code(self) -> Path | None:
        """What is behind the second disk at first; None: VMs have no such disk."""
        return self.placeholder if self.manifest.spec.code else None

    @property
    def lag(self) -> float:
        """Seconds that the guest ran after it set its clock's mark, before it was frozen."""
        return self.manifest.freeze_lag_s

    @property
    def own_network(self) -> OwnNetwork | None:
        """The network of libvirt that its VMs are on; None: the daemon's."""
        name, addresses = self.manifest.spec.network.name, self.manifest.addresses
        return OwnNetwork(name, addresses) if name is not None and addresses is not None else None

    @functools.cached_property
    def layer(self) -> Layer:
        """What slots are made from."""
        return Layer(
            self.id,
            self.directory / EMPTY,
            (self.directory / DISK, self.image),
            self.limits,
            Promise.of(self.manifest.spec),
            guest_parts(self.manifest.spec, self.image, self.directory / VARIABLES),
            self.own_network,
            (template_group(self.template),),
        )

    @functools.cached_property
    def limits(self) -> Limits:
        """What each VM may take of the host."""
        return Limits.of(self.manifest.spec)

    @functools.cached_property
    def terms(self) -> Terms:
        """Bounds and DNS of every start."""
        return Terms.of(self.manifest.spec)

    @functools.cached_property
    def hardware(self) -> Hardware:
        """The hardware that the template had, and every clone must have."""
        manifest = self.manifest
        return hardware(manifest.spec, manifest.accel, manifest.cpu, manifest.qemu.version)

    def state(self, transport: str) -> SavedState:
        """The saved device state; for the transport `fd` its file is opened by the caller."""
        return SavedState(self.frozen / STATE, transport)

    def files(self) -> dict[str, Path]:
        """The frozen files, by their names in the manifest."""
        names = {MEMORY: self.frozen, STATE: self.frozen, DISK: self.directory}
        if self.manifest.spec.machine.firmware == "uefi":
            names[VARIABLES] = self.directory
        return {name: directory / name for name, directory in names.items()}

    def changed(self) -> list[str]:
        """Names of frozen files that are not what was last verified. Costs one stat each."""
        return [name for name, path in self._paths.items() if stamp(path) != self.stamps[path]]

    @functools.cached_property
    def _paths(self) -> dict[str, Path]:
        # Joined once: it is asked on each start.
        return self.files()

    def runs_on(self) -> bool:
        """Whether the files that running VMs read are unchanged. Costs some stat calls.

        Running VMs read memory and disk; the saved state was read when they were restored.
        """
        return set(self.changed()) <= {STATE}

    def keep(self) -> None:
        """Keep memory and state on the disk as well, for the time after a reboot. Blocks.

        Holes stay holes. Raises HostError; leaves files that are removed with the generation.
        """
        for name in _KEPT:
            _copy_file(self.frozen / name, self.directory / name, durable=True)
        fsync(self.directory)

    def bring_back(self) -> None:
        """Put what shm_dir lacks of memory and state back there, as after a reboot. Blocks.

        `verify` then says whether it is what was frozen. Raises HostError when there is no room;
        leaves no file under its name then.
        """
        lost = [name for name in _KEPT if not (self.frozen / name).exists()]
        if not lost or not all((self.directory / name).exists() for name in lost):
            return
        needed = sum((self.directory / name).stat().st_size for name in lost)
        require_space(self.frozen.parents[1], needed, f"template {self.template}")
        log.info("bringing generation %s of %s back from the disk", self.id, self.template)
        self.frozen.mkdir(mode=0o700, parents=True, exist_ok=True)
        for name in lost:
            _copy_file(self.directory / name, self.frozen / name, durable=False)

    def mend(self) -> None:
        """Give a generation of an earlier version what it lacks. Blocks; raises nothing.

        The mode by which VMs with users of their own open it, and the copy on the disk.
        """
        try:
            for name in _KEPT:
                if (self.frozen / name).stat().st_mode & 0o777 != _FROZEN:
                    freeze_file(self.frozen / name)
            if not all((self.directory / name).exists() for name in _KEPT):
                self.keep()
        except (HostError, OSError) as error:
            log.warning("generation %s is not kept on the disk: %s", self.id, error)

    async def verify(self) -> None:
        """Digest all frozen files, in a thread.

        Raises HostError, which names the first file that is not as it was frozen.
        """
        for name, path in self.files().items():
            expected = self.manifest.files.get(name)
            if expected is None:
                raise _damaged(self, f"its manifest says nothing of {name}")
            before = stamp(path)
            if before is None:
                raise _damaged(self, f"{path} is missing")
            size = path.stat().st_size
            if size != expected.size:
                raise _damaged(self, f"{path} has {size} bytes, frozen were {expected.size}")
            content, opened = path, self._memory_fd
            if name == MEMORY and (opened is None or self._exchanged(opened)):
                # What will be mapped is what is digested, also when the file is exchanged.
                opened = await asyncio.to_thread(self._open_memory)
                content = Path(f"/proc/self/fd/{opened}")
            if (await digest_file(content)).sha256 != expected.sha256:
                raise _damaged(self, f"the content of {path} has changed since it was frozen")
            self.stamps[path], self._memory_fd = before, opened

    def _exchanged(self, opened: int) -> bool:
        """Whether the memory's file is another one now than that which clones map."""
        if not self.read_only_memory:
            return False
        try:
            return not os.path.samestat(os.stat(self.memory), os.fstat(opened))
        except OSError as error:
            raise _damaged(self, f"{self.memory}: {error.strerror}") from error

    def _open_memory(self) -> int:
        """What clones map; closed with the last reference to this generation. Blocks; HostError."""
        try:
            if self.read_only_memory:
                descriptor = os.open(self.memory, os.O_RDONLY | os.O_CLOEXEC)
            else:
                descriptor = sealed_copy(self.memory)
        except OSError as error:
            raise _damaged(self, f"{self.memory}: {error.strerror}") from error
        weakref.finalize(self, os.close, descriptor)
        return descriptor


def hardware(spec: TemplateSpec, accel: str, cpu: str, version: str) -> Hardware:
    """What all VMs of a template have; `version` is the hypervisor's."""
    machine = spec.machine
    return Hardware(
        type=machine.type,
        memory_bytes=size_bytes(machine.memory),
        vcpus=machine.vcpus,
        accel=accel,
        cpu=cpu,
        version=version,
        agent=spec.identity.agent,
        firmware=machine.firmware if spec.image.boots_itself else "",
        hypervisor=spec.hypervisor,
    )


def guest_parts(spec: TemplateSpec, image_disk: Path, variables: Path) -> GuestParts:
    """What the VMs of a template have beside their disk; `variables` is copied for each."""
    return GuestParts(
        seed=image_seed(image_disk) if spec.image.seed else None,
        variables=variables if spec.machine.firmware == "uefi" else None,
        host_keys=spec.identity.agent == "qemu-ga",
    )


def _damaged(generation: Generation, what: str) -> HostError:
    template = generation.manifest.template
    return HostError(
        f"generation {generation.id} of {template} cannot be used: {what}",
        hint=f"run: templated template build {template} (or: template rollback {template})",
    )


async def digest_file(path: Path) -> FileDigest:
    """Size and SHA-256 of a file. Raises HostError when it cannot be read."""

    def work() -> FileDigest:
        try:
            if failpoints.armed:
                failpoints.hit("generation.digest")
            with open(path, "rb") as content:
                digest = hashlib.file_digest(content, "sha256").hexdigest()
                return FileDigest(size=os.fstat(content.fileno()).st_size, sha256=digest)
        except OSError as error:
            raise HostError(f"cannot read {path}: {error.strerror}") from error

    return await asyncio.to_thread(work)


def sealed_copy(source: Path) -> int:
    """A descriptor of a copy in memory that nobody can write, root neither. Blocks; HostError.

    memfd_create(2), fcntl(2) "File sealing": QEMU before 8.2 opens the memory of a clone for
    writing, too, and a seal is what lets it and still holds. Holes stay holes.
    """
    try:
        if failpoints.armed:
            failpoints.hit("generation.seal")
        with open(source, "rb", buffering=0) as file:
            copy = os.memfd_create("templated-memory", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            try:
                status = os.fstat(file.fileno())
                _require_memory(source, status.st_blocks * 512)
                _copy_data(file.fileno(), copy, status.st_size)
                fcntl.fcntl(copy, fcntl.F_ADD_SEALS, _SEALS)
            except BaseException:
                os.close(copy)
                raise
    except OSError as error:
        raise HostError(
            f"cannot hold {source} in memory: {error.strerror}",
            hint="free some memory, or use QEMU 8.2 or later, which needs no copy",
        ) from error
    return copy


def _copy_file(source: Path, target: Path, *, durable: bool) -> None:
    """A read-only copy of a frozen file, as sparse as it is; whole, or not there.

    Raises HostError. Two may be at it side by side.
    """
    partial = target.with_name(f"{target.name}.{secrets.token_hex(4)}.part")
    try:
        if failpoints.armed:
            failpoints.hit("generation.copy")
        with open(source, "rb", buffering=0) as old, open(partial, "xb", buffering=0) as new:
            size = os.fstat(old.fileno()).st_size
            _copy_data(old.fileno(), new.fileno(), size, durable=durable)
        freeze_file(partial)
        partial.rename(target)
    except OSError as error:
        raise HostError(f"cannot copy {source} to {target}: {error.strerror}") from error
    finally:
        partial.unlink(missing_ok=True)


def renew(path: Path) -> None:
    """Put a read-only copy in a file's place, so that who has it open writes the old one.

    For what a VM wrote as a user whom others share, as libvirt's. Blocks. Raises HostError; leaves
    the old one then.
    """
    with host_errors(f"cannot take {path} back"):
        os.chown(path, os.geteuid(), os.getegid())
    _copy_file(path, path, durable=False)


def _require_memory(source: Path, needed: int) -> None:
    """The kernel gives what it has not got, and ends somebody for it later."""
    available = read_memory().available
    if needed > available:
        raise HostError(
            f"a copy of {source} needs {needed >> 20} MiB of memory, and {available >> 20} MiB "
            "are available",
            hint="free some memory, or use QEMU 8.2 or later, which needs no copy",
        )


def _copy_data(source: int, target: int, size: int, *, durable: bool = False) -> None:
    os.ftruncate(target, size)
    end = waiting = 0
    while end < size:
        try:
            begin = os.lseek(source, end, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # nothing but a hole follows
                break
            raise
        end = os.lseek(source, begin, os.SEEK_HOLE)
        os.lseek(target, begin, os.SEEK_SET)
        while begin < end:
            sent = os.sendfile(target, source, begin, min(end - begin, _FLUSHED))
            begin, waiting = begin + sent, waiting + sent
            if durable and waiting >= _FLUSHED:
                os.fdatasync(target)
                waiting = 0
    if durable:
        os.fsync(target)


def freeze_file(path: Path) -> None:
    """Make a file read-only for good.

    For all, since a VM with a user of its own opens what it inherits once more. Nobody else
    reaches it: the directories are their owner's alone.
    """
    if failpoints.armed:
        failpoints.hit("build.freeze")
    path.chmod(_FROZEN)


def read_manifest(directory: Path) -> Manifest:
    """The manifest of a generation; HostError, naming the field, when it is not one."""
    path = directory / MANIFEST
    try:
        if failpoints.armed:
            failpoints.hit("generation.read")
        manifest = msgspec.json.decode(path.read_bytes(), type=Manifest)
    except OSError as error:
        raise HostError(f"cannot read {path}: {error.strerror}") from error
    except (msgspec.ValidationError, msgspec.DecodeError) as error:
        raise HostError(f"{path} is damaged: {error}", hint="build the template again") from error
    if manifest.format != MANIFEST_FORMAT:
        raise HostError(
            f"{path} has format {manifest.format}, not {MANIFEST_FORMAT}",
            hint="build the template again",
        )
    return manifest


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write the manifest durably, under its name only when complete."""
    if failpoints.armed:
        failpoints.hit("build.manifest")
    partial = directory / (MANIFEST + ".part")
    with open(partial, "wb") as out:
        out.write(msgspec.json.format(msgspec.json.encode(_stored(manifest))) + b"\n")
        out.flush()
        if failpoints.armed:
            failpoints.hit("build.manifest-fsync")
        os.fsync(out.fileno())
    if failpoints.armed:
        failpoints.hit("build.manifest-rename")
    partial.rename(directory / MANIFEST)
    freeze_file(directory / MANIFEST)


def _stored(manifest: Manifest) -> dict[str, object]:
    """What is written: the version before reads it too, where it has nothing of this one."""
    fields = {**msgspec.to_builtins(manifest), "spec": stored(manifest.spec)}
    if manifest.addresses is None:
        del fields["addresses"]
    return fields


async def load(
    layout: Layout,
    hypervisor: Hypervisor,
    template: str,
    generation: str,
    leases: Leases | None = None,
) -> Generation:
    """Read and verify a generation, after a reboot of the host from what was kept on the disk.

    Raises HostError when it cannot be used; leaves what is there of it.
    """
    directory = layout.generation(template, generation)
    manifest = await asyncio.to_thread(read_manifest, directory)
    loaded = describe(layout, hypervisor, manifest, leases or Leases())
    await asyncio.to_thread(loaded.bring_back)
    await loaded.verify()
    await asyncio.to_thread(loaded.mend)
    if loaded.code is not None:
        await placeholder(layout.code)
    return loaded


def describe(
    layout: Layout, hypervisor: Hypervisor, manifest: Manifest, leases: Leases
) -> Generation:
    """A generation by its manifest; nothing is verified yet."""
    return Generation(
        manifest=manifest,
        directory=layout.generation(manifest.template, manifest.id),
        frozen=layout.frozen(manifest.template, manifest.id),
        image=layout.image_disk(manifest.image),
        read_only_memory=hypervisor.support(manifest.qemu.version).read_only_memory,
        placeholder=layout.placeholder,
        leases=leases,
    )


async def remove_files(layout: Layout, template: str, generation: str) -> None:
    """Delete everything of a generation. Clones that still map its memory keep their mapping.

    Raises HostError when a part cannot be deleted; leaves that part, and can be called again.
    """
    failed: HostError | None = None
    frozen = layout.frozen(template, generation)
    for directory in (frozen, layout.generation(template, generation)):
        try:
            await asyncio.to_thread(_remove, directory)
        except HostError as error:
            failed = error
    if failed is not None:
        raise failed


def _remove(directory: Path) -> None:
    remove_directory(directory)
    with contextlib.suppress(OSError):  # other generations of this template are there
        directory.parent.rmdir()
