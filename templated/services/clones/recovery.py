"""After a restart: what the journal names is adopted or destroyed, and nothing else is touched.

Owner tags: a VM is ours when it has the UUID of a slot in the journal, a tap when its alias has
our owner id, a directory when it lies in slots/ or vm/ of our own places.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path

from templated import failpoints
from templated.drivers.host import procfs
from templated.drivers.hypervisor.base import Machine
from templated.drivers.network import PortOwner
from templated.errors import HostError, TemplatedError, host_errors
from templated.journal import CloneRow
from templated.model.clone import CloneState, Slot
from templated.model.policy import template_group
from templated.model.spec import TemplateSpec
from templated.model.uids import UidRange
from templated.model.units import seconds
from templated.services.clones.registry import Clones
from templated.services.context import Context
from templated.services.machines.admission import Promise
from templated.services.machines.generation import read_manifest
from templated.timing import within

log = logging.getLogger(__name__)


async def recover(context: Context, clones: Clones) -> None:
    """Make the host agree with the journal again, before the first request.

    Raises HostError when the journal or the network cannot be used; leaves what it has not
    reached as it was, for the next start.
    """
    rows = await context.journal.clones()
    slots = {row.slot.id: row.slot for row in rows}
    if context.starter.uids is not None:
        _require_users_apart(context.starter.uids, rows)
    specs = await asyncio.to_thread(_specs, context, rows)
    for row in rows:
        if row.slot.id in specs:
            context.admission.hold(row.slot.id, Promise.of(specs[row.slot.id]))
        if row.state is CloneState.DEAD:
            context.admission.died(row.slot.id)
    orphans = await clones.adopt(rows, specs)
    if failpoints.armed:
        failpoints.hit("recover.adopted")
    kept = set(slots) - set(orphans)
    await context.policies.open()
    await context.network.open(
        {
            row.slot.id: PortOwner(row.slot.index, (template_group(row.template),))
            for row in rows
            if row.slot.id in kept
        }
    )
    await context.network.sweep(kept)
    free = {slot.id: slot for slot in await context.journal.free_slots()}
    unwanted = [*(slots[i] for i in orphans), *free.values()]
    stall = seconds(context.config.limits.stall)
    async with within(stall, "looking for VMs that were left"):
        with host_errors():
            places = {s.uuid: context.layout.vm(s.id) for s in unwanted}
            left = await context.hypervisor.find(places)
    for slot in unwanted:
        if not await _destroyed(context, slot, left.get(slot.uuid, [])):
            kept.add(slot.id)
    try:
        async with within(stall, "removing what was left"):
            with host_errors():
                await asyncio.to_thread(context.layout.remove_partial_overlays)
                await asyncio.to_thread(_remove_strays, context.layout.slots, kept)
                await asyncio.to_thread(_remove_strays, context.layout.sockets, kept)
                await asyncio.to_thread(context.groups.sweep, kept)
    except TemplatedError as error:  # no clone needs to wait for that
        log.warning("the next start tries again: %s", error.message)


def _specs(context: Context, rows: Sequence[CloneRow]) -> dict[str, TemplateSpec]:
    """By slot: the template of each clone, as it was when its generation was built. Blocks.

    One that cannot be read is left out, with a warning.
    """
    found: dict[tuple[str, str], TemplateSpec] = {}
    for key in {(row.template, row.slot.generation) for row in rows}:
        try:
            found[key] = read_manifest(context.layout.generation(*key)).spec
        except HostError as error:
            log.warning("clones of %s %s go on, without a limit: %s", *key, error.message)
    return {
        row.slot.id: found[row.template, row.slot.generation]
        for row in rows
        if (row.template, row.slot.generation) in found
    }


def _require_users_apart(uids: UidRange, rows: Sequence[CloneRow]) -> None:
    """Raise HostError when a VM that runs has the user of another slot: `uids` was changed."""
    for row in rows:
        if row.pid is None or procfs.start_time(row.pid) != row.pid_start:
            continue
        present = procfs.user(row.pid)
        if present in uids and present != uids.first + row.slot.index:
            raise HostError(
                f"clone {row.name} runs as uid {present}, which `uids` now gives to another VM",
                hint="set `uids` back, or to a range that has nothing in common with the old one",
            )


async def _destroyed(context: Context, slot: Slot, machines: Sequence[Machine]) -> bool:
    """End what is left of a VM, also when its pid was not recorded, and give its slot back.

    False when it does not end, or its slot cannot be given back: the slot stays, so that nobody
    gets its address, and is tried again. Raises nothing.
    """
    for machine in machines:
        log.info(
            "ending the VM of slot %s, which an earlier daemon left (pid %d)",
            slot.id,
            machine.pid,
        )
        try:
            await machine.destroy()
        except TemplatedError as error:
            log.error("slot %s stays: %s", slot.id, error)
            return False
    try:
        await context.slots.drop(slot.id)
    except TemplatedError as error:  # a disk's error must not keep all other clones waiting
        log.error("slot %s stays for now: %s", slot.id, error)
        context.slots.leave(slot.id)
        return False
    if failpoints.armed:
        failpoints.hit("recover.removed")
    return True


def _remove_strays(directory: Path, keep: set[str]) -> None:
    if failpoints.armed:
        failpoints.hit("recover.strays")
    for path in directory.iterdir():
        if path.name not in keep:
            with contextlib.suppress(OSError):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
