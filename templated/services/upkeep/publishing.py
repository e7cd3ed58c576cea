"""Ports of the host lead to the clone of their template that has run longest.

The clone's start knows nothing of it: this follows the events. When the clone ends the next one
takes over, and when there is none the port is the host's again.
"""

from __future__ import annotations

import asyncio
import logging

from templated.errors import HostError
from templated.model.clone import CloneState
from templated.model.policy import Published
from templated.services.clones.clone import Running
from templated.services.clones.registry import Clones
from templated.services.context import Context

log = logging.getLogger(__name__)
_CHANGES = frozenset(
    {"clone.running", "clone.dead", "clone.removed", "clone.adopted", "network.policy"}
)
_RETRY = 5.0


def holders(context: Context, clones: Clones) -> dict[str, Running]:
    """By template: the clone that its published ports lead to, of those that have any."""
    found: dict[str, Running] = {}
    for clone in clones.running_clones():
        ruled = context.policies.get(clone.template)
        running = clone.state is CloneState.RUNNING and not clone.function
        if ruled is not None and ruled.policy.publish and running:
            found.setdefault(clone.template, clone)
    return found


class Publishing:
    """Keeps the kernel's map of published ports as the clones are."""

    def __init__(self, context: Context, clones: Clones) -> None:
        self._context = context
        self._clones = clones

    async def run(self) -> None:
        """Follow what happens, until the events end. Raises nothing."""
        await self._try()
        async for event in self._context.events.follow():
            if event.type in _CHANGES:
                await self._try()

    async def look(self) -> None:
        """Set the ports as they must be now. Raises HostError."""
        ports: dict[tuple[str, int], tuple[str, int]] = {
            (one.protocol, one.host_port): (clone.slot.ip, one.port)
            for template, clone in holders(self._context, self._clones).items()
            for one in self._published(template)
        }
        await self._context.network.publish(ports)

    def _published(self, template: str) -> tuple[Published, ...]:
        ruled = self._context.policies.get(template)
        return () if ruled is None else ruled.policy.publish

    async def _try(self) -> None:
        try:
            await self.look()
        except HostError as error:
            log.error("published ports are not as they should be: %s", error.message)
            await asyncio.sleep(_RETRY)
