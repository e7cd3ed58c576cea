"""An egress between two hosts: what both must agree on, and what each sees of the other."""

from __future__ import annotations

from ipaddress import IPv4Network
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner, Result
from prometheus_client import CollectorRegistry

from templated.cli.egress import egress
from templated.cli.options import Settings
from templated.drivers.configfile import parse_egress
from templated.drivers.egress import vxlan
from templated.drivers.egress.programs import Files, conntrackd_config, keepalived_config
from templated.drivers.egress.remote import Remote
from templated.drivers.egress.rules import ruleset
from templated.errors import ConfigError, InvalidRequest
from templated.model.egress import (
    EgressSpec,
    EgressView,
    ForwarderSpec,
    ForwarderView,
    LaneState,
    Peer,
    Role,
    link_plan,
)
from templated.services.egress.lane import Lane
from templated.services.reports.egress_metrics import EgressMetrics
from tests.unit.test_egress import GOOD, LINKS, spec

HOSTS = [
    {"address": "10.9.0.1", "clones": "10.78.0.0/16"},
    {"address": "10.9.0.2", "clones": "10.79.0.0/16"},
]
TWO: dict[str, Any] = {"hosts": HOSTS, "link": 200}
FILE = """\
name: acme
interface: eth1.20
address: 172.20.0.100/24
gateway: 172.20.0.1
to: [172.20.0.0/16]
link: 200
hosts:
  - {address: 10.9.0.1, clones: 10.78.0.0/16}
  - {address: 10.9.0.2, clones: 10.79.0.0/16}
"""


def forwarder(side: int) -> ForwarderSpec:
    """As the daemon of one of the hosts writes it; their owners differ."""
    owner = f"owner{side}"
    plan = link_plan(LINKS, 200, owner, side=side)
    return ForwarderSpec(
        egress=spec(**TWO),
        number=side,
        owner=f"templated:{owner}",
        index=plan.index,
        link=str(plan.network),
        inside=plan.inside,
        sync=plan.sync,
        clones=HOSTS[side - 1]["clones"],
        links=str(LINKS),
        directory=f"/run/templated/egress/acme-{side}",
    )


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"hosts": HOSTS[:1]}, "has two"),
        ({"hosts": HOSTS * 2}, "has two"),
        ({"forwarders": 1}, "a forwarder on each"),
        ({"max": 2}, "one lane"),
        ({"link": None}, "free on both hosts"),
        ({"hosts": []}, "chooses its link by itself"),
        ({"link": 256}, "link"),
        ({"hosts": [HOSTS[0], HOSTS[1] | {"address": "10.9.0.1"}]}, "both have the address"),
        ({"hosts": [HOSTS[0], HOSTS[1] | {"address": "10.9.0.400"}]}, "10.9.0.400"),
        ({"hosts": [HOSTS[0], HOSTS[1] | {"clones": "10.78.1.0/24"}]}, "of both are in"),
        ({"hosts": [HOSTS[0], HOSTS[1] | {"clones": "172.20.0.0/26"}]}, "overlaps the clones'"),
        ({"hosts": [HOSTS[0], HOSTS[1] | {"port": 7}]}, "port"),
    ],
)
def test_what_is_refused(change: dict[str, object], says: str) -> None:
    """Each names what is wrong, in one line."""
    with pytest.raises(msgspec.ValidationError) as caught:
        spec(**(TWO | change))
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_rows_of_before() -> None:
    """What the journal has of an egress that knows nothing of hosts is read, as it was meant."""
    old = msgspec.json.decode(msgspec.json.encode(GOOD), type=EgressSpec)
    assert (old.hosts, old.link) == ((), None)
    assert old.seats(IPv4Network("10.78.0.0/16")) == [1, 2]
    told = msgspec.json.decode(b'{"number": 1, "role": "standby"}', type=ForwarderView)
    assert told.peer is Peer.NONE


def test_what_both_agree_on() -> None:
    """Links, numbers of networks and of the virtual router; names and marks are each one's own."""
    one, two = forwarder(1), forwarder(2)
    assert (one.plan.host, two.plan.host) == ("100.127.12.129", "100.127.12.142")
    assert one.plan.network == two.plan.network and one.plan.shared == two.plan.shared
    assert one.plan.inside != two.plan.inside
    assert one.sources == two.sources
    assert one.sources == {"10.78.0.0/16": one.plan.host, "10.79.0.0/16": two.plan.host}
    rules = [vxlan.rules(each.plan, "10.9.0.1", "10.9.0.2", "templated:x") for each in (one, two)]
    assert len({text.split("th,96,24")[1].splitlines()[0] for text in rules}) == 1
    assert len(one.plan.tunnel(sync=True)) <= 15
    files = Files(Path("/run/x"))
    first, second = (keepalived_config(each, files) for each in (one, two))
    assert first.replace("acme-1", "acme-2") == second
    assert "Destination_Address 169.254.77.2" in conntrackd_config(one, files)
    assert "ip saddr != { 10.78.0.0/16, 10.79.0.0/16 }" in ruleset(one)
    assert ruleset(one) == ruleset(two)


def test_which_host_this_is() -> None:
    """By the clones of each, which no two have in common."""
    assert spec(**TWO).seats(IPv4Network("10.79.0.0/16")) == [2]
    assert spec(**TWO).seats(IPv4Network("10.80.0.0/16")) == []


@pytest.mark.parametrize(
    ("role", "peer", "active", "standby", "serves"),
    [
        (Role.ACTIVE, Peer.UNSEEN, 2, None, True),
        (Role.ACTIVE, Peer.SEEN, 2, 1, True),
        (Role.ACTIVE, Peer.SENDS, 2, None, True),  # for a moment after a takeover
        (Role.STANDBY, Peer.SENDS, 1, 2, True),
        (Role.STANDBY, Peer.SEEN, None, 2, False),
        (Role.FAULT, Peer.SENDS, 1, None, False),
        (Role.GONE, Peer.UNSEEN, None, None, False),
    ],
)
def test_what_the_second_sees(
    role: Role, peer: Peer, active: int | None, standby: int | None, serves: bool
) -> None:
    """Who sends and who could, of both hosts."""
    remote = Remote(forwarder(2), lambda _: None)
    remote.view = ForwarderView(number=2, role=role, peer=peer)
    plan = link_plan(LINKS, 200, "owner2", side=2)
    lane = Lane(plan, (1024, 65535), [remote], LaneState.SERVING)
    assert (lane.active_number, lane.standby_number, lane.serves) == (active, standby, serves)
    unseen = "forwarder 1, on host 10.9.0.1, is not seen"
    assert (unseen in list(lane.problems())) == (peer is Peer.UNSEEN)


@pytest.mark.parametrize(("peer", "up"), [(Peer.SENDS, 1), (Peer.SEEN, 1), (Peer.UNSEEN, 0)])
def test_the_other_host_in_metrics(peer: Peer, up: int) -> None:
    """An alert names a forwarder that could not take over, also one that no daemon here hears."""
    registry = CollectorRegistry()
    view: dict[str, Any] = {"name": "acme", "interface": "eth1", "address": "172.20.0.100/24"}
    view |= {"gateway": "172.20.0.1", "to": [], "internet": True, "state": "active", "active": 1}
    view["forwarders"] = []
    view |= {"lanes": [], "min": 1, "max": 1, "failovers": 0, "mark": 7, "link": "", "created": ""}
    view |= {"hosts": HOSTS, "here": 1, "peer": peer}
    EgressMetrics(registry).show(msgspec.convert(view, EgressView))
    labels = {"egress": "acme", "forwarder": "2"}
    assert registry.get_sample_value("templated_egress_forwarder_up", labels) == up


def test_files() -> None:
    """YAML as of templates: errors have the line."""
    assert parse_egress(FILE, "acme.yaml") == spec(**(TWO | {"to": ["172.20.0.0/16"]}))
    with pytest.raises(ConfigError, match=r"acme\.yaml:8: .*clones"):
        parse_egress(FILE.replace("10.78.0.0/16", "here"), "acme.yaml")
    with pytest.raises(ConfigError, match=r"acme\.yaml:3: the key 'name' stands here twice"):
        parse_egress(FILE.replace("address: 172", "name: x\naddress: 172"), "acme.yaml")
    with pytest.raises(ConfigError, match="one lane"):
        parse_egress(FILE + "max: 2\n", "acme.yaml")


def _create(line: str) -> Result:
    return CliRunner().invoke(egress, ["create", *line.split()], obj=Settings(), input=FILE)


def test_mistakes_in_commands() -> None:
    """They are told before anybody asks a daemon."""
    for line, part in (
        ("other -f -", "the name in stdin is acme"),
        ("acme -f - --interface eth1", "-f and --interface exclude each other"),
        ("acme -f - --internet", "-f and --internet exclude each other"),
    ):
        error = _create(line).exception
        assert isinstance(error, InvalidRequest) and part in error.message
    for line, part in (
        ("", "Missing argument 'NAME'"),
        ("acme", "Missing option '--interface'"),
        ("acme --interface eth1 --address 172.20.0.1/24", "option '--gateway'"),
    ):
        done = _create(line)
        assert done.exit_code == 2 and part in done.output
