"""Demand in bounded memory, and the clock below it."""

from __future__ import annotations

import json
import math

import pytest

from templated.scaling.clock import SteadyClock
from templated.scaling.demand import Demand
from templated.scaling.ring import Ring


def size(demand: Demand) -> int:
    return len(json.dumps(demand.saved()))


def test_the_integral_is_by_seconds() -> None:
    demand = Demand()
    demand.change(10.5, 4)
    demand.change(12.25, 1)
    demand.settle(13.0)
    assert [demand.seconds.total(s, s) for s in (10, 11, 12, 13)] == [2.0, 4.0, 1.75, 0.0]


def test_means_over_windows() -> None:
    demand = Demand()
    demand.change(0.0, 10)
    demand.change(30.0, 0)
    demand.settle(60.0)
    assert demand.mean(60.0, 60) == pytest.approx(290 / 59)  # the second 0 has left the window
    assert demand.mean(60.0, 6) == 0.0


def test_minutes_and_hours_keep_load_peaks_arrivals_and_waiting() -> None:
    demand = Demand()
    demand.change(3600.0, 2, waiting=1)
    demand.change(3690.0, 5)
    demand.change(3700.0, 0)
    demand.flush()
    minute = 60
    assert demand.minutes.load.total(minute, minute + 1) == 2 * 90 + 5 * 10
    assert demand.minutes.waiting.total(minute, minute + 1) == 90
    assert [demand.minutes.peak.total(m, m) for m in (minute, minute + 1)] == [2, 5]
    assert demand.minutes.arrivals.total(minute, minute + 1) == 5
    assert demand.hours.load.total(1, 1) == 230
    assert demand.hours.peak.total(1, 1) == 5


def test_memory_is_bounded() -> None:
    demand = Demand()
    sizes = []
    for week in range(1, 4):
        for hour in range(24 * 7):
            for minute in range(0, 60, 7):
                at = ((week * 168 + hour) * 60 + minute) * 60.0
                demand.change(at, 3)
                demand.change(at + 7, 0)
        sizes.append(size(demand))
    assert sizes[2] < 1.05 * sizes[1] < 60_000


@pytest.mark.parametrize("leap", [1e4, 1e7, 1e12])
def test_a_leap_costs_no_time_and_leaves_only_the_last_slots(leap: float) -> None:
    demand = Demand()
    demand.change(5.0, 2)
    demand.settle(leap)
    demand.flush()
    assert demand.mean(leap, 60) == pytest.approx(2.0, rel=0.02)
    assert demand.minutes.peak.total(0, 0) == 0 or leap < 1e5


def test_how_long_it_has_been_busy() -> None:
    demand = Demand()
    demand.change(0.0, 1)
    demand.settle(60.0)
    assert 50 < demand.busy < 60
    demand.settle(7200.0)
    assert demand.busy == pytest.approx(600, rel=0.01)
    demand.change(7200.0, 0)
    demand.settle(14400.0)
    assert demand.busy < 0.01


def test_start_times() -> None:
    demand = Demand()
    assert demand.start_time == 0
    demand.starts.extend([0.1, 0.2, 9.0])
    assert demand.start_time == 0.2


def test_saved_and_loaded() -> None:
    demand = Demand()
    for at in range(0, 20_000, 37):
        demand.change(at, at % 4, at % 2)
    demand.starts.append(0.25)
    demand.change(20_000.0, 0)
    again = Demand()
    again.load(json.loads(json.dumps(demand.saved())))
    assert again.saved() == demand.saved()
    assert again.hours.load.total(0, 5) == demand.hours.load.total(0, 5) > 0


def test_a_ring_forgets_what_is_older() -> None:
    ring = Ring(4)
    for slot in range(10):
        ring.add(slot, 1.0)
    ring.add(2, 5.0)
    ring.raise_to(3, 5.0)
    assert ring.total(0, 100) == 4
    assert ring.row(10) == [1.0, 1.0, 1.0, 0.0]
    ring.add(1000, 1.0)
    assert ring.total(0, 1000) == 1


def test_the_clock_goes_forward_only() -> None:
    clock = SteadyClock()
    shown = [clock.read(now) for now in (100.0, 110.0, 105.0, 111.0, -5000.0, -4990.0)]
    assert shown == [100.0, 110.0, 110.0, 111.0, 111.0, 121.0]


def test_a_leap_ahead_is_at_most_a_day_and_keeps_the_time_of_the_day() -> None:
    clock = SteadyClock()
    clock.read(0.0)
    assert clock.read(1000 * 86400 + 3600.0) == 3600.0
    assert clock.read(1000 * 86400 + 3601.0) == 3601.0


@pytest.mark.parametrize("now", [math.nan, math.inf, -math.inf])
def test_no_time(now: float) -> None:
    with pytest.raises(ValueError, match="is no time"):
        SteadyClock().read(now)


def test_the_clock_goes_on_after_a_restart() -> None:
    clock = SteadyClock()
    clock.read(1e6)
    clock.read(1000.0)  # set back: shows a million still
    again = SteadyClock()
    again.load(clock.saved())
    assert again.read(1060.0) == 1e6 + 60
