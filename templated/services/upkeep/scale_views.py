"""What scaling tells of itself."""

from __future__ import annotations

import time
from typing import Protocol

from templated.model.function import Version, named
from templated.model.scaling import CallView, ScaleDetail, ScaleHistory, ScaleView
from templated.scaling.chains import Edge
from templated.scaling.ring import Ring
from templated.services.functions.crews import Crews
from templated.services.upkeep.scaling import MINUTES, Scaling

_DIGITS = 3


class Finds(Protocol):
    """Finds the version that somebody means: the registry."""

    def version(self, name: str, qualifier: str | None) -> Version:
        """Raises NotFound."""


class ScaleViews:
    """What the API shows of scaling."""

    def __init__(self, scaling: Scaling, registry: Finds, crews: Crews) -> None:
        self._scaling, self._registry, self._crews = scaling, registry, crews

    def all(self) -> list[ScaleView]:
        """All versions, by function."""
        versions = self._scaling.versions()
        return [self._view(version) for version in sorted(versions, key=_order)]

    def one(self, name: str, qualifier: str | None) -> ScaleDetail:
        """All that is known of a version; by default of the one that was asked for last. Raises
        NotFound."""
        if qualifier is None:
            qualifier = self._scaling.asked(name)
        version = self._registry.version(name, qualifier)
        scaler, key = self._scaling.scaler, named(version)
        bounds = scaler.bounds(key)
        return ScaleDetail(
            now=self._view(version),
            min=bounds.least,
            max=bounds.most,
            instance_mib=round(bounds.mib, 1),
            start_s=round(scaler.demand(key).start_time, _DIGITS),
            forecast=scaler.forecast(key)[1],
            short_of=tuple(self._scaling.shortages.values()),
            calls=self._calls(name),
            history=self._history(key),
        )

    def _view(self, version: Version) -> ScaleView:
        scaler, key = self._scaling.scaler, named(version)
        decision, demand = scaler.decision(key), scaler.demand(key)
        supply = self._crews.supply(version)
        return ScaleView(
            function=version.function,
            version=version.label,
            requests=demand.level,
            waiting=demand.waiting,
            mean=round(self._scaling.mean(key), _DIGITS),
            forecast=round(scaler.forecast(key)[0], _DIGITS),
            desired=decision.desired,
            kept=decision.keep,
            ready=supply.up,
            starting=supply.starting,
            kind=decision.kind,
            reason=decision.reason,
        )

    def _calls(self, name: str) -> tuple[CallView, ...]:
        now = time.perf_counter()
        edges = self._scaling.chains.edges(name)
        return tuple(_call(edge, now) for edge in sorted(edges, key=lambda e: (e.caller, e.callee)))

    def _history(self, key: str) -> ScaleHistory:
        minutes = self._scaling.scaler.demand(key).minutes
        last = self._scaling.minute()
        ready = self._scaling.ready.get(key, Ring(MINUTES))
        return ScaleHistory(
            mean=tuple(round(load / 60, _DIGITS) for load in minutes.load.row(last)),
            peak=tuple(map(int, minutes.peak.row(last))),
            arrivals=tuple(map(int, minutes.arrivals.row(last))),
            ready=tuple(map(int, ready.row(last))),
        )


def _order(version: Version) -> tuple[str, bool, int]:
    return version.function, version.number > 0, -version.number


def _call(edge: Edge, now: float) -> CallView:
    return CallView(
        caller=edge.caller,
        callee=edge.callee,
        traced=edge.traced,
        share=round(edge.share, _DIGITS),
        probability=round(edge.sure, _DIGITS),
        runs=len(edge.outcomes),
        lag_s=round(edge.typical, _DIGITS),
        earliest_s=round(edge.first, _DIGITS),
        latest_s=round(edge.last, _DIGITS),
        fan_out=edge.count,
        seen_s=round(max(now - edge.seen, 0.0), 1),
    )
