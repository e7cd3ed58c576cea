"""QEMU's own network stack. Nothing of it is on the host, so most of this does nothing."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence

from templated.drivers.network.base import Forward, Port, check_tag
from templated.errors import InvalidRequest
from templated.model.network import AddressPlan, UserNetwork


class SlirpNetwork:
    """One slirp per VM, see `templated.drivers.network.base.Network`."""

    def __init__(self, config: UserNetwork, plan: AddressPlan) -> None:
        self._restrict = config.restrict
        self._plan = plan

    async def open(self) -> None:
        pass

    async def make_port(self, tag: str, index: int | None = None) -> Port:
        check_tag(tag)
        return Port(tag, index=index)

    async def drop_port(self, tag: str) -> None:
        pass

    async def sweep(self, keep: set[str]) -> list[str]:
        return []

    async def close(self, *, remove: bool) -> None:
        pass

    def netdev(
        self, port: Port, index: int, forwards: Sequence[Forward] = ()
    ) -> tuple[str, tuple[int, ...]]:
        plan, address = self._plan, self._plan.ip(index)
        options = [
            "user,id=net0",
            # IPv6 would be on by itself, beside the only address that the clone is told.
            "ipv6=off",
            f"net={plan.network},host={plan.gateway},dns={plan.dns}",
            # A guest that asks by DHCP gets the same address as one that is told.
            f"dhcpstart={address}",
            f"restrict={'on' if self._restrict else 'off'}",
        ]
        # The guest's address is named: slirp would forward to dhcpstart of its own defaults.
        options += [_hostfwd(forward, address) for forward in forwards]
        return ",".join(options), ()


def _hostfwd(forward: Forward, guest: str) -> str:
    """Raises InvalidRequest: a comma in the address would be an option of its own to QEMU."""
    try:
        host = ipaddress.IPv4Address(forward.host_address)
        if not (0 <= forward.host_port <= 65535 and 1 <= forward.guest_port <= 65535):
            raise ValueError("ports are 1 to 65535")
    except ValueError as error:
        raise InvalidRequest(f"bad port forward: {error}") from None
    return f"hostfwd={forward.protocol}:{host}:{forward.host_port}-{guest}:{forward.guest_port}"
