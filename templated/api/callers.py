"""Who calls, and what they may do: looked up once for each connection."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from weakref import WeakKeyDictionary

from aiohttp import web

from templated.drivers.accounts import Peer, access_rules, peer_of
from templated.model.access import EVERYTHING, NOTHING, Grant, granted
from templated.model.config import AccessConfig


@dataclass(frozen=True)
class Caller:
    """The process at the other end, None when nobody knows, and what it may do."""

    peer: Peer | None
    grant: Grant

    @property
    def uid(self) -> int | None:
        """The uid that the kernel reports."""
        return None if self.peer is None else self.peer.uid


class Callers:
    """Knows the caller of each request.

    Raises ConfigError, when it is made, for a user or group that this host does not have.
    """

    def __init__(self, access: AccessConfig | None) -> None:
        self._rules = None if access is None else access_rules(access)
        self._known: WeakKeyDictionary[asyncio.BaseTransport, Caller] = WeakKeyDictionary()

    def of(self, request: web.Request) -> Caller:
        """Who sent a request. Raises nothing."""
        transport = request.transport
        if transport is None:  # the client has gone already
            return Caller(None, self._grant(None))
        caller = self._known.get(transport)
        if caller is None:
            peer = _peer(transport)
            caller = self._known[transport] = Caller(peer, self._grant(peer))
        return caller

    def _grant(self, peer: Peer | None) -> Grant:
        if self._rules is None:
            return EVERYTHING
        return NOTHING if peer is None else granted(self._rules, peer.uid, peer.gids)


def _peer(transport: asyncio.BaseTransport) -> Peer | None:
    sock = transport.get_extra_info("socket")
    try:
        return None if sock is None else peer_of(sock)
    except OSError:  # the connection was closed meanwhile
        return None
