"""A network stack inside each VM's process. Most methods do nothing, as the host has no part."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence

from templated.drivers.network.base import Port, check_tag
from templated.errors import InvalidRequest
from templated.model.network import AddressPlan, Exit, Forward, Slirp, UserNetwork


class SlirpNetwork:
    """One slirp per VM, see `templated.drivers.network.base.Network`."""

    def __init__(self, config: UserNetwork, plan: AddressPlan) -> None:
        self._restrict = config.restrict
        self._plan = plan

    @property
    def stalled(self) -> float:
        return 0.0

    async def open(self) -> None:
        pass

    async def make_port(self, tag: str, index: int | None = None) -> Port:
        check_tag(tag)
        return Port(tag, index=index)

    async def drop_port(self, tag: str) -> None:
        pass

    async def sweep(self, keep: set[str]) -> list[str]:
        return []

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
