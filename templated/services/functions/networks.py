"""The network policies of functions: keys that stand over those of the template they run on.

A function has one policy, which holds for all its versions and changes under those that run.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Protocol

from templated.errors import Conflict, TemplatedError
from templated.model.function import DeployRequest, Version, check_function_name
from templated.model.policy import NetworkRequest, PolicyKeys, PolicyOwner
from templated.services.functions.instance import Instance
from templated.services.functions.registry import Registry
from templated.services.policies import Policies
from templated.services.tasks import Tasks

log = logging.getLogger(__name__)


class Templated(Protocol):
    """What has to be known of templates."""

    def takers(self) -> list[str]:
        """Those that serve and take code."""

    def own_network(self, name: str) -> str | None:
        """The network of libvirt that a template's VMs are on; None: the daemon's."""


class FunctionNetworks:
    """Changes the policies of functions, alone and with a deploy."""

    def __init__(
        self,
        registry: Registry,
        policies: Policies,
        templates: Templated,
        instances: Iterable[Instance],
        tasks: Tasks,
    ) -> None:
        """`instances` are all there are, each time it is gone through."""
        self._registry = registry
        self._policies = policies
        self._templates = templates
        self._instances = instances
        self._tasks = tasks

    async def open(self) -> None:
        """Hold functions to what they have said. Raises as `Policies.settle`."""
        names = self._registry.names()
        await self._policies.settle({name: self._used(name) for name in names})

    def keys(self, name: str) -> PolicyKeys:
        """What a function has said."""
        return self._policies.keys(PolicyOwner("function", name))

    async def change(self, name: str, wanted: NetworkRequest) -> None:
        """Change the keys of a function; all its instances are held to them at once.

        Raises NotFound, InvalidRequest, Conflict, HostError; leaves the policy as it was.
        """
        self._registry.latest(name)
        before = PolicyKeys() if wanted.reset else self.keys(name)
        await self._apply(name, wanted.over(before), self._used(name))

    async def deploy(
        self,
        name: str,
        wanted: DeployRequest,
        archive: Path | None,
        *,
        new: bool | None = None,
        expected: Version | None = None,
    ) -> Version:
        """As `Registry.deploy`, with the policy ahead of the code: it holds when the first
        instance starts. When the deploy fails, what held before holds."""
        async with self._held(check_function_name(name), wanted):
            version = await self._registry.deploy(name, wanted, archive, new=new, expected=expected)
        with contextlib.suppress(TemplatedError):  # an instance's start tries again, and tells
            await self._policies.hold(name, version.settings.template)
        return version

    async def removed(self, name: str, number: int | None) -> None:
        """Give up the policy of a function that is gone, once its last instance has ended: until
        then requests that run go on, and it must hold."""
        if number is None and self.keys(name).any:
            self._tasks.spawn(self._forget(name), f"forgetting the network policy of {name}")

    async def _forget(self, name: str) -> None:
        while left := [one for one in self._instances if one.version.function == name]:
            await left[0].removed.wait()  # at the latest when its request's time is over
        if name in self._registry.names():  # it was deployed anew
            return
        try:
            await self._policies.apply_function(name, PolicyKeys(), ())
        except TemplatedError as error:  # the daemon's next start forgets it
            log.warning("the network policy of %s stays for now: %s", name, error.message)

    @contextlib.asynccontextmanager
    async def _held(self, name: str, wanted: DeployRequest) -> AsyncIterator[None]:
        before, used = self.keys(name), self._used(name)
        known = name in self._registry.names()
        said = before if known else PolicyKeys()  # not that of one that had its name
        keys = said if wanted.network is None else wanted.network.over(said)
        if not keys.any and not before.any:
            yield
            return
        await self._apply(name, keys, used | self._asked(name, wanted))
        try:
            yield
        except BaseException:
            if self.keys(name) == keys:  # nobody has changed it meanwhile
                await self._policies.apply_function(name, before, used)
            raise

    async def _apply(self, name: str, keys: PolicyKeys, templates: set[str]) -> None:
        for template in sorted(templates) if keys.any else ():
            if own := self._templates.own_network(template):
                raise Conflict(
                    f"VMs of {template} are on libvirt's network {own}, which has no policies",
                    hint="take a template on the daemon's network",
                )
        await self._policies.apply_function(name, keys, templates)

    def _asked(self, name: str, wanted: DeployRequest) -> set[str]:
        """The template that a deploy is for, as far as that is clear."""
        if wanted.template is not None:
            return {wanted.template}
        takers = self._templates.takers()
        return set(takers) if name not in self._registry.names() and len(takers) == 1 else set()

    def _used(self, name: str) -> set[str]:
        """The templates that a function's versions run on."""
        if name not in self._registry.names():
            return set()
        versions = (self._registry.latest(name), *self._registry.versions(name))
        return {version.settings.template for version in versions}
