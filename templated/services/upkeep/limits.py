"""Reports clones that want more than their limits let them have."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Mapping, Sequence

from templated.services.clones.clone import Running
from templated.services.clones.registry import Clones
from templated.services.context import Context

log = logging.getLogger(__name__)
INTERVAL = 5.0
"""Seconds between two looks at the groups."""
_REQUEST = 2 << 20
"""What a guest writes at once: a layer with less room than that refuses it."""
Hits = Mapping[str, int]


class LimitWatch:
    """Knows how often each clone has come to each of its limits, and what is new of that."""

    def __init__(self, context: Context, clones: Clones) -> None:
        self._context = context
        self._clones = clones
        self._seen: dict[str, Hits] = {}
        """By slot."""
        self._pressing: set[tuple[str, str]] = set()
        """Slot and limit of what was reported, and has gone on since."""

    async def run(self) -> None:
        """Look and report, until cancelled. Raises nothing.

        What an earlier daemon's clones had come to counts as reported by that one.
        """
        first = True
        while True:
            try:
                await self.look(report=not first)
            except Exception:
                log.exception("cannot look at the limits of clones")
            first = False
            await asyncio.sleep(INTERVAL)

    async def look(self, *, report: bool = True) -> None:
        """Read the figures of all clones, and report those that have grown."""
        clones = self._clones.running_clones()
        seen = await asyncio.to_thread(self._read, clones)
        pressing = set()
        for clone in clones:
            slot = clone.slot.id
            before = self._seen.get(slot, {})
            for limit, number in seen[slot].items():
                grown = number - before.get(limit, 0)
                if grown > 0 and report:
                    pressing.add((slot, limit))
                    self._report(clone, limit, grown)
        self._seen, self._pressing = seen, pressing

    def _report(self, clone: Running, limit: str, times: int) -> None:
        self._context.metrics.limit_hits.labels(clone.template, limit).inc(times)
        if (clone.slot.id, limit) not in self._pressing:
            self._context.events.emit("clone.limit", clone.name, limit=limit, times=times)

    def _read(self, clones: Sequence[Running]) -> dict[str, Hits]:
        """The figures of each by slot. In a thread."""
        found: dict[str, Hits] = {}
        for clone in clones:
            slot = clone.slot.id
            group = self._context.groups.group(slot) if clone.limits.controlled else None
            hits = group.hits(clone.limits) if group else {}
            # The guest gets an error for each write that does not fit, and nobody else hears of it.
            full = clone.limits.disk is not None and self._size(slot) > clone.limits.disk - _REQUEST
            found[slot] = {**hits, "disk": int(full)}
        return found

    def _size(self, slot: str) -> int:
        with contextlib.suppress(OSError):  # its clone is being removed
            return self._context.layout.overlay(slot).stat().st_size
        return 0
