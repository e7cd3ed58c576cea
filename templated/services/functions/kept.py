"""Keeps the instances that users have asked for: min, and what is provisioned.

They are started in the background after a start of the daemon and after each change, and replaced
when they end; all of that is the crews' work once they know the numbers.
"""

from __future__ import annotations

from templated.model.function import Provisioned, ProvisionedView, Readiness
from templated.services.functions.crew import KEPT
from templated.services.functions.crews import Crews
from templated.services.functions.registry import Registry


class Kept:
    """Tells the crews how many instances of each version are to be ready."""

    def __init__(self, registry: Registry, crews: Crews) -> None:
        self._registry = registry
        self._crews = crews

    def open(self) -> None:
        """Begin with what the journal has."""
        for name in self._registry.names():
            self.changed(name)

    def changed(self, name: str) -> None:
        """Something of a function has changed, or it is gone."""
        if name not in self._registry.names():
            return
        for version in (self._registry.latest(name), *self._registry.versions(name)):
            if count := self._registry.kept(version):
                self._crews.aim(version, count, KEPT)
            else:
                self._crews.release(version, KEPT)

    def views(self, name: str) -> tuple[ProvisionedView, ...]:
        """What is provisioned of a function, and how far that is. Raises NotFound."""
        return tuple(self._view(one) for one in self._registry.provisioned(name))

    def _view(self, one: Provisioned) -> ProvisionedView:
        parts = [
            (self._crews.supply(version), count) for version, count in self._registry.shares(one)
        ]
        available = sum(min(count, supply.up) for supply, count in parts)
        allocated = sum(min(count, supply.up + supply.starting) for supply, count in parts)
        reason = next((supply.problem for supply, _ in parts if supply.problem), "")
        status = Readiness.FAILED if reason else Readiness.IN_PROGRESS
        return ProvisionedView(
            qualifier=one.qualifier,
            requested=one.count,
            allocated=min(allocated, one.count),
            available=min(available, one.count),
            status=Readiness.READY if available >= one.count else status,
            reason="" if available >= one.count else reason,
            changed=one.changed,
        )
