"""A network stack inside each VM's process. Most methods do nothing, as the host has no part."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping, Sequence

from templated.drivers.network.base import Counted, HostFacts, Port, PortOwner, Way, check_tag
from templated.errors import InvalidRequest
from templated.model.network import AddressPlan, Exit, Forward, Slirp, UserNetwork
from templated.model.policy import Policy


class SlirpNetwork:
    """One slirp per VM, see `templated.drivers.network.base.Network`."""

    def __init__(self, config: UserNetwork, plan: AddressPlan) -> None:
        self._restrict = config.restrict
        self._plan = plan

    @property
    def stalled(self) -> float:
        return 0.0

    @property
    def exits(self) -> tuple[Exit, ...]:
        return ()

    async def open(self, ports: Mapping[str, PortOwner] | None = None) -> None:
        pass

    async def make_port(
        self, tag: str, index: int | None = None, groups: tuple[str, ...] = ()
    ) -> Port:
        check_tag(tag)
        return Port(tag, index=index)

    async def drop_port(self, tag: str) -> None:
        pass

    async def sweep(self, keep: set[str]) -> list[str]:
        return []

    async def move_port(self, tag: str, groups: tuple[str, ...]) -> None:
        pass

    async def set_policies(self, changes: Mapping[str, Policy | None]) -> None:
        if any(policy is not None for policy in changes.values()):
            raise InvalidRequest("a network of mode user has no policies", hint="use mode: bridge")

    async def publish(self, ports: Mapping[tuple[str, int], tuple[str, int]]) -> None:
        pass

    async def counters(self) -> dict[str, dict[str, Counted]]:
        return {}

    async def host(self) -> HostFacts:
        return HostFacts(frozenset(), frozenset())

    async def way(self, address: str, mark: int = 0) -> Way:
        raise InvalidRequest("VMs of a network of mode user have routes of their own")

    async def set_exits(self, exits: Sequence[Exit]) -> None:
        pass

    async def close(self, *, remove: bool) -> None:
        pass

    def attach(self, port: Port, index: int, forwards: Sequence[Forward] = ()) -> Slirp:
        return Slirp(
            subnet=str(self._plan.network),
            gateway=self._plan.gateway,
            dns=self._plan.dns,
            address=self._plan.ip(index),
            restrict=self._restrict,
            forwards=tuple(_checked(forward) for forward in forwards),
        )


def _checked(forward: Forward) -> Forward:
    """The forward, its address in its usual form. Raises InvalidRequest for one that is none."""
    try:
        address = ipaddress.IPv4Address(forward.host_address)
        if not (0 <= forward.host_port <= 65535 and 1 <= forward.guest_port <= 65535):
            raise ValueError("ports are 1 to 65535")
    except ValueError as error:
        raise InvalidRequest(f"bad port forward: {error}") from None
    return forward._replace(host_address=str(address))
