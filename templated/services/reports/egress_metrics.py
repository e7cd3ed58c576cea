"""Prometheus metrics of egresses. Names are fixed, as in `metrics`."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge

from templated.drivers.egress.rules import DROPS, GUARD
from templated.model.egress import EgressView, ForwarderView, LaneState, Peer, Role

_WAYS = ("out", "in")
_STATES = ("egress", "state")
_GOOD = (Role.ACTIVE, Role.STANDBY)


class EgressMetrics:
    """What forwarders tell, each time they do; and what becomes of them."""

    def __init__(self, registry: CollectorRegistry) -> None:
        one = ("egress",)

        def gauge(name: str, text: str, labels: tuple[str, ...] = one) -> Gauge:
            return Gauge(f"templated_egress_{name}", text, labels, registry=registry)

        def counter(name: str, text: str, labels: tuple[str, ...] = one) -> Counter:
            return Counter(f"templated_egress_{name}", text, labels, registry=registry)

        self._active = gauge(
            "active_forwarder", "The forwarder of the first lane that sends; 0: none does."
        )
        self._lanes = gauge(
            "lanes", "Lanes that take new flows, and that wait for the end of theirs.", _STATES
        )
        self._up = gauge(
            "forwarder_up",
            "1 while a forwarder is the active one or a standby that could take over.",
            ("egress", "forwarder"),
        )
        self._flows = gauge("flows", "Flows that the active forwarders track.")
        self._lag = gauge("flows_behind", "Flows that the standbys do not have a copy of.")
        self.failovers = counter("failovers", "How often another forwarder became active.")
        self._contested = counter(
            "contested", "Takeovers while the one before still sent: the links are cut."
        )
        self._restarts = counter("restarts", "keepalived or conntrackd, started again.")
        self._exhausted = counter(
            "flows_refused",
            "Flows that got no port of the fixed address, or no place in the table.",
        )
        both = ("egress", "direction")
        self._packets = counter("packets", "Packets forwarded.", both)
        self._bytes = counter("bytes", "Bytes forwarded.", both)
        self._dropped = counter("dropped", "Packets dropped, by reason.", ("egress", "reason"))
        self._all = (
            *(self._active, self._up, self._flows, self._lag, self.failovers, self._contested),
            *(self._restarts, self._exhausted, self._packets, self._bytes, self._dropped),
            self._lanes,
        )

    def count(self, egress: str, now: ForwarderView, before: ForwarderView | None) -> None:
        """Count what is new of a forwarder, of which the first view is only the beginning."""
        self._expect(egress)
        if before is None:
            return
        # One that was started again counts from zero.
        old = before if before.pid == now.pid else ForwarderView(number=now.number, role=now.role)
        if now.pid == 0:
            return
        for name, (packets, size) in now.counters.items():
            past = old.counters.get(name, (0, 0))
            if name in _WAYS:
                self._packets.labels(egress, name).inc(max(0, packets - past[0]))
                self._bytes.labels(egress, name).inc(max(0, size - past[1]))
            else:
                reason = name.removeprefix("drop_")
                self._dropped.labels(egress, reason).inc(max(0, packets - past[0]))
        self._contested.labels(egress).inc(max(0, now.contested - old.contested))
        self._restarts.labels(egress).inc(max(0, now.restarts - old.restarts))
        self._exhausted.labels(egress).inc(max(0, now.exhausted - old.exhausted))

    def show(self, view: EgressView) -> None:
        """What an egress is at present."""
        self._active.labels(view.name).set(view.active or 0)
        for one in view.forwarders:
            self._up.labels(view.name, str(one.number)).set(one.role in _GOOD)
        if view.here is not None:
            seen = view.peer in (Peer.SENDS, Peer.SEEN)
            self._up.labels(view.name, str(3 - view.here)).set(seen)
        copies = {one.lane: one.flows for one in view.forwarders if one.role is Role.STANDBY}
        behind = [lane.flows - copies.get(lane.number, lane.flows) for lane in view.lanes]
        self._lag.labels(view.name).set(sum(max(0, one) for one in behind))
        self._flows.labels(view.name).set(sum(lane.flows for lane in view.lanes))
        for state in LaneState:
            there = sum(lane.state is state for lane in view.lanes)
            self._lanes.labels(view.name, state.value).set(there)

    def forget_forwarder(self, egress: str, number: int) -> None:
        """A forwarder has gone with its lane."""
        self._up.remove_by_labels({"egress": egress, "forwarder": str(number)})

    def forget(self, egress: str) -> None:
        """An egress has gone."""
        for metric in self._all:
            metric.remove_by_labels({"egress": egress})

    def _expect(self, egress: str) -> None:
        """Show zeros: a series that begins with 1 has no rate."""
        for metric in (self.failovers, self._contested, self._restarts, self._exhausted):
            metric.labels(egress)
        for reason in (*DROPS, GUARD):
            self._dropped.labels(egress, reason)
        for way in _WAYS:
            self._packets.labels(egress, way)
            self._bytes.labels(egress, way)
