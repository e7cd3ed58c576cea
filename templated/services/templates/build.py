"""One build of a template: boot the base VM, probe it, freeze it, prove it by a canary.

The build works in directories that nothing else uses. After a failure only these must be removed;
the previous generation serves all the while.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import socket
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from templated import failpoints
from templated.drivers import disk
from templated.drivers.cgroups import ControlGroups
from templated.drivers.code.image import placeholder
from templated.drivers.host.files import fsync
from templated.drivers.hypervisor.base import Hardware, Kernel, Launch, OwnLoader
from templated.drivers.image.store import Image, image_digest, lacks_rights
from templated.errors import BuildError, HostError, TemplatedError
from templated.journal import now
from templated.model.generation import Manifest, ProbeResult, QemuVersion
from templated.model.limits import UNLIMITED, Limits
from templated.model.network import BridgeNetwork, Forward
from templated.model.spec import SerialProbe, TemplateSpec
from templated.services.context import Context
from templated.services.machines import generation as generations
from templated.services.machines.boot import full_boot, image_overlay, image_parts
from templated.services.machines.clock import PhaseClock
from templated.services.machines.generation import (
    Generation,
    Leases,
    Terms,
    digest_file,
    freeze_file,
    renew,
)
from templated.services.machines.slots import Layer, OwnNetwork, PreparedSlot
from templated.services.machines.vm import Vm, require_space, tail
from templated.services.reports.operations import Progress
from templated.services.templates.probes import Target, forwarded_ports, run_probes
from templated.timing import within

_SAVE_TIMEOUT = 120.0
_QUIT_TIMEOUT = 30.0
_REHEARSAL_TIMEOUT = 60.0
_QUIESCE_TIMEOUT = 60.0
_SETTLE = 0.5
_HINT = "the console lines show how far the guest got; see boot_timeout and the hooks of the image"
# What QEMU and the state need beside the guest's memory.
_SHM_SLACK = 16 << 20


def new_generation_id() -> str:
    """Sortable by time, distinct within a second."""
    return f"{datetime.now(UTC):%Y%m%dt%H%M%S}-{secrets.token_hex(3)}"


class Build:
    """One build, from its spec to a proven generation. `run` does it, once."""

    def __init__(self, context: Context, spec: TemplateSpec, progress: Progress) -> None:
        self.context = context
        self.spec = spec
        self.progress = progress
        self.id = new_generation_id()
        self.directory = context.layout.generation(spec.name, self.id)
        self.frozen = context.layout.frozen(spec.name, self.id)
        self.phases_s: dict[str, float] = {}
        self.clone_bytes = 0
        self._own: OwnNetwork | None = None

    async def run(self) -> Generation:
        """Build and prove, once.

        Raises BuildError, ProbeError or HostError; leaves the build's files and its row, which
        `discard` removes, but no VM and no slot.
        """
        await self.context.journal.new_generation(self.id, self.spec.name)
        try:
            return await self._run()
        except OSError as error:
            raise HostError(f"the build cannot write its files: {error}") from error
        finally:
            for name, seconds in self.phases_s.items():
                self.context.metrics.build_seconds.labels(self.spec.name, name).observe(seconds)

    async def discard(self) -> None:
        """Remove everything of a build that failed. Raises HostError; may be called again then."""
        await generations.remove_files(self.context.layout, self.spec.name, self.id)
        await self.context.journal.drop_generation(self.id)

    async def _run(self) -> Generation:
        qemu = await self.context.hypervisor.version()
        with self._phase("image"):
            self._require_rights()
            image = await self.context.images.ensure(self.spec.image, on_progress=self.progress.log)
        with self._phase("accelerator"):
            hardware = await self._hardware(image, qemu)
        self.progress.log(f"accelerator: {hardware.accel}")
        if self.spec.code:
            await placeholder(self.context.layout.code)
        groups = self.context.groups
        if self.spec.hypervisor == "libvirt":
            groups = ControlGroups("libvirt keeps its VMs in groups of its own")
        for name in groups.missing(Limits.of(self.spec)):
            why = groups.problem or "the host does not offer it"
            self.progress.log(f"warning: limits.{name} will not hold: {why}")
        memory = hardware.memory_bytes + _SHM_SLACK
        require_space(self.context.layout.shm, memory, f"template {self.spec.name}")
        if failpoints.armed:
            failpoints.hit("build.mkdir")
        self.directory.mkdir(mode=0o700, parents=True)
        self.frozen.mkdir(mode=0o700, parents=True)
        manifest = await self._base(image, hardware, qemu)
        context = self.context
        generation = generations.describe(context.layout, context.hypervisor, manifest, Leases())
        if failpoints.armed:
            failpoints.hit("build.frozen")
        with self._phase("digest"):
            manifest = await self._seal(manifest)
            generation.manifest = manifest
            await generation.verify()
        with self._phase("canary"):
            canary = await self._canary(generation)
        if failpoints.armed:
            failpoints.hit("build.proven")
        with self._phase("keep"):
            await asyncio.to_thread(generation.keep)
        generation.manifest = _with(
            manifest, canary_probes=canary, phases_s=self.phases_s, clone_bytes=self.clone_bytes
        )
        await asyncio.to_thread(generations.write_manifest, self.directory, generation.manifest)
        return generation

    def _require_rights(self) -> None:
        if self.spec.image.path is not None or not lacks_rights():  # a copy needs none
            return
        present = self.context.images.get(image_digest(self.spec.image))
        if present is None:
            raise HostError(
                f"the image of {self.spec.name} is missing, and this daemon has not the rights "
                "to make images",
                hint=f"run: systemctl start templated-image@{self.spec.name}",
            )

    async def _hardware(self, image: Image, qemu: QemuVersion) -> Hardware:
        accel = await self.context.host.accelerator(image)
        cpu = self.context.hypervisor.cpu(accel)
        return generations.hardware(self.spec, accel, cpu, qemu.version)

    async def _base(self, image: Image, hardware: Hardware, qemu: QemuVersion) -> Manifest:
        """Boot, probe and freeze the base VM."""
        boot = full_boot(self.context.hypervisor, image, self.spec, hardware.accel)
        empty = await image_overlay(self.context.layout, image)
        memory = self.frozen / generations.MEMORY
        guest = image_parts(self.context.hypervisor, image, self.spec)
        self._own = await self._own_network()
        layer = Layer(self.id, empty, (image.disk,), guest=guest, own_network=self._own)
        async with self._slot(layer) as prepared, _memory_file(memory) as descriptor:
            forwards, ports = self._forwards()
            code = self.context.layout.placeholder if self.spec.code else None
            launch = self.context.starter.launch(
                prepared, hardware, self.spec.name, forwards=forwards, code=code
            )
            opened = {**launch.opened, memory: descriptor}
            launch = replace(launch, memory=memory, memory_shared=True, opened=opened)
            async with self._tail_on_failure(prepared):
                with self._phase("boot"):
                    vm = await self._boot(prepared, launch, boot)
                if failpoints.armed:
                    failpoints.hit("build.booted")
                with self._phase("probes"):
                    probes = await self._probe(vm, ports)
                with self._phase("freeze"):
                    lag = await self._freeze(vm)
            if failpoints.armed:
                failpoints.hit("build.disk")
            prepared.overlay.rename(self.directory / generations.DISK)
            if prepared.guest.variables is not None:
                prepared.guest.variables.rename(self.directory / generations.VARIABLES)
        return self._manifest(image, replace(launch, boot=boot), qemu, probes, lag)

    async def _boot(self, prepared: PreparedSlot, launch: Launch, boot: Kernel | OwnLoader) -> Vm:
        terms = Terms.of(self.spec)
        # What cloud-init installs comes by the network. This is no clone: its MAC is its own.
        linked = self.spec.image.seed is not None
        async with within(terms.booted_s, "its start", hint=_HINT):
            return await self.context.starter.boot(
                prepared, launch, boot, terms, self.spec.name, PhaseClock(), linked=linked
            )

    async def _probe(
        self, vm: Vm, ports: dict[int, tuple[str, int]], *, canary: bool = False
    ) -> tuple[ProbeResult, ...]:
        if self._reaches_guests:
            ports = {port: (vm.slot.ip, port) for port in ports}
        # A console does not show its boot messages again after a restore.
        probes = [p for p in self.spec.probes if not (canary and isinstance(p, SerialProbe))]
        results = await run_probes(Target(vm, ports), probes, self.progress.probe)
        for result in () if canary else results:
            label = self.context.metrics.probe_seconds.labels(self.spec.name, result.name)
            label.observe(result.seconds)
        return results

    async def _freeze(self, vm: Vm) -> float:
        """Save the device state and quit; returns the lag of the agent's clock mark, seconds."""
        machine = vm.machine
        await machine.set_link(False)
        if self.spec.code:
            # What clones do first is slow the first time; some of that stays in the frozen memory.
            await vm.agent.rehearse_code(_REHEARSAL_TIMEOUT)
        await vm.agent.quiesce(_QUIESCE_TIMEOUT)
        # The agent goes back to waiting, and the kernel finishes work that it put off.
        await asyncio.sleep(_SETTLE)
        await machine.pause()
        lag = time.monotonic() - vm.agent.marked
        await machine.detach_network()
        await machine.save(self.frozen / generations.STATE, _SAVE_TIMEOUT)
        await machine.quit(_QUIT_TIMEOUT)
        return lag

    async def _seal(self, manifest: Manifest) -> Manifest:
        """Make the layers read-only, digest them, and make the empty layer 3 that clones copy."""
        layer2 = self.directory / generations.DISK
        files = {}
        paths = {
            generations.MEMORY: self.frozen / generations.MEMORY,
            generations.STATE: self.frozen / generations.STATE,
            generations.DISK: layer2,
        }
        if self.spec.machine.firmware == "uefi":
            paths[generations.VARIABLES] = self.directory / generations.VARIABLES
        if self.spec.hypervisor == "libvirt":
            for name in paths.keys() - {generations.STATE}:
                await asyncio.to_thread(renew, paths[name])
        await asyncio.to_thread(fsync, layer2)
        for name, path in paths.items():
            freeze_file(path)
            files[name] = await digest_file(path)
        await disk.create_overlay(self.directory / generations.EMPTY, layer2)
        freeze_file(self.directory / generations.EMPTY)
        if not manifest.kernel:
            return _with(manifest, files=files)
        kernel = await digest_file(Path(manifest.kernel))
        return _with(manifest, files=files, kernel_sha256=kernel.sha256)

    async def _canary(self, generation: Generation) -> tuple[ProbeResult, ...]:
        """Start one clone of the new generation and run the probes on it."""
        # Without its limits, so that what it needs can be measured.
        layer = replace(generation.layer, limits=UNLIMITED, promise=None)
        async with self._slot(layer) as prepared:
            forwards, ports = self._forwards()
            async with self._tail_on_failure(prepared):
                vm = await self._start_canary(prepared, generation, forwards)
                self.clone_bytes = await asyncio.to_thread(vm.machine.private_bytes)
                results = await self._probe(vm, ports, canary=True)
            await asyncio.to_thread(self._require_enough, generation.limits, prepared)
            return results

    def _require_enough(self, limits: Limits, prepared: PreparedSlot) -> None:
        """Raise BuildError when the canary took more than a limit leaves to each clone."""
        group = prepared.group
        size = prepared.overlay.stat().st_size
        self._require_within(limits.disk, size, "disk", "bytes")
        memory = group.held_memory() if group else 0
        self._require_within(limits.memory, memory or self.clone_bytes, "memory", "bytes")
        if group is not None:
            group.limit(limits)  # whatever the kernel refuses, it does so now

    def _require_within(self, limit: int | None, taken: int, name: str, unit: str) -> None:
        if limit is not None and taken > limit:
            raise BuildError(
                f"limits.{name} of {self.spec.name} is {limit} {unit}, and its canary took {taken}",
                hint=f"set limits.{name} higher: what guests do comes on top of that",
            )

    async def _start_canary(
        self, prepared: PreparedSlot, generation: Generation, forwards: tuple[Forward, ...]
    ) -> Vm:
        clock, hostname = PhaseClock(), f"{self.spec.name}-canary"
        try:
            async with within(generation.terms.restored_s, "the start"):
                return await self.context.starter.direct(
                    prepared, generation, hostname, clock, forwards=forwards
                )
        except TemplatedError as error:
            cause = clock.failure(error)
            raise BuildError(f"the canary: {cause.message}", hint=cause.hint or _HINT) from error

    async def _own_network(self) -> OwnNetwork | None:
        name = self.spec.network.name
        if name is None:
            return None
        return OwnNetwork(name, await self.context.hypervisor.addresses(name))

    @property
    def _reaches_guests(self) -> bool:
        """Whether the host reaches a guest at its own address."""
        own = self.spec.network.mode == "libvirt"
        return own or isinstance(self.context.config.network, BridgeNetwork)

    def _forwards(self) -> tuple[tuple[Forward, ...], dict[int, tuple[str, int]]]:
        """Forwards for the probes that come from the host, and where they are."""
        ports = {p: ("127.0.0.1", _free_port()) for p in forwarded_ports(self.spec.probes)}
        if self._reaches_guests:
            return (), ports
        return tuple(Forward(guest, host) for guest, (_, host) in ports.items()), ports

    @asynccontextmanager
    async def _slot(self, layer: Layer) -> AsyncIterator[PreparedSlot]:
        """A slot for a VM of this build; both are given back at the end."""
        slots = self.context.slots
        prepared = await slots.make(layer)
        try:
            yield prepared
        finally:
            await slots.give_back(prepared)

    @asynccontextmanager
    async def _tail_on_failure(self, prepared: PreparedSlot) -> AsyncIterator[None]:
        """Report the end of the console before a failed VM's log goes away with its slot."""
        try:
            yield
        except TemplatedError as error:
            lines = tail(prepared.places.serial_log, 12) or ["(the console stayed empty)"]
            for line in lines:
                self.progress.log(f"console: {line}")
            if isinstance(error, BuildError):
                raise
            raise BuildError(
                f"the base VM of {self.spec.name} did not come up: {error.message}; "
                f"last on its console: {lines[-1].strip()[:120]}",
                hint=_HINT,
            ) from error

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        self.progress.phase(name, "start")
        begin = time.monotonic()
        yield
        self.phases_s[name] = round(time.monotonic() - begin, 3)
        self.progress.phase(name, "done", self.phases_s[name])

    def _manifest(
        self,
        image: Image,
        launch: Launch,
        qemu: QemuVersion,
        probes: tuple[ProbeResult, ...],
        lag: float,
    ) -> Manifest:
        command = self.context.hypervisor.describe(launch)
        kernel = launch.boot if isinstance(launch.boot, Kernel) else None
        return Manifest(
            format=generations.MANIFEST_FORMAT,
            id=self.id,
            template=self.spec.name,
            created=now(),
            spec=self.spec,
            image=image.digest,
            qemu=qemu,
            accel=launch.hardware.accel,
            cpu=launch.hardware.cpu,
            command_line=command,
            kernel=str(kernel.kernel) if kernel else "",
            kernel_sha256="",
            kernel_cmdline=kernel.cmdline if kernel else "",
            files={},
            probes=probes,
            canary_probes=(),
            phases_s={},
            freeze_lag_s=round(lag, 6),
            addresses=None if self._own is None else self._own.addresses,
        )


def _with(manifest: Manifest, **changes: object) -> Manifest:
    return msgspec.structs.replace(manifest, **changes)


def _free_port() -> int:
    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@asynccontextmanager
async def _memory_file(path: Path) -> AsyncIterator[int]:
    """A new file for the memory of a base VM, open. Raises OSError.

    Any user may write it, since a VM with a user of its own opens what it inherits once more;
    only its owner gets to it by its path.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.fchmod(descriptor, 0o666)
        yield descriptor
    finally:
        os.close(descriptor)
