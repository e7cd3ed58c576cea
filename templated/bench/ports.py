"""`bench ports`: ports with a policy, made one after the other, and changed all at once."""

from __future__ import annotations

import asyncio
import os
import statistics
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager

from templated.drivers.network import Network, make_network, nft
from templated.drivers.network.worker import in_namespace
from templated.errors import HostError
from templated.model.network import AddressPlan, BridgeNetwork, Exit
from templated.model.policy import PolicyKeys, PolicyLimits, policy_of

_ENDS = 25
"""How many of the first and of the last ports are compared."""
_GROUP, _OTHER = "t.bench", "f.bench.other"
_MOVES = 50
"""How many ports move to another group, one after the other, by either way."""


def measure(n: int) -> dict[str, float]:
    """Milliseconds of n ports: all, the first, the last, and a change of policy for all of them.

    And of a port that moves to another group: as in a start, and by a process of nft.

    Raises HostError when there are no rights to make a namespace; leaves none.
    """
    with _namespace() as name:
        return asyncio.run(_measure(name, n))


async def _measure(namespace: str, n: int) -> dict[str, float]:
    config = BridgeNetwork(netns=namespace, subnet="10.78.0.0/16")
    network = make_network(config, AddressPlan(config.subnet, b"bench"), "bench")
    limits = PolicyLimits(bandwidth="10MiB", packets=10000, connections=1000)
    keys = PolicyKeys(egress="nat", allow=("10.0.0.0/8", "192.0.2.1:443"), limits=limits)
    await network.set_policies({_GROUP: policy_of(keys, config)})
    await network.open()
    try:
        took = [await _made(network, number) for number in range(n)]
        await network.set_policies({_OTHER: policy_of(keys, config)})
        by_nft = [_moved_by_nft(namespace, config, number) for number in range(_MOVES)]
        moves = [await _moved(network, number) for number in range(_MOVES)]
        bound = policy_of(PolicyKeys(egress="acme", limits=limits), config)
        await network.set_exits([Exit("acme", 77, "lo")])
        began = time.perf_counter()
        await network.set_policies({_GROUP: bound})
        binding = time.perf_counter() - began
    finally:
        await network.close(remove=True)
    first, last = (statistics.median(part) for part in (took[:_ENDS], took[-_ENDS:]))
    return {
        "ports": n,
        "all_s": round(sum(took), 2),
        "first_ms": round(first * 1000, 2),
        "last_ms": round(last * 1000, 2),
        "last_to_first": round(last / first, 2),
        "binding_ms": round(binding * 1000, 1),
        "move_ms": round(statistics.median(moves) * 1000, 2),
        "move_max_ms": round(max(moves) * 1000, 2),
        "move_by_nft_ms": round(statistics.median(by_nft) * 1000, 2),
    }


async def _moved(network: Network, number: int) -> float:
    began = time.perf_counter()
    await network.move_port(f"b{number}", (_OTHER, _GROUP))
    return time.perf_counter() - began


def _moved_by_nft(namespace: str, config: BridgeNetwork, number: int) -> float:
    """There and back, so that the network has what it knows; seconds of one way."""
    plan = AddressPlan(config.subnet, b"bench")
    segment = nft.Segment(config.bridge, config.subnet, plan.gateway, nat=False)
    there, back = (
        set(nft.elements(segment, nft.Member(f"tpb{number}", plan.mac(number), plan.ip(number), g)))
        for g in (_OTHER, _GROUP)
    )

    def work() -> float:
        began = time.perf_counter()
        nft.apply(nft.moved(segment, back - there, there - back) + "\n")
        nft.apply(nft.moved(segment, there - back, back - there) + "\n")
        return (time.perf_counter() - began) / 2

    return in_namespace(namespace, work)


async def _made(network: Network, number: int) -> float:
    began = time.perf_counter()
    port = await network.make_port(f"b{number}", number, (_GROUP,))
    took = time.perf_counter() - began
    port.close()
    return took


@contextmanager
def _namespace() -> Iterator[str]:
    name = f"templated-bench-{os.getpid()}"
    _ip("netns", "add", name)
    try:
        command = "echo 1 > /proc/sys/net/ipv4/ip_forward"
        _ip("netns", "exec", name, "sh", "-c", command)
        yield name
    finally:
        _ip("netns", "del", name)


def _ip(*arguments: str) -> None:
    done = subprocess.run(
        ["ip", *arguments], capture_output=True, text=True, timeout=60, check=False
    )
    if done.returncode != 0:
        said = done.stderr.strip().splitlines()
        raise HostError(
            f"ip {arguments[0]} failed: {said[0] if said else done.returncode}", hint="run as root"
        )
