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

from templated.drivers.hypervisor.base import Machine
from templated.errors import Timeout
from templated.model.clone import Slot
from templated.services.clones.registry import Clones
from templated.services.context import Context

log = logging.getLogger(__name__)


async def recover(context: Context, clones: Clones) -> None:
    """Make the host agree with the journal again, before the first request.

    Raises HostError when the journal or the network cannot be used; leaves what it has not
    reached as it was, for the next start.
    """
    rows = await context.journal.clones()
    slots = {row.slot.id: row.slot for row in rows}
    orphans = await clones.adopt(rows)
    kept = set(slots) - set(orphans)
    await context.network.open()
    await context.network.sweep(kept)
    free = {slot.id: slot for slot in await context.journal.free_slots()}
    unwanted = [*(slots[i] for i in orphans), *free.values()]
    left = await context.hypervisor.find({s.uuid: context.layout.vm(s.id) for s in unwanted})
    for slot in unwanted:
        if not await _destroyed(context, slot, left.get(slot.uuid, [])):
            kept.add(slot.id)
    await asyncio.to_thread(context.layout.remove_partial_overlays)
    await asyncio.to_thread(_remove_strays, context.layout.slots, kept)
    await asyncio.to_thread(_remove_strays, context.layout.sockets, kept)


async def _destroyed(context: Context, slot: Slot, machines: Sequence[Machine]) -> bool:
    """End what is left of a VM, also when its pid was not recorded, and give its slot back.

    False when it does not end: its slot stays, so that nobody gets its address, and the next
    start of the daemon tries again. Raises HostError when the slot cannot be given back.
    """
    for machine in machines:
        log.info(
            "ending the VM of slot %s, which an earlier daemon left (pid %d)",
            slot.id,
            machine.pid,
        )
        try:
            await machine.destroy()
        except Timeout as error:
            log.error("slot %s stays: %s", slot.id, error)
            return False
    await context.slots.drop(slot.id)
    return True


def _remove_strays(directory: Path, keep: set[str]) -> None:
    for path in directory.iterdir():
        if path.name not in keep:
            with contextlib.suppress(OSError):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
