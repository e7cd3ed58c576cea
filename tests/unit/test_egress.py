"""What an egress may be, its links, its forwarders' rules, and what is counted of it."""

from __future__ import annotations

import contextlib
import itertools
import re
from ipaddress import IPv4Network
from pathlib import Path
from typing import Any

import msgspec
import pytest
from prometheus_client import CollectorRegistry

from templated.bench.egress import ROUNDS, goals
from templated.bench.netrig import FIXED
from templated.bench.report import show
from templated.drivers.egress import counters
from templated.drivers.egress import forwarder as program
from templated.drivers.egress.programs import Files, conntrackd_config, keepalived_config
from templated.drivers.egress.rules import DROPS, counter_names, guard, ruleset, steering
from templated.errors import InvalidRequest
from templated.model.egress import (
    MAX_EGRESSES,
    MAX_LANES,
    PORTS,
    EgressSpec,
    EgressState,
    EgressView,
    ForwarderSpec,
    ForwarderView,
    LaneState,
    LaneView,
    Role,
    check_overlap,
    link_plan,
)
from templated.model.network import EXIT_MASK, BridgeNetwork
from templated.services import doctor
from templated.services.egress.load import Pace, needed
from templated.services.reports.egress_metrics import EgressMetrics
from tests.unit.fake_daemon import configured

LINKS = IPv4Network("100.127.0.0/16")
GOOD: dict[str, Any] = {
    "name": "acme",
    "interface": "eth1.20",
    "address": "172.20.0.100/24",
    "gateway": "172.20.0.1",
    "to": ["172.20.0.0/16", "172.20.1.0/24"],
}


def spec(**change: object) -> EgressSpec:
    """One as the API takes it."""
    return msgspec.convert(GOOD | change, EgressSpec)


def forwarder(number: int = 1, **change: object) -> ForwarderSpec:
    """One as the daemon writes it."""
    plan = link_plan(LINKS, 3, "owner")
    return ForwarderSpec(
        egress=spec(**change),
        number=number,
        owner="templated:owner",
        index=plan.index,
        link=str(plan.network),
        inside=plan.inside,
        sync=plan.sync,
        clones="10.78.0.0/16",
        links=str(LINKS),
        directory="/run/templated/egress/acme-1",
    )


def test_networks_within_others_are_left_out() -> None:
    """As nft's sets want it."""
    assert spec().networks == [IPv4Network("172.20.0.0/16")]
    assert (spec().fixed, spec().outside) == ("172.20.0.100", IPv4Network("172.20.0.0/24"))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"name": "Acme"}, "name"),
        ({"name": "a" * 40}, "name"),
        ({"interface": "eth0; reboot"}, "interface"),
        ({"address": "172.20.0.100"}, "address"),
        ({"address": "172.20.0.300/24"}, "172.20.0.300"),
        ({"address": "172.20.0.100/31"}, "/8 to /30"),
        ({"address": "172.20.0.0/24"}, "the network itself"),
        ({"address": "172.20.0.255/24"}, "broadcast"),
        ({"gateway": "172.21.0.1"}, "gateway"),
        ({"gateway": "172.20.0.100"}, "gateway"),
        ({"to": []}, "leads somewhere"),
        ({"to": ["172.20.0.1/16"]}, "host bits"),
        ({"to": ["169.254.0.0/16"]}, "169.254.0.0/16"),
        ({"to": ["0.0.0.0/0"]}, "no egress leads"),
        ({"forwarders": 3}, "forwarders"),
        ({"min": 3, "max": 2}, "min: 3 is more than max, 2"),
        ({"max": MAX_LANES + 1}, "max"),
        ({"bandwidth": "fast"}, "bandwidth"),
        ({"mark": 7}, "mark"),
    ],
)
def test_what_is_refused(change: dict[str, object], says: str) -> None:
    """Each names what is wrong, in one line."""
    with pytest.raises(msgspec.ValidationError) as caught:
        spec(**change)
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_overlaps() -> None:
    """Neither where it leads nor where it is may be the host's own."""
    with pytest.raises(InvalidRequest, match="the clones' subnet"):
        check_overlap(spec(to=["10.0.0.0/8"]), {"the clones' subnet": IPv4Network("10.78.0.0/16")})
    with pytest.raises(InvalidRequest, match=r"172\.20\.0\.0/24 overlaps"):
        check_overlap(spec(to=["10.0.0.0/8"]), {"eth0's": IPv4Network("172.20.0.0/26")})


def test_plans_have_nothing_in_common() -> None:
    """Links, marks and names, of one daemon and of two; and names are short enough."""
    plans = [link_plan(LINKS, i, o) for o in ("a", "b") for i in range(1, MAX_EGRESSES + 1)]
    assert len({plan.mark for plan in plans}) == len({plan.inside for plan in plans}) == len(plans)
    assert len({plan.network for plan in plans}) == MAX_EGRESSES
    for plan in plans:
        assert len(plan.port(2, sync=True)) <= 15 and 0 < plan.mark < 1 << 31
    with pytest.raises(ValueError, match="no link"):
        link_plan(LINKS, MAX_EGRESSES + 1, "a")
    lanes = [link_plan(LINKS, 255, "a", lane) for lane in range(MAX_LANES)]
    assert len({one.network for one in (*plans[:MAX_EGRESSES], *lanes[1:])}) == 262
    assert len({lane.mark for lane in lanes}) == len({lane.inside for lane in lanes}) == MAX_LANES
    for lane in lanes:
        assert lane.mark & EXIT_MASK == lanes[0].mark and lane.mark < 1 << 31
        assert lane.inside.startswith(lanes[0].inside) and len(lane.port(2, sync=True)) <= 15
    with pytest.raises(ValueError, match="no link 4"):
        link_plan(IPv4Network("100.127.0.0/26"), 4, "a")


@pytest.mark.parametrize("most", range(1, MAX_LANES + 1))
def test_slices_of_ports(most: int) -> None:
    """They have nothing in common, and one alone has all."""
    slices = [spec(max=most).ports(lane) for lane in range(most)]
    assert slices[0][0] == PORTS[0] and PORTS[1] - most < slices[-1][1] <= PORTS[1]
    for (_, last), (first, _) in itertools.pairwise(slices):
        assert first == last + 1


def test_rules_of_other_lanes() -> None:
    """Each has its slice, is led its replies, and says nothing of the address outside."""
    one, three = (forwarder(number, max=2) for number in (1, 3))
    assert (one.lane, one.seat, three.lane, three.seat) == (0, 1, 1, 1)
    assert "snat to 172.20.0.100:1024-33279" in ruleset(one)
    assert "snat to 172.20.0.100:33280-65535" in ruleset(three)
    assert "arp saddr ip { 0.0.0.0 } accept" in guard(three, "0e:00:00:00:00:01")
    text = steering(three, "0e:00:00:00:00:01")
    assert "tcp dport 33280-65535 ether daddr set 0e:00:00:00:00:01" in text


def test_lanes_by_load() -> None:
    """By bytes and by ports; at once when there is more, and late when there is less."""
    four = spec(max=4, bandwidth="10MiB")
    assert [needed(four, rate << 20, 0) for rate in (0, 8, 9, 17, 1000)] == [1, 1, 2, 3, 4]
    assert [needed(four, 0, flows) for flows in (8064, 8065, 64512)] == [1, 2, 4]
    assert needed(spec(min=2, max=4), 0, 0) == 2
    pace = Pace(10)
    needs = {0: 1, 2: 3, 4: 2, 6: 1, 11: 1, 12: 1, 14: 1, 15: 4}
    assert [pace.wanted(at, n) for at, n in needs.items()] == [1, 3, 3, 3, 3, 2, 1, 4]


def test_every_drop_has_a_counter() -> None:
    """In a forwarder's rules, but for ARP; chains that forward drop what none lets pass."""
    text = ruleset(forwarder())
    used = set(re.findall(r"counter name (\w+)", text))
    assert used == set(counter_names()) and {f"drop_{reason}" for reason in DROPS} <= used
    for line in text.splitlines():
        if line.endswith(" drop") and "arp" not in line:
            assert "counter name drop_" in line, line
    assert text.count("policy drop;") == 3
    assert "counter name guard drop" in guard(forwarder(), "0e:00:00:00:00:01")


def test_the_two_talk_to_each_other() -> None:
    """conntrackd's source is the other's target; keepalived's differ by nothing but names."""
    files = Files(Path("/run/x"))
    one, two = (conntrackd_config(forwarder(n), files) for n in (1, 2))
    assert "IPv4_address 169.254.77.1" in one
    assert "IPv4_Destination_Address 169.254.77.1" in two
    first, second = (keepalived_config(forwarder(n), files) for n in (1, 2))
    assert first.replace("acme-1", "acme-2") == second and "nopreempt" in first


def test_counters_of_a_forwarder_that_was_started_again() -> None:
    """The first view is only the beginning, and a new process counts from zero."""
    registry = CollectorRegistry()
    metrics = EgressMetrics(registry)

    def view(pid: int, packets: int, contested: int = 0) -> ForwarderView:
        counters = {"out": (packets, 10 * packets), "drop_source": (1, 60)}
        return ForwarderView(
            number=1, role=Role.ACTIVE, pid=pid, counters=counters, contested=contested, flows=7
        )

    def sent() -> float | None:
        labels = {"egress": "acme", "direction": "out"}
        return registry.get_sample_value("templated_egress_packets_total", labels)

    metrics.count("acme", view(5, 100), None)
    assert sent() == 0
    metrics.count("acme", view(5, 130), view(5, 100))
    assert sent() == 30
    metrics.count("acme", view(6, 4), view(5, 130))
    metrics.count("acme", view(0, 4), view(6, 4))
    assert sent() == 34
    metrics.count("acme", view(6, 4, contested=2), view(6, 4))
    name = "templated_egress_contested_total"
    assert registry.get_sample_value(name, {"egress": "acme"}) == 2
    metrics.show(_egress(view(6, 4), ForwarderView(number=2, role=Role.STANDBY, flows=5)))
    behind = "templated_egress_flows_behind"
    assert registry.get_sample_value(behind, {"egress": "acme"}) == 2
    metrics.forget("acme")
    assert sent() is None and registry.get_sample_value(behind, {"egress": "acme"}) is None


def _lane(**change: Any) -> LaneView:
    fields: dict[str, Any] = {"number": 1, "state": LaneState.SERVING, "active": 1, "ports": PORTS}
    return LaneView(**(fields | {"flows": 0, "rate": 0} | change))


def _egress(*forwarders: ForwarderView) -> EgressView:
    return EgressView(
        name="acme",
        interface="eth1",
        address="172.20.0.100/24",
        gateway="172.20.0.1",
        to=("172.20.0.0/16",),
        internet=False,
        state=EgressState.ACTIVE,
        active=1,
        forwarders=forwarders,
        lanes=(_lane(flows=7),),
        min=1,
        max=1,
        failovers=0,
        mark=7,
        link="100.127.0.16/28",
        created="",
    )


def test_flows_that_found_no_port(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all processors; a kernel that says nothing says none."""
    stat = tmp_path / "nf_conntrack"
    monkeypatch.setattr(counters, "_STAT", stat)
    assert counters.flows_without_port() == 0
    stat.write_text(
        "entries  insert_failed drop\n00000004 00000008 00000009\n00000004 0 00000010\n"
    )
    assert counters.flows_without_port() == 25


def test_flows_that_are_refused_are_told_for_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the count that finds more of them, for some counts."""
    found = iter([0, 4, *[4] * program._REMEMBERED, 5])
    monkeypatch.setattr(program, "count", lambda spec: ({}, 0))
    monkeypatch.setattr(program, "inside", lambda namespace: contextlib.nullcontext())
    monkeypatch.setattr(program, "guarded", lambda spec: {})
    monkeypatch.setattr(program, "flows_without_port", lambda: next(found))
    made = program.Forwarder(forwarder(), Files(tmp_path), 0, 0)
    told = []
    for _ in range(program._REMEMBERED + 3):
        made._count()
        told.append("no port left" in made.view.error)
    assert told == [False, *[True] * program._REMEMBERED, False, True]


def test_doctor_names_what_lacks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """And its package."""
    config = msgspec.structs.replace(configured(tmp_path), network=BridgeNetwork())
    monkeypatch.setattr(doctor, "find", lambda name: None if name == "conntrackd" else name)
    (check,) = doctor._egresses(config)
    assert (check.status, check.fix) == ("WARN", "apt install conntrackd")
    assert "conntrackd not installed" in check.detail
    monkeypatch.setattr(doctor, "find", lambda name: name)
    assert [one.status for one in doctor._egresses(config)] == ["PASS"]


def _report(**change: object) -> dict[str, Any]:
    row = {"flows_lost": 0, "sources": [FIXED], "n": 3, "p50": 51.0, "p99": 55.0, "max": 56.0}
    made: dict[str, Any] = {key: dict(row) for key in ROUNDS}
    made |= {"kind": "egress", "flows": 1000, "create_s": 1.5, "churn": {"rounds": 3}}
    made["throughput"] = {"egress_gbit": 5.0, "by_hand_gbit": 5.1, "ratio": 0.98}
    lanes = {"grown_s": 6.5, "load": 500, "flows_of_lanes": [150, 60, 40]}
    made["scaling"] = row | lanes | {"flows": 200}
    made["lanes_throughput"] = {"one_gbit": 4.0, "two_gbit": 5.0, "ratio": 1.25}
    made |= {"packets_seen": 9000, "wrong_sources": 0, "host": {"cpus": 2, "load": 0.5}}
    return made | change


def test_report_of_the_bench(capsys: pytest.CaptureFixture[str]) -> None:
    """A table, and a line for each goal that is missed."""
    show(_report())
    said = capsys.readouterr().out
    assert "planned switch" in said and "9000 packets, 0 of a wrong source" in said
    assert "missed" not in said and goals(_report()) == []
    clones = {"starts": 9, "paths": {"warm": 4, "direct": 5}, "packets": 8}
    show(_report(clones=clones))
    said = capsys.readouterr().out
    assert "9 clones (4 warm, 5 direct) sent 8 packets" in said and said.count("missed") == 1
    bad = _report(
        cut={"flows_lost": 2, "sources": [FIXED], "p99": 301.0, "max": 400.0},
        switch={"flows_lost": 0, "sources": [FIXED, "10.78.0.3"], "p99": 55.0, "max": 61.0},
        throughput={"egress_gbit": 1.0, "by_hand_gbit": 2.0, "ratio": 0.5},
        wrong_sources=1,
    )
    assert len(goals(bad)) == 6
