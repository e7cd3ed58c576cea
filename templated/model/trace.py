"""What would happen to a packet that a clone sends, step by step: `templated net trace`.

It follows the rules that nftables is given (`templated.model.rules`), over the route that the
kernel names.
"""

from __future__ import annotations

from collections.abc import Sequence
from ipaddress import IPv4Network
from typing import NamedTuple

from templated.model.network import Exit
from templated.model.policy import NAT, Policy, Step
from templated.model.rules import Flow, Rule, hosting, judge, leaving, reaching


class Place(NamedTuple):
    """What of the clones' network the way depends on."""

    bridge: str
    subnet: str
    gateway: str


def trace(policy: Policy, exits: Sequence[Exit], place: Place, flow: Flow) -> list[Step]:
    """The steps of the first packet of a connection; the last says whether it passes.

    Of a packet that the port's own address sends. Limits are named, and taken as kept.
    """
    steps = [Step(at="port", passes=True, says="it comes from the clone's own MAC and address")]
    steps += _limits(policy)
    if flow.target in IPv4Network(place.subnet) and str(flow.target) != place.gateway:
        return [*steps, _bridged(policy, flow)]
    if not flow.leaves:
        return [*steps, _step("host", judge(hosting(place.gateway), flow))]
    steps.append(_route(flow))
    found = judge(leaving(policy, exits, place.bridge, ""), flow)
    steps.append(_step("leave", found, f"egress: {policy.egress} leads by {flow.leaves}"))
    if not steps[-1].passes:
        return steps
    steps.append(_step("reach", judge(reaching(policy), flow)))
    if steps[-1].passes:
        steps.append(_last(policy, flow))
    return steps


def _limits(policy: Policy) -> list[Step]:
    """What a packet beyond would be dropped for; what the clone has used is not known here."""
    said = [
        f"{number:,} {unit}"
        for number, unit in (
            (policy.packets, "packets a second"),
            (policy.bandwidth, "bytes a second"),
            (policy.connections, "connections"),
        )
        if number is not None
    ]
    if not said:
        return []
    return [Step(at="limits", passes=True, says=f"while it keeps to {', '.join(said)}")]


def _bridged(policy: Policy, flow: Flow) -> Step:
    if policy.peers and flow.to_peer:
        return Step(at="bridge", passes=True, says="to a peer: a clone of the same group")
    kind = "open, and this is no clone of its group" if policy.peers else "isolated"
    return Step(at="bridge", passes=False, says=f"peers: {kind}", counter="peers")


def _route(flow: Flow) -> Step:
    return Step(at="route", passes=True, says=f"the host routes it by {flow.leaves}")


def _step(at: str, rule: Rule | None, otherwise: str = "") -> Step:
    if rule is None:
        return Step(at=at, passes=True, says=otherwise)
    return Step(at=at, passes=rule.drop is None, says=rule.says, counter=rule.drop or "")


def _last(policy: Policy, flow: Flow) -> Step:
    if policy.egress == NAT:
        return Step(at="egress", passes=True, says=f"masqueraded, it leaves by {flow.leaves}")
    return Step(at="egress", passes=True, says=f"to the forwarders of {policy.egress}")
