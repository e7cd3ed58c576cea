"""Policies of functions over those of templates: what is in force, kept, and refused."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from ipaddress import IPv4Address
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest
from prometheus_client import CollectorRegistry, Counter

from templated.drivers.network.base import HostFacts
from templated.drivers.network.user import SlirpNetwork
from templated.errors import ConfigError, Conflict, HostError, InvalidRequest, NotFound
from templated.journal import Journal
from templated.model.function import DeployRequest
from templated.model.network import AddressPlan, BridgeNetwork, UserNetwork
from templated.model.policy import (
    NetworkRequest,
    Policy,
    PolicyKeys,
    PolicyOwner,
    function_group,
    template_group,
)
from templated.services.functions.networks import FunctionNetworks
from templated.services.functions.registry import Registry
from templated.services.policies import Policies
from templated.services.reports.events import EventBus
from templated.services.tasks import Tasks
from templated.services.upkeep.nets import Nets
from tests.unit.fake_daemon import configured

WEB, HELLO = template_group("web"), function_group("web", "hello")


class Recorded(SlirpNetwork):
    """A network that has the policies that it was told last, and counts the transactions."""

    def __init__(self) -> None:
        super().__init__(UserNetwork(), AddressPlan("10.78.0.0/16", b"x"))
        self.held: dict[str, Policy] = {}
        self.transactions = 0
        self.refuses = False
        self.listening = {("tcp", 8080)}

    async def set_policies(self, changes: Mapping[str, Policy | None]) -> None:
        if self.refuses:
            raise HostError("nft failed: no")
        self.transactions += 1
        after = {**self.held, **changes}
        self.held = {group: policy for group, policy in after.items() if policy is not None}

    async def host(self) -> HostFacts:
        return HostFacts(frozenset({IPv4Address("192.0.2.7")}), frozenset(self.listening))


def keys(**said: Any) -> PolicyKeys:
    return msgspec.convert(said, PolicyKeys)


Scenario = Callable[[Policies, Recorded], Awaitable[None]]


def play(tmp_path: Path, *scenarios: Scenario, network: Any = None) -> None:
    """Each with policies of its own on the same journal: a daemon after the other."""

    async def run() -> None:
        said = {"network": msgspec.to_builtins(network or BridgeNetwork())}
        config = configured(tmp_path, **said)
        for scenario in scenarios:
            journal, recorded = Journal(tmp_path / "journal"), Recorded()
            await journal.open()
            counter = Counter("events", "Of each type.", ("type",), registry=CollectorRegistry())
            policies = Policies(config, journal, recorded, EventBus(counter))
            policies.has_egress = {"acme"}.__contains__
            try:
                await policies.open()
                await scenario(policies, recorded)
            finally:
                await journal.close()

    asyncio.run(run())


async def both(policies: Policies, recorded: Recorded) -> None:
    """A template without a way out, and a function on it that has one."""
    await policies.apply("web", keys(egress="none", limits={"packets": 100, "connections": 9}))
    said = keys(egress="acme", limits={"connections": 5})
    await policies.apply_function("hello", said, ["web"])


def test_keys_stand_over_those_of_the_template(tmp_path: Path) -> None:
    """Key by key, and limit by limit; both change at once when the template's do."""

    async def scenario(policies: Policies, recorded: Recorded) -> None:
        await both(policies, recorded)
        assert recorded.held[WEB] == Policy(packets=100, connections=9)
        assert recorded.held[HELLO] == Policy(egress="acme", packets=100, connections=5)
        assert policies.users("acme") == ["function hello"]
        before = recorded.transactions
        await policies.apply("web", keys(egress="nat", peers="open", publish=["80:80"]))
        assert recorded.transactions == before + 1
        assert recorded.held[HELLO] == Policy(egress="acme", peers=True, connections=5)
        await policies.apply_function("hello", PolicyKeys(), ["web"])
        assert set(recorded.held) == {WEB}
        ruled = policies.get("web", "hello")
        assert ruled is not None and ruled.owner == "template web"
        await policies.forget("web")
        assert recorded.held == {}

    play(tmp_path, scenario)


def test_a_port_is_in_the_groups_that_may_hold_it(tmp_path: Path) -> None:
    """Also of a function that says nothing yet; of a template that was not known, at once."""

    async def scenario(policies: Policies, recorded: Recorded) -> None:
        await both(policies, recorded)
        assert await policies.hold("hello", "web") == (HELLO, WEB)
        assert await policies.hold("other", "web") == (function_group("web", "other"), WEB)
        before = recorded.transactions
        await policies.hold("hello", "new")
        assert recorded.transactions == before + 1
        assert recorded.held[function_group("new", "hello")] == Policy("acme", connections=5)
        await policies.hold("hello", "new")
        assert recorded.transactions == before + 1

    play(tmp_path, scenario)


def test_a_restart_keeps_them(tmp_path: Path) -> None:
    """A function that is gone meanwhile leaves nothing; the next daemon asks nobody again."""

    async def first(policies: Policies, recorded: Recorded) -> None:
        await both(policies, recorded)
        await policies.apply_function("gone", keys(egress="nat"), ["web"])

    async def second(policies: Policies, recorded: Recorded) -> None:
        assert set(recorded.held) == {WEB}
        await policies.settle({"hello": ["web"], "plain": ["web"]})
        assert set(recorded.held) == {WEB, HELLO} and recorded.transactions == 2
        assert policies.keys(PolicyOwner("function", "gone")) == PolicyKeys()

    async def third(policies: Policies, recorded: Recorded) -> None:
        await policies.settle({"hello": ["web"]})
        assert set(recorded.held) == {WEB, HELLO}

    play(tmp_path, first, second, third)


def test_a_network_that_cannot_hold_them_any_more(tmp_path: Path) -> None:
    async def functions_alone(policies: Policies, recorded: Recorded) -> None:
        await policies.apply_function("hello", keys(egress="nat"), ["web"])

    async def later(policies: Policies, recorded: Recorded) -> None:
        with pytest.raises(ConfigError, match=r"function hello: network\.egress needs"):
            await policies.settle({"hello": ["web"]})

    play(tmp_path, functions_alone)
    play(tmp_path, later, network=UserNetwork())


REFUSED: Sequence[tuple[dict[str, Any], type[Exception], str]] = (
    ({"egress": "nope"}, NotFound, "no egress nope, which function hello names"),
    ({"publish": ["80:80"]}, InvalidRequest, "function hello cannot publish"),
    ({"allow": ["10.1.0.0/16"], "egress": "none"}, InvalidRequest, "function hello: .*no use"),
    ({"allow": ["192.0.2.7"], "egress": "nat"}, InvalidRequest, "192.0.2.7 is the host's own"),
    ({"allow": ["192.0.2.7:80"], "egress": "nat"}, InvalidRequest, "is the host's own"),
    ({"allow": ["10.78.0.9"], "egress": "nat"}, InvalidRequest, "own subnet"),
)


@pytest.mark.parametrize(("said", "kind", "says"), REFUSED, ids=lambda v: str(v)[:40])
def test_what_is_refused_changes_nothing(
    tmp_path: Path, said: dict[str, Any], kind: type[Exception], says: str
) -> None:
    async def scenario(policies: Policies, recorded: Recorded) -> None:
        await both(policies, recorded)
        held, before = dict(recorded.held), policies.keys(PolicyOwner("function", "hello"))
        with pytest.raises(kind, match=says):
            await policies.apply_function("hello", keys(**said), ["web"])
        assert recorded.held == held
        assert policies.keys(PolicyOwner("function", "hello")) == before

    play(tmp_path, scenario)


def test_what_a_template_may_not_change_under_a_function(tmp_path: Path) -> None:
    """The function would have no sense any more: it is named."""

    async def scenario(policies: Policies, recorded: Recorded) -> None:
        await policies.apply("web", keys(egress="nat"))
        await policies.apply_function("hello", keys(allow=["10.1.0.0/16"]), ["web"])
        with pytest.raises(InvalidRequest, match=r"function hello: network\.allow has no use"):
            await policies.apply("web", keys(egress="none"))
        with pytest.raises(InvalidRequest, match="function hello"):
            await policies.check("web", keys(egress="none"))
        assert recorded.held[WEB] == Policy(egress="nat")

    play(tmp_path, scenario)


def test_ports_of_the_host_that_are_taken(tmp_path: Path) -> None:
    """By a program, or by another template; one's own may stay."""

    async def scenario(policies: Policies, recorded: Recorded) -> None:
        with pytest.raises(Conflict, match="8080/tcp of the host is in use"):
            await policies.apply("web", keys(publish=["8080:80"]))
        await policies.apply("web", keys(publish=["8080:80/udp", "81:80"]))
        await policies.apply("web", keys(publish=["8080:80/udp", "81:80"], peers="open"))
        with pytest.raises(Conflict, match="81/tcp of the host is published by template web"):
            await policies.apply("other", keys(publish=["81:443"]))

    play(tmp_path, scenario)


def test_a_program_that_listens_to_a_published_port_later(tmp_path: Path) -> None:
    """The policy's view says so, as long as it does."""

    async def scenario(policies: Policies, recorded: Recorded) -> None:
        await policies.apply("web", keys(publish=["9090:80", "9091:81"]))
        context: Any = SimpleNamespace(policies=policies, network=recorded)
        clones: Any = SimpleNamespace(running_clones=list, views=list)
        nets = Nets(context, clones)
        assert (await nets.view("web")).problem == ""
        recorded.listening = {("tcp", 9090), ("udp", 9091)}
        (view,) = await nets.views()
        assert "listens to port 9090/tcp" in view.problem and "9091" not in view.problem
        recorded.listening.clear()
        assert (await nets.view("web")).problem == ""

    play(tmp_path, scenario)


def test_a_host_that_refuses(tmp_path: Path) -> None:
    """What held before holds, in the journal, too."""

    async def scenario(policies: Policies, recorded: Recorded) -> None:
        await both(policies, recorded)
        recorded.refuses = True
        with pytest.raises(HostError):
            await policies.apply_function("hello", keys(egress="nat"), ["web"])
        ruled = policies.get("web", "hello")
        assert ruled is not None and ruled.policy.egress == "acme"

    async def after(policies: Policies, recorded: Recorded) -> None:
        assert policies.keys(PolicyOwner("function", "hello")).egress == "acme"

    play(tmp_path, scenario, after)


def test_a_request_says_what_changes() -> None:
    """Over what was said before; with `reset` over nothing."""
    before = keys(egress="acme", allow=["10.1.0.0/16"], limits={"packets": 50})
    wanted = msgspec.convert({"peers": "open", "limits": {"connections": 5}}, NetworkRequest)
    assert wanted.over(before) == keys(
        egress="acme",
        allow=["10.1.0.0/16"],
        peers="open",
        limits={"packets": 50, "connections": 5},
    )
    assert wanted.over(PolicyKeys()) == keys(peers="open", limits={"connections": 5})


class Deploys:
    """A registry whose deploys fail, or succeed."""

    def __init__(self) -> None:
        self.found: dict[str, str] = {}
        self.fails = False

    def names(self) -> list[str]:
        return list(self.found)

    def latest(self, name: str) -> Any:
        if name not in self.found:
            raise NotFound(f"there is no function {name}")
        return SimpleNamespace(settings=SimpleNamespace(template=self.found[name]))

    def versions(self, name: str) -> list[Any]:
        return []

    async def deploy(self, name: str, wanted: DeployRequest, archive: None, **how: Any) -> Any:
        if self.fails:
            raise InvalidRequest("no code")
        self.found[name] = wanted.template or self.found.get(name, "web")
        return self.latest(name)


class OneTemplate:
    """A template on the daemon's network, and one on libvirt's."""

    def takers(self) -> list[str]:
        return ["web"]

    def own_network(self, name: str) -> str | None:
        return "default" if name == "stock" else None


def test_a_deploy_with_a_policy(tmp_path: Path) -> None:
    """It holds before the code; with a deploy that fails all is as before, and a function that is
    gone keeps it until its last instance has ended."""

    async def scenario(policies: Policies, recorded: Recorded) -> None:
        registry, tasks = Deploys(), Tasks()
        instances: list[Any] = []
        networks = FunctionNetworks(
            cast("Registry", registry), policies, OneTemplate(), instances, tasks
        )
        registry.fails = True
        with pytest.raises(InvalidRequest, match="no code"):
            await networks.deploy("hello", DeployRequest(network=keys(egress="acme")), None)
        assert recorded.held == {} and networks.keys("hello") == PolicyKeys()
        registry.fails = False
        await networks.deploy("hello", DeployRequest(network=keys(egress="acme")), None)
        assert recorded.held == {HELLO: Policy(egress="acme")}
        wanted = msgspec.convert({"limits": {"packets": 50}}, NetworkRequest)
        await networks.change("hello", wanted)
        assert recorded.held == {HELLO: Policy(egress="acme", packets=50)}
        with pytest.raises(Conflict, match="on libvirt's network default"):
            await networks.deploy("hello", DeployRequest(template="stock"), None)
        registry.fails = True
        with pytest.raises(InvalidRequest, match="no code"):
            await networks.deploy("hello", DeployRequest(template="other"), None)
        assert set(recorded.held) == {HELLO}
        with pytest.raises(NotFound):
            await networks.change("nobody", wanted)
        ended = asyncio.Event()
        version = SimpleNamespace(function="hello")
        instances.append(SimpleNamespace(version=version, removed=ended))
        del registry.found["hello"]
        await networks.removed("hello", None)
        await asyncio.sleep(0.01)
        assert set(recorded.held) == {HELLO}, "a request runs on"
        instances.clear()
        ended.set()
        while recorded.held:
            await asyncio.sleep(0.01)
        await tasks.end()

    play(tmp_path, scenario)
