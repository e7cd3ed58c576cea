"""What policies do, as users see it: views, traces, and metrics."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Iterator, Mapping
from ipaddress import IPv4Address, IPv4Network

from prometheus_client import CollectorRegistry, Counter

from templated.drivers.network.base import Counted
from templated.errors import Conflict, HostError, NotFound
from templated.model.network import BridgeNetwork, Exit
from templated.model.policy import (
    NAT,
    NONE,
    Policy,
    PolicyLimits,
    PolicyView,
    Step,
    TraceView,
    parse_target,
)
from templated.model.rules import PASSED, REASONS, Flow
from templated.model.trace import Place, trace
from templated.services.clones.registry import Clones
from templated.services.context import Context
from templated.services.policies import Ruled
from templated.services.upkeep.publishing import holders

log = logging.getLogger(__name__)
INTERVAL = 5.0
"""Seconds between two readings of the counters."""
Counts = Mapping[str, Counted]
Ports = frozenset[tuple[str, int]]
"""Protocols and ports of the host."""


class PolicyMetrics:
    """The counters of policies, on the daemon's registry."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.packets = Counter(
            "templated_network_packets",
            "Packets that policies let clones send and receive through the host.",
            ("template", "function", "direction"),
            registry=registry,
        )
        self.bytes = Counter(
            "templated_network_bytes",
            "Bytes of these packets.",
            ("template", "function", "direction"),
            registry=registry,
        )
        self.dropped = Counter(
            "templated_network_dropped",
            "Packets of clones, or to them, that a policy dropped, by reason.",
            ("template", "function", "reason"),
            registry=registry,
        )

    def add(self, ruled: Ruled, now: Counts, before: Counts) -> None:
        """Count what is new. Tables that were made anew begin at zero."""
        owner = ruled.template, ruled.function
        for name, counted in now.items():
            old = before.get(name, Counted(0, 0))
            since = Counted(0, 0) if counted.packets < old.packets else old
            packets = counted.packets - since.packets
            if name in PASSED:
                self.packets.labels(*owner, name).inc(packets)
                self.bytes.labels(*owner, name).inc(max(0, counted.bytes - since.bytes))
            else:
                self.dropped.labels(*owner, name).inc(packets)

    def forget(self, ruled: Ruled) -> None:
        """Show nothing more of a policy that is gone."""
        for names, metric in (
            (PASSED, self.packets),
            (PASSED, self.bytes),
            (REASONS, self.dropped),
        ):
            for name in names:
                with contextlib.suppress(KeyError):
                    metric.remove(ruled.template, ruled.function, name)


class PolicyMeter:
    """Reads the kernel's counters now and then, beside all that starts."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._metrics = PolicyMetrics(context.metrics.registry)
        self._seen: dict[str, Counts] = {}
        self._owners: dict[str, Ruled] = {}

    async def run(self) -> None:
        """Read and publish, until cancelled. Raises nothing."""
        while True:
            try:
                if self._context.policies.all() or self._seen:
                    await self.look()
            except HostError as error:
                log.warning("cannot read what policies have counted: %s", error.message)
            except Exception:
                log.exception("cannot read what policies have counted")
            await asyncio.sleep(INTERVAL)

    async def look(self) -> None:
        """Read them once. Raises HostError."""
        counters, policies = await self._context.network.counters(), self._context.policies.all()
        for group in self._seen.keys() - policies.keys():
            self._metrics.forget(self._owners.pop(group))
        for group, ruled in policies.items():
            self._metrics.add(ruled, counters.get(group, {}), self._seen.get(group, {}))
            self._owners[group] = ruled
        self._seen = {group: counters.get(group, {}) for group in policies}


class Nets:
    """What the API shows of policies."""

    def __init__(self, context: Context, clones: Clones) -> None:
        self._context = context
        self._clones = clones

    async def views(self) -> list[PolicyView]:
        """The policies in force: those of templates, then those of functions. Raises HostError."""
        counted, taken = await self._counted(), await self._taken()
        return [self._view(*one, taken) for one in counted]

    async def view(self, name: str) -> PolicyView:
        """The policy of a template, a function, or a clone. Raises NotFound, HostError."""
        counted, taken = await self._counted(), await self._taken()
        of_clone = self._of_clone(name)
        named = [one for one in counted if (one[0].function or one[0].template) == name]
        for ruled, counts in named or [one for one in counted if one[0] is of_clone]:
            return self._view(ruled, counts, taken)
        raise NotFound(
            f"{name[:80]!r} has no network policy",
            hint="see: templated net ls; a template's is in its file, under network",
        )

    async def _counted(self) -> list[tuple[Ruled, Counts]]:
        """What is in force, ordered, and what it has counted."""
        counters = await self._context.network.counters()
        found = self._context.policies.all().items()
        ordered = sorted(found, key=lambda item: (item[1].function, item[1].template))
        return [(ruled, counters.get(group, {})) for group, ruled in ordered]

    async def _taken(self) -> Ports:
        """What programs of the host listen to; nobody asks when no port is published."""
        if any(ruled.policy.publish for ruled in self._context.policies.all().values()):
            return (await self._context.network.host()).listening
        return frozenset()

    def _of_clone(self, name: str) -> Ruled | None:
        clone = next((clone for clone in self._clones.views() if clone.name == name), None)
        if clone is None:
            return None
        return self._context.policies.get(clone.template, self._clones.function_of(name))

    def _view(self, ruled: Ruled, counted: Counts, taken: Ports) -> PolicyView:
        policy = ruled.policy
        running = holders(self._context, self._clones)
        holder = None if ruled.function else running.get(ruled.template)
        sent, received = (counted.get(key, Counted(0, 0))._asdict() for key in PASSED)
        return PolicyView(
            name=ruled.function or ruled.template,
            function=bool(ruled.function),
            template=ruled.template,
            egress=policy.egress,
            allow=tuple(map(str, policy.allow)),
            peers="open" if policy.peers else "isolated",
            publish=tuple(map(str, policy.publish)),
            published={str(p): holder.name for p in policy.publish} if holder else {},
            limits=ruled.keys.limits or PolicyLimits(),
            sent=sent,
            received=received,
            dropped={r: counted[r].packets for r in REASONS if r in counted and counted[r].packets},
            problem="; ".join(self._problems(policy, taken)),
        )

    def _problems(self, policy: Policy, taken: Ports) -> Iterator[str]:
        if policy.egress not in (NONE, NAT) and self._exit(policy) is None:
            yield f"egress {policy.egress} is not there: clones reach nothing"
        for port in policy.publish:
            if (port.protocol, port.host_port) in taken:
                named = f"{port.host_port}/{port.protocol}"
                yield f"a program of the host listens to port {named}, which is published here"

    def _exit(self, policy: Policy) -> Exit | None:
        exits = self._context.network.exits
        return next((one for one in exits if one.name == policy.egress), None)

    async def trace(self, name: str, target: str) -> TraceView:
        """What would happen to the first packet that a clone sends to ADDRESS[:PORT[/PROTO]].

        Raises NotFound for the clone, InvalidRequest for the target, Conflict when its VM is on no
        network of the daemon's that has policies, HostError when the kernel names no route.
        """
        clone, wanted = self._clones.view(name), parse_target(target)
        config = self._context.config.network
        if not isinstance(config, BridgeNetwork) or not self._on_bridge(clone.identity.ip):
            raise Conflict(
                f"clone {name} is not on the daemon's bridge, so its packets are not ours to judge",
                hint="policies need network: {mode: bridge} in the daemon's configuration",
            )
        ruled = self._of_clone(name)
        if ruled is None:
            says = f"template {clone.template} has no policy: all passes that the host routes"
            steps = [Step(at="policy", passes=True, says=says)]
        else:
            policy, plan = ruled.policy, self._context.plan
            place = Place(config.bridge, str(plan.network), plan.gateway)
            out = self._exit(policy)
            way = await self._context.network.way(str(wanted.address), out.mark if out else 0)
            peer = self._is_peer(wanted.address, ruled)
            leaves = "" if way.local else way.ifname or "no route"
            flow = Flow(wanted.address, wanted.protocol, wanted.port, leaves, peer)
            steps = trace(policy, self._context.network.exits, place, flow)
        return TraceView(
            clone=name,
            policy=ruled.owner if ruled else "",
            target=target,
            passes=steps[-1].passes,
            steps=tuple(steps),
        )

    def _on_bridge(self, ip: str) -> bool:
        return bool(ip) and IPv4Address(ip) in IPv4Network(str(self._context.plan.network))

    def _is_peer(self, address: IPv4Address, ruled: Ruled) -> bool:
        return any(
            view.identity.ip == str(address) and self._of_clone(view.name) is ruled
            for view in self._clones.views()
        )
