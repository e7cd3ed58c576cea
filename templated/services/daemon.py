"""Builds all services of one daemon, in order, and takes them down in the reverse order."""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from templated.drivers.accounts import range_problem
from templated.drivers.cgroups import ControlGroups, control_groups
from templated.drivers.hypervisor.base import Hypervisor
from templated.drivers.hypervisor.chosen import QemuOrLibvirt
from templated.drivers.hypervisor.libvirt.driver import LentPlaces, Libvirt
from templated.drivers.image.store import ImageStore
from templated.drivers.network import Network, make_network
from templated.drivers.objectstore import connect
from templated.errors import Conflict
from templated.journal import EgressRows, FunctionRows, Journal
from templated.model.clone import StartPath
from templated.model.config import Config, GatewayConfig
from templated.model.network import AddressPlan
from templated.model.uids import UidRange, block_of
from templated.model.units import optional_bytes, seconds, size_bytes
from templated.services.clones.guest import Guests
from templated.services.clones.recovery import recover
from templated.services.clones.registry import Clones
from templated.services.context import Context
from templated.services.egress.egresses import Egresses
from templated.services.functions.allotment import Capacity
from templated.services.functions.bounds import Bounds
from templated.services.functions.cache import CodeCache
from templated.services.functions.crews import Crews
from templated.services.functions.functions import Functions
from templated.services.functions.instance import Timing
from templated.services.functions.instances import Instances
from templated.services.functions.kept import Kept
from templated.services.functions.logs import FunctionLogs
from templated.services.functions.networks import FunctionNetworks
from templated.services.functions.queue import EventQueue
from templated.services.functions.registry import Registry
from templated.services.functions.router import Router
from templated.services.functions.shifts import Shifts
from templated.services.functions.starts import Room
from templated.services.functions.uploads import Uploads
from templated.services.functions.zone import Zone
from templated.services.host import Host
from templated.services.machines.admission import Admission
from templated.services.machines.slots import Slots
from templated.services.machines.start import Starter
from templated.services.places import Layout
from templated.services.policies import Policies
from templated.services.pools.capacity import shortages
from templated.services.pools.members import Pools
from templated.services.pools.refill import Refill
from templated.services.reports.audit import AuditLog
from templated.services.reports.egress_metrics import EgressMetrics
from templated.services.reports.events import EventBus
from templated.services.reports.function_metrics import FunctionMetrics
from templated.services.reports.metrics import Metrics
from templated.services.reports.operations import Operations
from templated.services.reports.scaling_metrics import ScalingMetrics
from templated.services.tasks import Tasks
from templated.services.templates.catalog import Templates
from templated.services.upkeep.following import Following
from templated.services.upkeep.host_metrics import watch
from templated.services.upkeep.janitor import keep_logs_short
from templated.services.upkeep.limits import LimitWatch
from templated.services.upkeep.nets import Nets, PolicyMeter
from templated.services.upkeep.publishing import Publishing
from templated.services.upkeep.scale_views import ScaleViews
from templated.services.upkeep.scaling import Scaling, Surroundings
from templated.services.upkeep.stalls import ended_when_stalled

log = logging.getLogger(__name__)
# What an instance takes of memory while its template has no generation, in bytes.
_UNKNOWN = 64 << 20


@dataclass(frozen=True)
class Services:
    """What the API calls."""

    context: Context
    templates: Templates
    pools: Pools
    clones: Clones
    guests: Guests
    operations: Operations
    refill: Refill
    audit: AuditLog
    functions: Functions
    nets: Nets
    egresses: Egresses
    scaling: ScaleViews | None
    """None: it is switched off."""


class Installation:
    """What must be made before the event loop runs (the bridge driver's import blocks)."""

    def __init__(
        self,
        config: Config,
        hypervisor: Hypervisor | None = None,
        groups: ControlGroups | None = None,
    ) -> None:
        self.config = config
        self.layout = Layout(config)
        self.layout.create()
        self._lock = _lock(self.layout.lock)
        self.hypervisor = hypervisor or make_hypervisor(config)
        self.hypervisor.prepare()
        tag = _tag(config)
        self.plan = AddressPlan(config.network.subnet, tag)
        self.uids = _uids(config, self.hypervisor)
        self.owner = _owner(config)
        self.network: Network = make_network(config.network, self.plan, self.owner)
        self.groups = find_groups(config) if groups is None else groups
        if self.groups.problem:
            log.warning(
                "VMs have no control groups, so most limits do not hold: %s", self.groups.problem
            )

    @property
    def capacity(self) -> int:
        """How many slots there can be: each has an address, and a user where VMs have their own."""
        return min(self.plan.capacity, self.uids.count if self.uids else self.plan.capacity)

    def close(self) -> None:
        """Let another daemon use state_dir."""
        os.close(self._lock)


@asynccontextmanager
async def services(installation: Installation) -> AsyncIterator[Services]:
    """All services, recovered and running. VMs go on when this ends.

    Raises HostError when the journal or the network cannot be used; leaves nothing running then.
    """
    journal = Journal(installation.layout.journal)
    calls = {
        "the journal": lambda: journal.stalled,
        "the kernel's network": lambda: installation.network.stalled,
    }
    limit = seconds(installation.config.limits.stall)
    async with ended_when_stalled(limit, calls), _services(installation, journal) as running:
        yield running


@asynccontextmanager
async def _services(installation: Installation, journal: Journal) -> AsyncIterator[Services]:
    await journal.open()
    context, tasks = _context(installation, journal), Tasks()
    audit = _audit_log(installation)
    templates = Templates(context)
    pools = Pools(context, tasks, templates)
    clones = Clones(context, tasks, templates, pools)
    refill = Refill(context, tasks, pools, templates)
    egresses = _egresses(context, tasks, installation.owner)
    made = _Functions(context, tasks, templates, clones, pools)
    _subscribe(context, templates, pools)
    try:
        await templates.open()
        await pools.open()
        await egresses.load()
        await recover(context, clones)
        await egresses.open()
        await templates.load()
        tasks.spawn(context.slots.refill(), "keeping slots ready")
        tasks.spawn(refill.run(), "keeping the pools filled")
        tasks.spawn(refill.watch(), "checking the pools")
        tasks.spawn(keep_logs_short(installation.layout.slots), "keeping logs short")
        tasks.spawn(watch(context, templates, pools, clones), "measuring the host")
        tasks.spawn(LimitWatch(context, clones).run(), "watching the limits of clones")
        tasks.spawn(PolicyMeter(context).run(), "counting what policies drop")
        tasks.spawn(Publishing(context, clones).run(), "publishing ports")
        tasks.spawn(audit.run(), "writing the audit log")
        await made.open()
        guests, operations = Guests(clones), Operations(tasks)
        yield Services(
            *(context, templates, pools, clones, guests, operations, refill, audit),
            functions=made.functions,
            nets=Nets(context, clones),
            egresses=egresses,
            scaling=made.scale_views,
        )
    finally:
        context.events.close()
        await made.end()
        await tasks.end()
        await made.close()
        await audit.flush()
        await pools.close()
        await context.slots.close()
        await clones.release()
        await egresses.close()
        await context.network.close(remove=False)
        await journal.close()


class _Functions:
    """The parts of functions, made in order."""

    def __init__(
        self, context: Context, tasks: Tasks, templates: Templates, clones: Clones, pools: Pools
    ) -> None:
        config, layout = context.config, context.layout
        rows, metrics = FunctionRows(context.journal), FunctionMetrics(context.metrics.registry)
        store = config.code.store
        self._zone = None if store is None else Zone(connect(store), store.parallel)
        self._tasks = tasks
        size = size_bytes(config.code.cache_size)
        self._cache = CodeCache(layout.code, size, self._zone, metrics)
        capacity = Capacity(concurrency=config.functions.concurrency, clones=config.limits.clones)
        self._registry = Registry(
            rows, context.events, self._cache, templates.takers, capacity=capacity
        )
        self._cache.needed = self._registry.needed
        self._logs = FunctionLogs(layout.function_logs, size_bytes(config.functions.log_size))
        self._router = self._make_router(context, templates, clones, metrics)
        self._shifts = Shifts(self._registry, self._crews, self._tasks, context.events)
        self._kept = Kept(self._registry, self._crews)
        self._queue = EventQueue(rows, self._registry, self._router, context.events)
        self._uploads = Uploads(layout.incoming)
        self._registry.on_changed += [metrics.expect, self._shifts.changed]
        self._registry.on_kept.append(self._kept.changed)
        self._registry.on_removed += [self._router.removed, self._queue.removed, self._removed]
        self._networks = FunctionNetworks(
            self._registry, context.policies, templates, self._instances, self._tasks
        )
        self._registry.on_removed += [self._shifts.removed, self._networks.removed]
        self._following: Following | None = None
        self.scaling = self._make_scaling(context, templates, pools)
        self.scale_views = (
            None if self.scaling is None else ScaleViews(self.scaling, self._registry, self._crews)
        )
        self.functions = Functions(
            registry=self._registry,
            router=self._router,
            queue=self._queue,
            logs=self._logs,
            code=self._cache,
            uploads=self._uploads,
            kept=self._kept,
            shifts=self._shifts,
            networks=self._networks,
        )

    def _make_router(
        self, context: Context, templates: Templates, clones: Clones, metrics: FunctionMetrics
    ) -> Router:
        limits, gateway = context.config.functions, context.config.gateway or GatewayConfig()
        instances = self._instances = Instances(
            clones,
            self._cache,
            self._tasks,
            context.events,
            metrics,
            self._logs,
            Timing.of(limits),
            gateway.region,
            templates.memory,
        )
        room = Room.of(context.config.limits, limits.concurrency, self._registry.maximum)
        self._crews = Crews(instances, context.events, metrics, room, self._registry.current)
        bounds = Bounds(self._registry, limits.concurrency, limits.queue)
        arns = f"arn:aws:lambda:{gateway.region}:{gateway.account}:function"
        return Router(
            self._registry, instances, self._crews, bounds, metrics, self._logs, arns=arns
        )

    def _make_scaling(self, context: Context, templates: Templates, pools: Pools) -> Scaling | None:
        config = context.config
        if not config.scaling.enabled:
            return None

        def cost(template: str) -> int:
            generation = templates.generation(template)
            return _UNKNOWN if generation is None else pools.cost(generation, StartPath.WARM)

        around = Surroundings(
            path=context.layout.scaling,
            cost=cost,
            shortages=lambda: shortages(config.pools.pressure),
        )
        metrics = ScalingMetrics(context.metrics.registry)
        scaling = Scaling(
            config.scaling, self._registry, self._crews, metrics, context.events, around
        )
        if config.scaling.pools:
            self._following = Following(scaling, self._crews, pools)
            self._crews.on_started.append(self._following.started)
        self._registry.on_changed.append(scaling.changed)
        self._registry.on_kept.append(scaling.refresh)
        self._crews.on_started.append(scaling.started)
        # A generation that begins to serve has instances of another size.
        templates.on_serving.append(lambda _: scaling.refresh_all())
        self._crews.on_readied.append(scaling.readied)
        self._router.watchers.append(scaling.foreseen)
        self._router.tallies.append(scaling.tally)
        return scaling

    async def open(self) -> None:
        """Know what an earlier daemon knew. Raises HostError when the journal cannot be read."""
        await self._uploads.open()
        await self._cache.open()
        await self._registry.open()
        await self._networks.open()
        for name in self._registry.names():
            for version in (self._registry.latest(name), *self._registry.versions(name)):
                self._router.changed(version)
        self._kept.open()
        if self.scaling is not None:
            await self.scaling.open()
            self._tasks.spawn(self.scaling.run(), "scaling")
        if self._following is not None:
            self._tasks.spawn(self._following.run(), "having pools follow functions")
        await self._logs.prune(self._registry.names())
        await self._queue.open()
        self._tasks.spawn(self._logs.run(), "writing the logs of functions")
        self._tasks.spawn(self._queue.run(), "running events")

    async def _removed(self, function: str, number: int | None) -> None:
        if number is None:
            await self._logs.remove(function)

    async def end(self) -> None:
        """End all instances; events that run are left to the next daemon. Raises nothing."""
        await self._queue.close()
        await self._router.close()

    async def close(self) -> None:
        """Write what is left of the logs, and what scaling has learned. Raises nothing."""
        if self.scaling is not None:
            await self.scaling.close()
        await self._logs.close()
        await self._cache.close()
        if self._zone is not None:
            self._zone.close()


def _egresses(context: Context, tasks: Tasks, owner: str) -> Egresses:
    egresses = Egresses(
        context.config,
        EgressRows(context.journal),
        context.network,
        context.plan,
        context.layout.egress,
        owner,
        tasks,
        context.events,
        EgressMetrics(context.metrics.registry),
    )
    context.policies.has_egress = egresses.has
    egresses.users.append(context.policies.users)
    return egresses


def _audit_log(installation: Installation) -> AuditLog:
    wanted = installation.config.audit
    limit = None if wanted is None else size_bytes(wanted.size)
    return AuditLog(installation.layout.audit, limit)


def _subscribe(context: Context, templates: Templates, pools: Pools) -> None:
    """Report to slots and pools when a generation begins to serve, and when it no longer does."""
    templates.on_serving.append(lambda generation: context.slots.serve(generation.layer))
    templates.on_serving.append(lambda _: pools.refresh())
    templates.on_retired += [pools.retire, context.slots.retire]
    templates.on_removed += [pools.forget, context.policies.forget]


def make_hypervisor(config: Config) -> Hypervisor:
    """The hypervisor that the configuration names. The only place that knows them all."""
    layout = Layout(config)
    libvirt = Libvirt(config.libvirt.uri, LentPlaces(layout.lent, layout.lent_memory))
    return QemuOrLibvirt(config.qemu, layout.kvm_proof, libvirt)


def _context(installation: Installation, journal: Journal) -> Context:
    config, layout = installation.config, installation.layout
    metrics = Metrics()
    limits = config.limits
    admission = Admission(optional_bytes(limits.memory), optional_bytes(limits.disk))
    slots = Slots(
        journal,
        layout,
        installation.network,
        installation.plan,
        installation.groups,
        admission,
        ready=config.slots.ready,
        capacity=installation.capacity,
        stall=seconds(config.limits.stall),
    )
    starter = Starter(
        installation.hypervisor,
        installation.network,
        config.restore.transport,
        config.confine,
        installation.uids,
    )
    events = EventBus(metrics.events)
    return Context(
        config=config,
        layout=layout,
        journal=journal,
        images=ImageStore(layout.state),
        host=Host(config, installation.hypervisor),
        hypervisor=installation.hypervisor,
        network=installation.network,
        plan=installation.plan,
        groups=installation.groups,
        admission=admission,
        slots=slots,
        starter=starter,
        events=events,
        metrics=metrics,
        policies=Policies(config, journal, installation.network, events),
    )


def find_groups(config: Config, *, make: bool = True) -> ControlGroups:
    """The control groups of this configuration's VMs; see `control_groups`."""
    if not config.confine:
        return ControlGroups("confine is false")
    return control_groups(_owner(config), Path(config.state_dir), make=make)


def uid_range(config: Config) -> UidRange:
    """Who VMs run as, where they can."""
    return config.uids or block_of(_tag(config))


def uids_problem(config: Config, hypervisor: Hypervisor) -> str:
    """Why VMs run as this process's own user; empty when they do not."""
    if not config.confine:
        return "confine is false"
    return hypervisor.user_problem() or range_problem(uid_range(config))


def _uids(config: Config, hypervisor: Hypervisor) -> UidRange | None:
    problem = uids_problem(config, hypervisor)
    if problem:
        log.warning("VMs run as the user of this process: %s", problem)
        return None
    if lacking := hypervisor.file_limit_problem():
        log.warning("what VMs write to the disk may have no limit: %s", lacking)
    if problem := hypervisor.landlock_problem():
        log.warning("VMs may open what every user of this host may: %s", problem)
    return uid_range(config)


def _tag(config: Config) -> bytes:
    """What tells this daemon from all others: two of one host differ by their state_dir."""
    return _machine_id() + config.state_dir.encode()


def _owner(config: Config) -> str:
    """The mark of what this daemon makes on the host: taps and control groups."""
    return hashlib.sha256(_tag(config)).hexdigest()[:12]


def _lock(path: Path) -> int:
    """One daemon per state_dir; Conflict when there is one already."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise Conflict(
            f"another daemon uses {path.parent}",
            hint="stop it first, or set another state_dir",
        ) from None
    return fd


def _machine_id() -> bytes:
    try:
        return Path("/etc/machine-id").read_bytes() or b"no machine-id"
    except OSError:
        return os.uname().nodename.encode()
