"""The number of instances by the demand of the last seconds, as Knative's autoscaler has it."""

from __future__ import annotations

import math
from typing import NamedTuple

from templated.scaling.demand import BUSY, Demand
from templated.scaling.policy import Policy

# Demand is no longer followed by its average when the short one is so many times what there is.
_DOUBLE = 2
# A function that was busy for less lets go of its only instance at once: when it is needed next is
# the forecast's business.
_BRIEF = 120.0
# Several are surplus after so many windows at least: who swings within them keeps all.
_CALM = 2
# Surplus goes in halves, and seconds lie between them: a part of the cool-down.
_PACE = 6


class Desired(NamedTuple):
    """Instances that demand wants now."""

    instances: int
    reason: str


class Reactive:
    """Follows the demand of one function up at once, and down slowly.

    Up: the mean over the stable window, or over the short one where that is more, and the buffer.
    Down: surplus goes after a cool-down, half of what is left at a time. The longer the function
    has been busy, the longer are the cool-down and the time between steps.
    """

    __slots__ = ("_calm_since", "_panic_until", "_policy", "_step_at", "held")

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self.held = 0
        """What it wanted last."""
        self._panic_until = -math.inf
        self._calm_since: float | None = None
        self._step_at = 0.0

    def round(self, demand: Demand, now: float) -> Desired:
        """What it wants now. `demand` must have been settled for `now`."""
        wanted = self._wanted(demand, now)
        if wanted >= self.held:
            self.held, self._calm_since = wanted, None
            return Desired(wanted, "panic" if now < self._panic_until else "reactive")
        if now < self._panic_until:
            return Desired(self.held, "panic")
        return self._scale_in(demand, now, wanted)

    def _wanted(self, demand: Demand, now: float) -> int:
        policy = self._policy
        mean = demand.mean(now, policy.stable)
        short = demand.mean(now, policy.panic)
        sudden = math.ceil(short - 1e-9)
        if sudden >= _DOUBLE * max(1, self.held):
            self._panic_until = now + policy.stable
        # What grows steadily is ahead of a long mean: the reserve is beside what there is now.
        mean = max(mean, sudden if now < self._panic_until else short)
        if not mean:
            return demand.level
        # A mean of a half or less is somebody who comes now and then: the forecast knows better.
        buffer = max(policy.buffer_floor, math.floor(policy.buffer_share * mean + 0.5))
        return max(demand.level, math.ceil(mean - 0.5) + buffer)

    def _scale_in(self, demand: Demand, now: float, wanted: int) -> Desired:
        cool_down = self._cool_down(demand)
        if self._calm_since is None:
            self._calm_since = now
            self._step_at = now + cool_down
        while now >= self._step_at and self.held > wanted:
            self.held -= max(1, (self.held - wanted) // 2)
            self._step_at += max(1.0, cool_down / _PACE)
        return Desired(self.held, "cool-down" if self.held > wanted else "reactive")

    def _cool_down(self, demand: Demand) -> float:
        longer = self._policy.cool_down * demand.busy / BUSY if demand.busy >= _BRIEF else 0.0
        return longer + (_CALM * self._policy.stable if self.held > 1 else 0.0)

    @property
    def calm(self) -> bool:
        """It wants nothing, and need not be asked again before there is demand."""
        return not self.held
