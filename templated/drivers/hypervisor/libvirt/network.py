"""What VMs may have of a network of libvirt: addresses that its DHCP does not hand out.

Source: https://libvirt.org/formatnetwork.html, "Addressing".
"""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Iterator
from ipaddress import AddressValueError, IPv4Address, IPv4Network, NetmaskValueError
from xml.etree.ElementTree import Element

from templated.errors import HostError
from templated.model.network import Addresses, parse_subnet


def addresses_of(name: str, xml: str) -> Addresses:
    """The longest row of addresses that nobody else is given. Pure.

    Raises HostError when there is none, or the network has no IPv4 subnet that can be used.
    """
    network = ET.fromstring(xml)  # noqa: S314 - by libvirtd, which is root
    try:
        ip = next(_subnets(network))
        mask = ip.get("netmask") or ip.get("prefix") or "24"
        gateway = IPv4Address(ip.get("address", ""))
        subnet = parse_subnet(str(IPv4Network(f"{gateway}/{mask}", strict=False)))
        free = max(_free(subnet, gateway, ip), key=len)
    except StopIteration:
        raise HostError(
            f"network {name} of libvirt has no IPv4 subnet",
            hint="VMs are told their addresses: take a network with an <ip> of its own",
        ) from None
    except (AddressValueError, NetmaskValueError, ValueError) as error:
        raise HostError(f"network {name} of libvirt cannot be used: {error}") from error
    if not free:
        raise HostError(
            f"network {name} of libvirt leaves no address: its DHCP hands out all of {subnet}",
            hint=f"virsh net-edit {name}: end the range in the middle; then net-destroy, net-start",
        )
    return Addresses(
        subnet=str(subnet),
        gateway=str(gateway),
        first=str(IPv4Address(free[0])),
        last=str(IPv4Address(free[-1])),
    )


def _subnets(network: Element) -> Iterator[Element]:
    return (ip for ip in network.iterfind("ip") if ip.get("family", "ipv4") == "ipv4")


def _free(subnet: IPv4Network, gateway: IPv4Address, ip: Element) -> Iterator[range]:
    """What is left between the addresses that are taken."""
    at = int(subnet.network_address) + 1
    for first, last in sorted(_taken(gateway, ip)):
        yield range(at, max(at, first))
        at = max(at, last + 1)
    yield range(at, max(at, int(subnet.broadcast_address)))


def _taken(gateway: IPv4Address, ip: Element) -> Iterator[tuple[int, int]]:
    yield int(gateway), int(gateway)
    for given in ip.iterfind("dhcp/range"):
        yield int(IPv4Address(given.get("start", ""))), int(IPv4Address(given.get("end", "")))
    for host in ip.iterfind("dhcp/host"):
        if (address := host.get("ip")) is not None:
            yield int(IPv4Address(address)), int(IPv4Address(address))
