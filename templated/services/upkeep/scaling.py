"""Decides each second how many instances there are of each version, and has the crews follow.

`Scaler` decides, fed with the requests under way (`tally`) and with what these will call
(`calls`). Starts that take turns, and room for them, are the crews' business: here are numbers.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from templated.model.config import ScalingConfig
from templated.model.function import Version, named
from templated.model.units import optional_bytes, seconds
from templated.scaling import Bounds, Decision, Failure, Policy, Scaler
from templated.scaling.chains import Chains
from templated.scaling.ring import Ring
from templated.services.functions.crews import Crews, Supply
from templated.services.reports.events import EventBus
from templated.services.reports.scaling_metrics import ScalingMetrics
from templated.services.upkeep.calls import Calls
from templated.services.upkeep.memory import Memory
from templated.services.upkeep.tally import Tally

log = logging.getLogger(__name__)
INTERVAL = 1.0
"""Seconds between two rounds."""
MINUTES = 180
"""Of which it is remembered how many instances were ready: as many as of demand."""
_MIB = 1 << 20
# The host's own averages change every two seconds.
_LOOK_EVERY = 2
# How long instances stay for requests that are about to move to them, in seconds.
_MOVE = 60.0
# Starts that fail in a row until none is begun ahead any more.
_HOPELESS = 4


class Known(Protocol):
    """The functions that there are, and their bounds: the registry."""

    def names(self) -> list[str]:
        """All functions."""

    def latest(self, name: str) -> Version:
        """`$LATEST`."""

    def versions(self, name: str) -> list[Version]:
        """The numbered ones."""

    def kept(self, version: Version) -> int:
        """How many instances are to be ready in any case."""

    def maximum(self, name: str) -> int | None:
        """How many instances there may be of all versions."""

    def reserved(self, name: str) -> int | None:
        """How many requests may run at once."""


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """What scaling asks the daemon for."""

    path: Path
    """Where it keeps what it has learned."""
    cost: Callable[[str], int]
    """Bytes of memory that one more instance on a template takes."""
    shortages: Callable[[], Mapping[str, str]] = dict
    """What the host is short of, so that nothing grows. It may take a moment."""
    clock: Callable[[], float] = time.time
    """The time of the day, which timers follow, in seconds."""


class Scaling:
    """All of it for one daemon. `run` goes on until it is cancelled."""

    def __init__(
        self,
        config: ScalingConfig,
        registry: Known,
        crews: Crews,
        metrics: ScalingMetrics,
        events: EventBus,
        around: Surroundings,
    ) -> None:
        self._registry = registry
        self._crews = crews
        self._metrics = metrics
        self._events = events
        self._around = around
        self.scaler = Scaler(policy(config), stopwatch=time.perf_counter)
        self.ready: dict[str, Ring] = {}
        """The most instances that were ready, by minute."""
        self.chains = Chains()
        self._memory = Memory(around.path, self.scaler, self.chains)
        self.tally = Tally(self.scaler, around.clock, self._memory.note)
        self._versions: dict[str, Version] = {}
        self._calls = Calls(
            *(self.scaler, self.chains, crews, self._versions, self.tally.asked, around.clock)
        )
        self.foreseen = self._calls.foreseen
        self._attended: set[str] = set()
        """Versions that may have instances to end or to pause."""
        self.shortages: Mapping[str, str] = {}
        """What the host is short of, in words, by resource."""
        self._noted = 0
        """The minute of which it was noted last how many instances there are."""
        self._failure = ""
        metrics.count(self._desired, self._kept, self._ready)

    async def open(self) -> None:
        """Know all versions, and what an earlier daemon has learned of them. Raises nothing."""
        self.refresh_all()
        try:
            await self._memory.load()
        except Exception as error:  # noqa: BLE001  # whatever is in the file
            self._metrics.failures.labels("load").inc()
            log.warning("what scaling has learned is lost, it begins anew: %s", error)

    async def run(self) -> None:
        """Do rounds until cancelled. Raises nothing: one that fails is reported."""
        turn = 0
        while True:
            await asyncio.sleep(INTERVAL)
            turn += 1
            try:
                if turn % _LOOK_EVERY == 1:
                    self.shortages = await asyncio.to_thread(self._around.shortages)
                with self._metrics.round_seconds.time():
                    self.round()
                self._failure = ""
            except Exception as error:  # noqa: BLE001  # reported by _failed, whatever it is
                self._failed(error)
            await self._remember()

    def _failed(self, error: Exception) -> None:
        self._metrics.failures.labels("round").inc()
        # One that fails each second is told once.
        if (why := f"{type(error).__name__}: {error}") != self._failure:
            self._failure = why
            self._events.emit("scaling.failed", "round", reason=why)
            log.error("a round of scaling failed", exc_info=error)

    async def _remember(self) -> None:
        try:
            await self._memory.tend(self._around.clock())
        except Exception:
            self._metrics.failures.labels("save").inc()
            log.exception("cannot write what scaling has learned")

    async def close(self) -> None:
        """Write down what was learned. Raises nothing."""
        try:
            await self._memory.save()
        except Exception:
            log.exception("cannot write what scaling has learned")

    # --- what there is --------------------------------------------------------------------------

    def changed(self, version: Version) -> None:
        """A version is new, or `$LATEST` is another one (`Registry.on_changed`)."""
        self.refresh(version.function)

    def refresh_all(self) -> None:
        """Any function may have other versions or bounds, or instances of another size."""
        for name in self._registry.names():
            self.refresh(name)

    def refresh(self, name: str) -> None:
        """The versions or the bounds of a function have changed, or it is gone."""
        found = {named(version): version for version in self._of(name)}
        gone = [k for k, v in self._versions.items() if v.function == name and k not in found]
        for key in gone:
            self._forget(key)
        if not found:
            self._calls.forget(name)
            self.tally.asked.pop(name, None)
        for key, version in found.items():
            self.scaler.add(key, self._bounds(version))
            if self._versions.get(key) != version:
                self._versions[key] = version
                self._attended.add(key)

    def _of(self, name: str) -> Iterator[Version]:
        if name in self._registry.names():
            yield self._registry.latest(name)
            yield from self._registry.versions(name)

    def versions(self) -> list[Version]:
        """All that there are."""
        return list(self._versions.values())

    def asked(self, name: str) -> str | None:
        """The version of a function that was asked for last."""
        version = self._versions.get(self.tally.asked.get(name, ""))
        return None if version is None else version.label

    def mean(self, key: str) -> float:
        """Requests of a version under way, on average over the last minute."""
        return self.scaler.mean(key, self._around.clock())

    def minute(self) -> int:
        """The present one, as a slot of demand and of `ready`."""
        return int(self._around.clock() // 60)

    def _forget(self, key: str) -> None:
        self.scaler.remove(key)
        self._memory.forget(key)
        del self._versions[key]
        self.ready.pop(key, None)
        self._calls.begun.discard(key)
        self._attended.discard(key)

    def _bounds(self, version: Version) -> Bounds:
        name, least = version.function, self._registry.kept(version)
        bounds = (self._registry.maximum(name), self._registry.reserved(name))
        most = min((bound for bound in bounds if bound is not None), default=None)
        return Bounds(
            mib=max(1.0, self._around.cost(version.settings.template) / _MIB),
            least=least,
            most=None if most is None else max(least, most),
        )

    # --- what happens ---------------------------------------------------------------------------

    def started(self, version: Version, seconds: float) -> None:
        """An instance came up in so many seconds (`Crews.on_started`)."""
        key = named(version)
        if key in self._versions:
            self.scaler.started(key, seconds)
            self._calls.starts[version.function] = self.scaler.demand(key).start_time
            self._note(self._crews.supply(version))

    def readied(self, version: Version, count: int) -> None:
        """So many instances wait for requests that are about to move to a version
        (`Crews.on_readied`): they are of use for some time."""
        key = named(version)
        if key in self._versions:
            now = self._around.clock()
            self.scaler.expect(key, now, count, now + _MOVE, "requests move to it")

    # --- a round --------------------------------------------------------------------------------

    def round(self) -> None:
        """Decide, and have the crews follow."""
        self._calls.foretell_all()
        made = self.scaler.round(self._around.clock(), growth=not self.shortages)
        self._calls.held = made.short > 0 or bool(self.shortages)
        for failure in made.failures:
            self._left_out(failure)
        self._attended.update(self._calls.begun, (decision.key for decision in made.decisions))
        for key in list(self._attended):
            self._follow(self._versions[key], self.scaler.decision(key))
        self._calls.release()
        if (minute := self.minute()) != self._noted:
            self._noted = minute
            for supply in self._crews.supplies():
                self._note(supply)

    def _left_out(self, failure: Failure) -> None:
        self._metrics.failures.labels("forecaster").inc()
        details = {"forecaster": failure.forecaster, "reason": failure.error}
        function = self._versions[failure.key].function
        self._events.emit("scaling.forecaster_failed", function, **details)

    def _follow(self, version: Version, decision: Decision) -> None:
        """Have as many instances as was decided, and no others."""
        supply = self._crews.supply(version)
        if not (decision.keep or supply.up or supply.starting or supply.running):
            self._attended.discard(decision.key)
            return
        keep = decision.keep
        if supply.failures >= _HOPELESS and not supply.up:
            # Nobody has use of more that fail: the next request tries, or what is to be kept.
            keep = min(keep, self.scaler.bounds(decision.key).least)
        self._crews.aim(version, keep)
        if supply.up > keep:
            self._crews.trim(version, supply.up - keep)
        elif not supply.failures and (supply.up or not keep):
            self._attended.discard(decision.key)
        self._crews.pause(version, decision.desired)

    def _note(self, supply: Supply) -> None:
        """Remember how many there are: when a minute begins, and when one comes up."""
        key = named(supply.version)
        if supply.up and key in self._versions:
            if key not in self.ready:
                self.ready[key] = Ring(MINUTES)
            self.ready[key].raise_to(self.minute(), supply.up)

    # --- counting -------------------------------------------------------------------------------

    def _desired(self) -> dict[tuple[str, ...], int]:
        found: dict[tuple[str, ...], int] = {}
        for key, version in self._versions.items():
            decision = self.scaler.decision(key)
            found[version.function, version.label, decision.kind] = decision.desired
        return found

    def _kept(self) -> dict[tuple[str, ...], int]:
        return {
            (version.function, version.label): self.scaler.decision(key).keep
            for key, version in self._versions.items()
        }

    def _ready(self) -> Counter[tuple[str, ...]]:
        found: Counter[tuple[str, ...]] = Counter()
        for version in self._versions.values():
            found[version.function, version.label] = 0
        for supply in self._crews.supplies():
            found[supply.version.function, supply.version.label] += supply.up
        return found


def policy(config: ScalingConfig) -> Policy:
    """As it is configured."""
    memory = optional_bytes(config.memory)
    window = int(seconds(config.window))
    return Policy(
        stable=window,
        panic=max(2, window // 10),
        buffer_share=config.buffer_share,
        buffer_floor=config.buffer_floor,
        cool_down=seconds(config.cool_down),
        price=config.price,
        memory=None if memory is None else memory / _MIB,
    )
