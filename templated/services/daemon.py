"""Builds all services of one daemon, in order, and takes them down in the reverse order."""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import logging
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from templated.drivers.hypervisor.base import Hypervisor
from templated.drivers.hypervisor.qemu.machine import Qemu
from templated.drivers.hypervisor.qemu.tsc import tsc_khz
from templated.drivers.image.store import ImageStore
from templated.drivers.network import Network, make_network
from templated.errors import Conflict
from templated.journal import Journal
from templated.model.config import Config
from templated.model.network import AddressPlan
from templated.services.clones.recovery import recover
from templated.services.clones.registry import Clones
from templated.services.context import Context
from templated.services.host import Host
from templated.services.machines.slots import Slots
from templated.services.machines.starter import Starter
from templated.services.places import Layout
from templated.services.pools.refill import Refill
from templated.services.reports.events import EventBus
from templated.services.reports.metrics import Metrics
from templated.services.reports.operations import Operations
from templated.services.tasks import Tasks
from templated.services.upkeep.host_metrics import watch
from templated.services.upkeep.janitor import keep_logs_short

log = logging.getLogger(__name__)


class Services:
    """What the API calls."""

    def __init__(
        self, context: Context, clones: Clones, operations: Operations, refill: Refill
    ) -> None:
        self.context = context
        self.clones = clones
        self.templates = clones.templates
        self.operations = operations
        self.refill = refill


class Foundation:
    """What must be made before the event loop runs (the bridge driver's import blocks)."""

    def __init__(self, config: Config, hypervisor: Hypervisor | None = None) -> None:
        self.config = config
        self.layout = Layout(config)
        self.layout.create()
        self._lock = _lock(self.layout.lock)
        tsc_khz()  # measured here, where it may block, and remembered
        tag = _machine_id()
        # Two daemons on one host differ by their state_dir.
        tag += str(self.layout.state).encode()
        self.plan = AddressPlan(config.network.subnet, tag)
        owner = hashlib.sha256(tag).hexdigest()[:12]
        self.network: Network = make_network(config.network, self.plan, owner)
        self.hypervisor = hypervisor or Qemu(config.qemu)

    def close(self) -> None:
        """Let another daemon use state_dir."""
        os.close(self._lock)


@asynccontextmanager
async def services(foundation: Foundation) -> AsyncIterator[Services]:
    """All services, recovered and running. VMs go on when this ends."""
    journal = Journal(foundation.layout.journal)
    await journal.open()
    context = _context(foundation, journal)
    try:
        async with asyncio.TaskGroup() as group:
            tasks = Tasks(group)
            clones = Clones(context, tasks)
            await recover(context, clones)
            await clones.pools.open()
            await clones.templates.open()
            refill = Refill(context, tasks, clones.pools, clones.templates)
            tasks.start(context.slots.refill(), "slots")
            tasks.start(refill.run(), "pools")
            tasks.start(refill.watch(), "health of the pools")
            tasks.start(keep_logs_short(foundation.layout.slots), "janitor")
            tasks.start(watch(context, clones), "host metrics")
            try:
                yield Services(context, clones, Operations(tasks), refill)
            finally:
                context.events.close()
                await tasks.end()
                await clones.pools.close()
                await context.slots.close()
                await clones.release()
    finally:
        await context.network.close(remove=False)
        await journal.close()


def _context(foundation: Foundation, journal: Journal) -> Context:
    config, layout = foundation.config, foundation.layout
    metrics = Metrics()
    slots = Slots(journal, layout, foundation.network, foundation.plan, ready=config.slots.ready)
    starter = Starter(
        foundation.hypervisor,
        foundation.network,
        foundation.plan,
        config.restore.transport,
    )
    return Context(
        config=config,
        layout=layout,
        journal=journal,
        images=ImageStore(layout.state),
        host=Host(config, layout.state),
        hypervisor=foundation.hypervisor,
        network=foundation.network,
        plan=foundation.plan,
        slots=slots,
        starter=starter,
        events=EventBus(metrics.events),
        metrics=metrics,
    )


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
