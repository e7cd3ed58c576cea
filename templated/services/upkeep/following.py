"""Sizes of warm pools, from what functions are about to need of them."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable

from templated.model.function import Version, named
from templated.services.functions.crews import Crews
from templated.services.pools.members import Pools
from templated.services.upkeep.scaling import Scaling

log = logging.getLogger(__name__)
INTERVAL = 10.0
"""Seconds between two looks."""
MOST = 16
"""Members of one pool."""
# Starts that are remembered of each template, in number and in seconds.
_STARTS, _LATELY = 256, 600.0
# A pool that is too large shrinks by one each so many seconds.
_STEP = 60.0


class Following:
    """Has the warm pools of templates follow their functions. `run` goes on until cancelled."""

    def __init__(
        self,
        scaling: Scaling,
        crews: Crews,
        pools: Pools,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._scaling, self._crews, self._pools, self._clock = scaling, crews, pools, clock
        self._starts: defaultdict[str, deque[float]] = defaultdict(lambda: deque(maxlen=_STARTS))
        self._sizes: dict[str, tuple[int, float]] = {}
        """What each pool has, and since when."""

    async def run(self) -> None:
        """Look now and then, until cancelled. Raises nothing."""
        while True:
            try:
                self.look()
            except Exception:  # requests are served without pools
                log.exception("cannot have the pools follow functions")
            await asyncio.sleep(INTERVAL)

    def started(self, version: Version, seconds: float) -> None:
        """An instance came up (`Crews.on_started`)."""
        self._starts[version.settings.template].append(self._clock())

    def look(self) -> None:
        """Set the sizes anew: up at once, down by one at a time, and to nothing when the last
        function of a template is gone."""
        needs, now = self._needs(), self._clock()
        for template in {*needs, *self._sizes}:
            size, since = self._sizes.pop(template, (0, now))
            need = needs.get(template, 0)
            if need >= size:
                size, since = need, now
            elif not need:
                size = 0
            elif now - since >= _STEP:
                size, since = size - 1, now
            if size:
                self._sizes[template] = size, since
            self._pools.follow(template, size)

    def _needs(self) -> dict[str, int]:
        """For each template with functions: one, and the starts to expect while it is made."""
        expected: defaultdict[str, float] = defaultdict(float)
        for version in self._scaling.versions():
            supply = self._crews.supply(version)
            forecast, _ = self._scaling.scaler.forecast(named(version))
            lacking = max(0.0, forecast - supply.up - supply.starting)
            # The forecast is for a minute.
            part = min(1.0, self._pools.refill_time(version.settings.template) / 60)
            expected[version.settings.template] += lacking * part
        return {
            template: min(MOST, 1 + max(math.ceil(count - 0.05), self._seen(template)))
            for template, count in expected.items()
        }

    def _seen(self, template: str) -> int:
        """The most starts within the time of a refill, of late."""
        span, now = self._pools.refill_time(template), self._clock()
        return most_within([at for at in self._starts[template] if now - at <= _LATELY], span)


def most_within(times: Iterable[float], span: float) -> int:
    """How many of these, in order, lie within a span at most."""
    window: deque[float] = deque()
    most = 0
    for at in times:
        window.append(at)
        while at - window[0] > span:
            window.popleft()
        most = max(most, len(window))
    return most
