"""The interface of every kind of network."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from ipaddress import IPv4Address
from typing import NamedTuple, Protocol

from templated.errors import HostError, InvalidRequest
from templated.model.network import Attachment, Exit, Forward
from templated.model.policy import Policy

# With the prefix "tp" a tag has to fit in an interface's name, which has at most 15 bytes.
_TAG = re.compile(r"[a-z0-9][a-z0-9-]{0,12}")
_FORBIDDEN = (errno.EPERM, errno.EACCES)
_MISSING = (errno.ENOENT, errno.ENODEV, errno.EOPNOTSUPP)


class Port:
    """One clone's connection, made ahead of its start.

    `fd` is the daemon's open tap, None in user mode and after `close`. A caller who starts a VM
    lets it inherit the fd under the same number and then closes the port here.
    The tap itself stays until `Network.drop_port`.
    """

    def __init__(
        self,
        tag: str,
        *,
        ifname: str = "",
        fd: int | None = None,
        index: int | None = None,
    ) -> None:
        self.tag = tag
        self.ifname = ifname
        self.fd = fd
        self.index = index

    def close(self) -> None:
        """Close the daemon's fd. May be called again."""
        fd, self.fd = self.fd, None
        if fd is not None:
            os.close(fd)


@dataclass(frozen=True)
class PortOwner:
    """What a port is for: a clone's index, and its groups, the closest first.

    The policy of the first that has one holds.
    """

    index: int
    groups: tuple[str, ...] = ()


class Counted(NamedTuple):
    """What a counter has seen."""

    packets: int
    bytes: int


class Way(NamedTuple):
    """Where the host sends a packet: to itself, by an interface, or (no name) nowhere."""

    local: bool
    ifname: str


class HostFacts(NamedTuple):
    """What the host has of its own, in the network namespace of its clones."""

    addresses: frozenset[IPv4Address]
    listening: frozenset[tuple[str, int]]
    """Protocols and ports that programs listen to, but for those on loopback alone."""


class Network(Protocol):
    """A way to connect clones. Methods may run concurrently; each tag belongs to one caller."""

    @property
    def stalled(self) -> float:
        """Seconds that a call of the kernel has taken so far, which no call should; usually 0."""

    @property
    def exits(self) -> tuple[Exit, ...]:
        """The named ways out that there are."""

    async def open(self, ports: Mapping[str, PortOwner] | None = None) -> None:
        """Find or make the parts that all ports share. Raises HostError; leaves nothing then.

        `ports` are those of an earlier daemon whose clones go on, by tag: policies hold for them
        without a gap. All others of this owner are removed first, while the rules of before hold.
        """

    async def make_port(
        self, tag: str, index: int | None = None, groups: tuple[str, ...] = ()
    ) -> Port:
        """Prepare a connection, so that a start only has to hand over an fd.

        `tag` is 1 to 13 of a-z, 0-9 and dash. `index` fixes the port to one clone's address.
        The policy of the first of `groups` that has one holds before the port is up.
        Raises InvalidRequest for a bad tag, Conflict when the tag is in use, HostError when
        the host refuses; nothing is left then. A cancelled call may still have made the port:
        `drop_port` removes it.
        """

    async def drop_port(self, tag: str) -> None:
        """Remove a port. No error if there is none. Raises HostError if it cannot be removed."""

    async def sweep(self, keep: set[str]) -> list[str]:
        """Remove the ports of this owner whose tag is not in `keep`, whoever made them.

        Returns the removed tags, sorted. Interfaces of others are not touched. Raises HostError.
        """

    async def move_port(self, tag: str, groups: tuple[str, ...]) -> None:
        """Hold a port to the policy of other groups from now on: part of a start.

        It waits for no port that is made or removed meanwhile. Raises HostError; the policy
        that held before holds then.
        """

    async def set_policies(self, changes: Mapping[str, Policy | None]) -> None:
        """Hold all ports of groups, present and later ones, to policies; None: to none.

        A group is a name for nft(8): letters, digits, dot, dash and underscore, at most 119. One
        transaction, also before `open`. Raises HostError; what held before holds then.
        """

    async def publish(self, ports: Mapping[tuple[str, int], tuple[str, int]]) -> None:
        """Have ports of the host, by protocol and number, lead to an address and port of clones.

        These, and no others from now on. Raises HostError; what held before holds then.
        """

    async def counters(self) -> dict[str, dict[str, Counted]]:
        """By group: what policies passed (`sent`, `received`) and dropped, by reason.

        Counted since the daemon began or the first policy came. Raises HostError.
        """

    async def host(self) -> HostFacts:
        """What policies must not touch. Raises HostError; nothing is known before `open`."""

    async def way(self, address: str, mark: int = 0) -> Way:
        """Where the host sends what a clone sends to an IPv4 address. Raises HostError."""

    async def set_exits(self, exits: Sequence[Exit]) -> None:
        """Tell which named ways out there are: all of them, each time, also before `open`.

        One transaction; does nothing when they are what they were, or in user mode. Clones whose
        policy names one that is not among them reach nothing. Raises HostError when the host
        refuses; what held before holds then.
        """

    async def close(self, *, remove: bool) -> None:
        """Release everything. May be called again, and after `open` failed.

        `remove` also removes from the host all that this owner made, even while clones use it;
        without it taps and bridge stay for the next daemon. Raises HostError.
        """

    def attach(self, port: Port, index: int, forwards: Sequence[Forward] = ()) -> Attachment:
        """How the NIC of the clone `index` is connected to a port. Does no I/O.

        Raises InvalidRequest when the port cannot serve this, ValueError for an index without
        an address; the port stays as it was.
        """


def check_tag(tag: str) -> None:
    """Raises InvalidRequest when `tag` cannot be part of an interface's name."""
    if not _TAG.fullmatch(tag):
        raise InvalidRequest(
            f"bad port tag {tag!r}",
            hint="1 to 13 of a-z, 0-9 and dash, not a dash first",
        )


@contextmanager
def host_errors(action: str, *, missing: str = "") -> Iterator[None]:
    """Turn an OSError into a HostError: `action` failed, `missing` helps if something lacks."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        hint = missing if error.errno in _MISSING else ""
        if error.errno in _FORBIDDEN:
            hint = "run the daemon as root, or give it CAP_NET_ADMIN"
        raise HostError(f"cannot {action}: {reason}", hint=hint) from error
