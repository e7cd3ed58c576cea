"""The network policies that are in force: in the journal, in the kernel, and checked before.

A policy is that of its template's file as it was at the last build, or at the last `net apply`. A
restart of the daemon changes nothing of it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping

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
    policy_of,
    template_group,
)
from templated.services.reports.events import EventBus

log = logging.getLogger(__name__)


class Policies:
    """The policy of each template that has one."""

    def __init__(
        self, config: Config, journal: Journal, network: Network, events: EventBus
    ) -> None:
        self._config = config
        self._journal = journal
        self._network = network
        self._events = events
        self._keys: dict[str, PolicyKeys] = {}
        self._policies: dict[str, Policy] = {}
        self._turn = asyncio.Lock()
        self.has_egress: Callable[[str], bool] = lambda name: False
        """Whether there is an egress of this name; set by who makes them."""

    async def open(self) -> None:
        """Hold ports to what was in force before, ahead of the first port.

        Raises HostError when the journal cannot be read, ConfigError when the daemon's network
        can no longer hold clones to a policy.
        """
        for template, keys in (await self._journal.policies()).items():
            try:
                policy = policy_of(keys, self._config.network)
            except InvalidRequest as error:
                raise ConfigError(
                    f"the policy of template {template} cannot hold: {error.message}",
                    hint=error.hint or "configure the network that it was made for",
                ) from None
            assert policy is not None  # none is kept without a key
            await self._network.set_policy(template_group(template), policy)
            self._keys[template], self._policies[template] = keys, policy

    def all(self) -> Mapping[str, Policy]:
        """By template."""
        return self._policies

    def get(self, template: str) -> Policy | None:
        """The policy of a template; None when it has none."""
        return self._policies.get(template)

    def keys(self, template: str) -> PolicyKeys:
        """The keys of a template's policy, as they were written."""
        return self._keys.get(template, PolicyKeys())

    def users(self, egress: str) -> list[str]:
        """The templates whose policy names an egress."""
        return sorted(name for name, policy in self._policies.items() if policy.egress == egress)

    def check(self, template: str, keys: PolicyKeys) -> Policy | None:
        """The policy that `keys` give. Raises InvalidRequest, NotFound for an egress that there is
        not, Conflict for a port of the host that another template publishes."""
        policy = policy_of(_only(keys), self._config.network)
        if policy is None:
            return None
        if policy.egress not in (NONE, NAT) and not self.has_egress(policy.egress):
            raise NotFound(
                f"there is no egress {policy.egress}",
                hint="make it: templated egress create, or take egress: none or nat",
            )
        wanted = {(one.protocol, one.host_port) for one in policy.publish}
        for name, other in self._policies.items():
            for one in other.publish:
                if name != template and (one.protocol, one.host_port) in wanted:
                    raise Conflict(
                        f"port {one.host_port}/{one.protocol} of the host is published by "
                        f"template {name}",
                        hint="take another port in network.publish",
                    )
        return policy

    async def apply(self, template: str, keys: PolicyKeys) -> None:
        """Put a policy in force for all ports of a template at once, and keep it.

        With none of the keys, as for all templates without a policy. Raises as `check`, and
        HostError; leaves what held before.
        """
        async with self._turn:
            policy, before = self.check(template, keys), self._keys.get(template)
            if policy == self._policies.get(template):
                return
            said = None if policy is None else _only(keys)
            await self._journal.set_policy(template, said)
            try:
                await self._network.set_policy(template_group(template), policy)
            except HostError:
                await self._journal.set_policy(template, before)
                raise
            self._remember(template, said, policy)
        self._events.emit("network.policy", template, egress=policy.egress if policy else "")

    async def forget(self, template: str) -> None:
        """Give up the policy of a template that is removed. Raises HostError; it holds then."""
        if template in self._policies:
            await self.apply(template, PolicyKeys())

    def _remember(self, template: str, keys: PolicyKeys | None, policy: Policy | None) -> None:
        if keys is None or policy is None:
            self._keys.pop(template, None)
            self._policies.pop(template, None)
        else:
            self._keys[template], self._policies[template] = keys, policy


def _only(keys: PolicyKeys) -> PolicyKeys:
    """Without what else stands in a template's section."""
    return PolicyKeys(**{key: getattr(keys, key) for key in KEYS})
