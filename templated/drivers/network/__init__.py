"""Networks of clones: slirp inside each QEMU, or taps on a bridge of the host."""

from __future__ import annotations

from templated.drivers.network.base import Network, Port, PortOwner
from templated.drivers.network.user import SlirpNetwork
from templated.model.network import AddressPlan, NetworkConfig, UserNetwork

__all__ = ["Network", "Port", "PortOwner", "make_network"]


def make_network(config: NetworkConfig, plan: AddressPlan, owner: str) -> Network:
    """The driver for `config`, not opened yet.

    `owner` names this daemon's installation, in letters, digits and dashes. It must stay the
    same over restarts: interfaces that carry it are the only ones ever removed.
    Call this before the event loop runs: for a bridge it imports pyroute2, which reads files.
    """
    if isinstance(config, UserNetwork):
        return SlirpNetwork(config, plan)
    # Imported here, since pyroute2 takes longer to import than all the rest of the daemon's
    # network code, and user mode never needs it.
    from templated.drivers.network.bridge import TapNetwork

    return TapNetwork(config, plan, owner)
