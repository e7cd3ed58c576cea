"""What a forwarder sees of the one on the other host, which no daemon here hears."""

from __future__ import annotations

from contextlib import suppress

from templated.drivers.egress import adverts
from templated.drivers.egress.arp import Arp, Heard
from templated.model.egress import ForwarderSpec, Peer

_LISTEN = 0.3
_SILENCE = 4
"""Looks without an answer after which it is out of sight."""


class Watch:
    """Of a forwarder between two hosts; of any other, nothing is there to be seen."""

    def __init__(self, spec: ForwarderSpec) -> None:
        self.wanted = bool(spec.egress.hosts)
        self.state = Peer.UNSEEN if self.wanted else Peer.NONE
        self._own = spec.plan.own(spec.seat)
        self._other = spec.plan.own(3 - spec.seat)
        self._silent = _SILENCE

    def heard(self, frame: Heard) -> None:
        """Something came by the inside leg."""
        if frame.ip == self._other:
            self._silent = 0

    async def look(self, inside: Arp | None, *, active: bool) -> bool:
        """Look once, and say whether something else is seen than before.

        While this one is `active`, it is not asked for another one that is: that one gives up.
        """
        before = self.state
        if not active and await self.sends():
            self.state = Peer.SENDS
        else:
            self.state = Peer.SEEN if self._silent < _SILENCE else Peer.UNSEEN
        self._silent += 1
        with suppress(OSError):  # the leg is down: nobody answers
            if inside is not None:
                inside.ask(self._other, self._own)
        return self.state is not before

    async def sends(self, seconds: float = _LISTEN) -> bool:
        """Whether another forwarder is heard inside as the active one."""
        try:
            return await adverts.heard(self._own, seconds)
        except OSError:
            return False
