"""The network policies that are in force: in the journal, in the kernel, and checked before.

A template's policy is that of its file as it was at the last build, or at the last `net apply`; a
function's keys stand over those of the template that it runs on. Each pair of them is a group of
ports for the kernel, made ahead of its first clone. A restart of the daemon changes nothing of it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from msgspec.structs import replace

from templated.drivers.network import Network
from templated.errors import ConfigError, Conflict, HostError, InvalidRequest, NotFound
from templated.journal import Journal
from templated.model.config import Config
from templated.model.policy import (
    KEYS,
    NAT,
    NONE,
    Policy,
    PolicyKeys,
    PolicyOwner,
    function_group,
    policy_of,
    template_group,
)
from templated.services.reports.events import EventBus

log = logging.getLogger(__name__)


class Ruled(NamedTuple):
    """Whose clones a policy holds for: those of a template, or of a function on it."""

    template: str
    function: str
    """Empty: those of the template that are of no function with keys of its own."""
    policy: Policy
    keys: PolicyKeys
    """As written, those of the template under those of the function."""

    @property
    def owner(self) -> str:
        """As people read it."""
        return f"function {self.function}" if self.function else f"template {self.template}"


class Policies:
    """The policies of templates and functions that have one."""

    def __init__(
        self, config: Config, journal: Journal, network: Network, events: EventBus
    ) -> None:
        self._config = config
        self._journal = journal
        self._network = network
        self._events = events
        self._said: dict[PolicyOwner, PolicyKeys] = {}
        self._used: dict[str, frozenset[str]] = {}
        """By function that has keys: the templates that its versions run on."""
        self._ruled: dict[str, Ruled] = {}
        """By group."""
        self._turn = asyncio.Lock()
        self.has_egress: Callable[[str], bool] = lambda name: False
        """Whether there is an egress of this name; set by who makes them."""

    async def open(self) -> None:
        """Hold ports to what was in force before, ahead of the first port.

        Raises HostError when the journal cannot be read, ConfigError when the daemon's network
        can no longer hold clones to a policy.
        """
        said = await self._journal.policies()
        try:
            ruled = self._of(said, {})
        except InvalidRequest as error:
            raise _unfit(error) from None
        await self._network.set_policies({group: one.policy for group, one in ruled.items()})
        self._said, self._ruled = said, ruled

    # --- looking ------------------------------------------------------------------------------

    def all(self) -> Mapping[str, Ruled]:
        """Those in force, by group."""
        return self._ruled

    def get(self, template: str, function: str = "") -> Ruled | None:
        """What holds for the clones of a template, or of a function on it; None: no policy."""
        own = self._ruled.get(function_group(template, function)) if function else None
        return own or self._ruled.get(template_group(template))

    def keys(self, owner: PolicyOwner) -> PolicyKeys:
        """The keys of a policy, as they were written."""
        return self._said.get(owner, PolicyKeys())

    def users(self, egress: str) -> list[str]:
        """Who names an egress: templates, and functions as in `function hello`."""
        found = {
            (one.function, one.template)
            for one in self._ruled.values()
            if one.policy.egress == egress
        }
        return sorted({f"function {name}" if name else template for name, template in found})

    # --- checking -----------------------------------------------------------------------------

    async def check(self, template: str, keys: PolicyKeys) -> None:
        """Whether a template may have `keys`. Raises as `apply`."""
        await self._checked(PolicyOwner("template", template), keys, self._used)

    async def _checked(
        self, owner: PolicyOwner, keys: PolicyKeys, used: Mapping[str, frozenset[str]]
    ) -> tuple[dict[PolicyOwner, PolicyKeys], dict[str, Ruled]]:
        """All keys and policies, with these of one owner in place of its present ones."""
        said = {**self._said, owner: _only(keys)}
        if not said[owner].any:
            del said[owner]
        if owner.kind == "function" and keys.publish is not None:
            raise InvalidRequest(
                f"function {owner.name} cannot publish ports of the host",
                hint="its requests come by the gateway; network.publish is for templates",
            )
        ruled = self._of(said, used)
        ours = [one for group, one in ruled.items() if self._ruled.get(group) != one]
        for one in ours:
            self._check_egress(one)
            self._check_published(one, ruled.values())
        if ours:
            await self._check_host(ours)
        return said, ruled

    def _of(
        self, said: Mapping[PolicyOwner, PolicyKeys], used: Mapping[str, frozenset[str]]
    ) -> dict[str, Ruled]:
        """By group: the policies that keys give. Raises InvalidRequest, which names the owner."""
        found: dict[str, Ruled] = {}
        for owner, keys in said.items():
            if owner.kind == "template":
                found[template_group(owner.name)] = self._ruled_by(owner.name, "", keys)
                continue
            for template in used.get(owner.name, ()):
                # A port of the host leads to no instance: they come and go.
                under = replace(said.get(PolicyOwner("template", template), _NO_KEYS), publish=None)
                ruled = self._ruled_by(template, owner.name, keys.over(under))
                found[function_group(template, owner.name)] = ruled
        return found

    def _ruled_by(self, template: str, function: str, keys: PolicyKeys) -> Ruled:
        try:
            policy = policy_of(keys, self._config.network)
        except InvalidRequest as error:
            whose = f"function {function}" if function else f"template {template}"
            raise InvalidRequest(f"{whose}: {error.message}", hint=error.hint) from None
        assert policy is not None  # none is kept without a key
        return Ruled(template, function, policy, keys)

    def _check_egress(self, one: Ruled) -> None:
        egress = one.policy.egress
        if egress not in (NONE, NAT) and not self.has_egress(egress):
            raise NotFound(
                f"there is no egress {egress}, which {one.owner} names",
                hint="make it: templated egress create, or take egress: none or nat",
            )

    def _check_published(self, one: Ruled, all_: Iterable[Ruled]) -> None:
        wanted = {(port.protocol, port.host_port) for port in one.policy.publish}
        for other in all_:
            for port in other.policy.publish:
                if other.template != one.template and (port.protocol, port.host_port) in wanted:
                    raise Conflict(
                        f"port {port.host_port}/{port.protocol} of the host is published by "
                        f"{other.owner} and by {one.owner}",
                        hint="take another port in network.publish",
                    )

    async def _check_host(self, ours: Iterable[Ruled]) -> None:
        """Raise when a policy opens the host itself, or a port that it uses."""
        host = await self._network.host()
        mine = {
            (p.protocol, p.host_port) for one in self._ruled.values() for p in one.policy.publish
        }
        for one in ours:
            for allowed in one.policy.allow:
                if allowed.network.num_addresses == 1 and allowed.network[0] in host.addresses:
                    raise InvalidRequest(
                        f"{one.owner}: network.allow: {allowed.network[0]} is the host's own, "
                        "which no clone reaches",
                        hint="a clone may ping the gateway; reach services by another address",
                    )
            for port in one.policy.publish:
                key = (port.protocol, port.host_port)
                if key in host.listening and key not in mine:
                    raise Conflict(
                        f"{one.owner}: port {port.host_port}/{port.protocol} of the host is in "
                        "use: a program listens to it",
                        hint=f"see: ss -lnp sport = {port.host_port}; or publish another",
                    )

    # --- changing -----------------------------------------------------------------------------

    async def apply(self, template: str, keys: PolicyKeys) -> None:
        """Put a policy in force for all ports of a template at once, and keep it.

        With none of the keys, as for all templates without a policy. Its functions' policies
        change with it. Raises InvalidRequest, NotFound for an egress that there is not, Conflict
        for a port of the host that is taken, HostError; leaves what held before.
        """
        await self._apply(PolicyOwner("template", template), keys)

    async def apply_function(
        self, function: str, keys: PolicyKeys, templates: Iterable[str]
    ) -> None:
        """The same for a function, which runs on these templates; running instances, too."""
        await self._apply(PolicyOwner("function", function), keys, frozenset(templates))

    async def forget(self, template: str) -> None:
        """Give up the policy of a template that is removed. Raises HostError; it holds then."""
        await self.apply(template, _NO_KEYS)

    async def hold(self, function: str, template: str) -> tuple[str, ...]:
        """The groups of an instance's port, whose policies are in force.

        They were made when the function was deployed, so usually this is a look at two tables.
        Raises as `apply`, when the template is another than was known.
        """
        owner = PolicyOwner("function", function)
        group = function_group(template, function)
        if owner in self._said and group not in self._ruled:
            known = self._used.get(function, frozenset())
            await self._apply(owner, self._said[owner], known | {template})
        return group, template_group(template)

    async def settle(self, templates: Mapping[str, Iterable[str]]) -> None:
        """Once functions are known, with the templates of their versions: hold them to what they
        have said, in one step, and forget those that are gone. Raises HostError, ConfigError."""
        functions = {owner.name for owner in self._said if owner.kind == "function"}
        for name in functions - set(templates):
            await self._journal.set_policy(PolicyOwner("function", name), None)
            del self._said[PolicyOwner("function", name)]
        used = {name: frozenset(templates[name]) for name in functions & set(templates)}
        try:
            ruled = self._of(self._said, used)
        except InvalidRequest as error:
            raise _unfit(error) from None
        await self._network.set_policies(self._changes(ruled))
        self._used, self._ruled = used, ruled

    async def _apply(
        self, owner: PolicyOwner, keys: PolicyKeys, templates: frozenset[str] = frozenset()
    ) -> None:
        async with self._turn:
            used = {**self._used, owner.name: templates} if templates else dict(self._used)
            before = self._said.get(owner)
            said, ruled = await self._checked(owner, keys, used)
            if said == self._said and ruled == self._ruled:
                self._used = used
                return
            await self._journal.set_policy(owner, said.get(owner))
            try:
                await self._network.set_policies(self._changes(ruled))
            except HostError:
                await self._journal.set_policy(owner, before)
                raise
            self._said, self._used, self._ruled = said, used, ruled
            if owner.kind == "function" and owner not in said:
                self._used.pop(owner.name, None)
        egress = said[owner].egress if owner in said else None
        self._events.emit("network.policy", owner.name, kind=owner.kind, egress=egress or "")

    def _changes(self, ruled: Mapping[str, Ruled]) -> dict[str, Policy | None]:
        gone: dict[str, Policy | None] = dict.fromkeys(self._ruled.keys() - ruled.keys())
        return gone | {
            group: one.policy for group, one in ruled.items() if self._ruled.get(group) != one
        }


_NO_KEYS = PolicyKeys()


def _only(keys: PolicyKeys) -> PolicyKeys:
    """Without what else stands in a template's section."""
    return PolicyKeys(**{key: getattr(keys, key) for key in KEYS})


def _unfit(error: InvalidRequest) -> ConfigError:
    return ConfigError(
        f"the network policy of {error.message}",
        hint=error.hint or "configure the network that it was made for",
    )
