"""Forecasts of what the next minute needs."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any, ClassVar

import pytest

from templated.scaling.forecast import Levels
from templated.scaling.forecast.base import Forecast, Forecaster, Past
from templated.scaling.forecast.histogram import Histogram, Usual
from templated.scaling.forecast.levels import following
from templated.scaling.forecast.period import Period
from templated.scaling.forecast.trend import Trend

Curve = Callable[[int], int]


def learned(curve: Curve, minutes: int) -> Levels:
    levels = Levels()
    for minute in range(minutes):
        levels.close(curve(minute))
    return levels


def chance(levels: Levels, count: int = 1) -> float:
    return next((chance for upto, chance in levels.chances() if upto >= count), 0.0)


@pytest.mark.parametrize("period", [1, 2, 5, 7, 15, 60])
def test_timers(period: int) -> None:
    """Nearly sure of the right minute, and of no other."""
    levels = learned(lambda minute: int(minute % period == 0), 12 * period)
    for minute in range(12 * period, 14 * period):
        if minute % period == 0:
            assert chance(levels) > 0.8
        else:
            assert chance(levels) < 0.1
        levels.close(int(minute % period == 0))


def test_a_timer_among_other_requests() -> None:
    """Each quarter of an hour, and at any other minute with a chance of one in ten."""
    draw = random.Random(3)  # noqa: S311 - it only has to repeat
    levels = Levels()
    right: list[float] = []
    wrong: list[float] = []
    for minute in range(3000):
        if minute >= 1500:
            (right if minute % 15 == 0 else wrong).append(chance(levels))
        levels.close(int(minute % 15 == 0 or draw.random() < 0.1))
    assert sum(right) / len(right) > 2 * sum(wrong) / len(wrong)


def test_once_a_day() -> None:
    levels = learned(lambda minute: int(minute % 1440 in (600, 601, 602)), 4 * 1440 + 599)
    before = chance(levels)
    levels.close(0)
    assert chance(levels) > 0.1 > 20 * before


def test_what_is_busy_is_needed() -> None:
    levels = learned(lambda minute: 4 + minute % 2, 60)
    assert chance(levels, 4) > 0.95
    assert chance(levels, 5) < 0.1
    levels.close(4)
    assert chance(levels, 5) > 0.9


def test_trend_follows_growth() -> None:
    trend = Trend()
    for minute in range(120):
        trend.close(minute // 4)
    assert trend.chance(29) > 0.7
    assert trend.chance(60) < 0.05


def test_chances_never_rise_with_the_level() -> None:
    draw = random.Random(1)  # noqa: S311 - it only has to repeat
    levels = learned(lambda _: draw.randrange(30), 500)
    chances = [found for _, found in levels.chances()]
    assert chances == sorted(chances, reverse=True)
    assert [upto for upto, _ in levels.chances()][-1] == levels.highest


def test_reasons() -> None:
    levels = learned(lambda minute: int(minute % 5 == 0), 61 + 5)
    assert levels.why(1)[1] == "histogram: returns in 4 min"
    assert Usual().why(Past()) == "used 1 min ago"
    period, past = Period(), Past()
    for minute in range(1, 40):
        period.learn(past, minute % 5 == 0)
        past.close(minute % 5 == 0)
    assert period.why(past) == "period of 5 min"


def test_levels_of_many_instances_are_few() -> None:
    levels = learned(lambda _: 100_000, 2)
    assert len(levels.levels) < 80
    assert following(7) == 8
    assert following(64) == 72


def test_memory_is_bounded() -> None:
    """Random demand: each memory of a forecaster fills, and then stays as it is."""
    draw = random.Random(5)  # noqa: S311 - it only has to repeat
    levels = Levels()
    sizes = []
    for day in range(8):
        for _ in range(1440):
            levels.close(int(draw.random() < 0.03))
        if day % 3 == 1:
            sizes.append(len(json.dumps(levels.saved())))
    assert sizes[-1] < 1.1 * sizes[0] + 2000
    assert max(sizes) < 30_000


def test_a_hole_teaches_nothing() -> None:
    levels = learned(lambda minute: int(minute % 5 == 0), 101)
    levels.skip(1000)
    assert chance(levels) < 0.1
    for minute in range(60):
        levels.close(int(minute % 5 == 0))
    levels.close(1)
    for _ in range(4):
        levels.close(0)
    assert chance(levels) > 0.8


def test_histogram_fades() -> None:
    histogram, past = Histogram(), Past()
    for turn in range(6000):
        gap = 3 if turn < 100 else 7
        for minute in range(1, gap + 1):
            histogram.learn(past, minute == gap)
            past.close(minute == gap)
    assert histogram.saved()["counts"].keys() == {"3", "7"}
    assert sum(histogram.saved()["counts"].values()) <= 4096


class Broken(Usual):
    """Fails in one of its methods."""

    name: ClassVar[str] = "broken"

    def __init__(self, where: str) -> None:
        self.where = where

    def forecast(self, past: Past) -> Forecast:
        if self.where == "forecast" and past.gap == 3:
            raise RuntimeError("no idea")
        return Forecast(float("nan") if self.where == "nan" else 0.5, 0.5)

    def learn(self, past: Past, needed: bool) -> None:
        if self.where == "learn":
            raise ZeroDivisionError("learnt nothing")

    def skip(self, past: Past, minutes: int) -> None:
        if self.where == "skip":
            raise KeyError(minutes)


@pytest.mark.parametrize(
    ("where", "error"),
    [
        ("forecast", "RuntimeError: no idea"),
        ("learn", "ZeroDivisionError: learnt nothing"),
        ("skip", "KeyError: 1"),
        ("nan", "ValueError: Forecast(chance=nan, sure=0.5) are no chances"),
    ],
)
def test_a_forecaster_that_fails_is_left_out_and_reported_once(where: str, error: str) -> None:
    def makers(_level: int, _trend: Trend) -> list[Forecaster]:
        return [Histogram(), Broken(where)]

    levels = Levels(makers)
    failures: list[tuple[str, str]] = []
    for minute in range(20):
        levels.close(int(minute % 5 == 0))
        levels.skip(1)
        failures += levels.failed()
        assert 0 <= chance(levels) <= 1
    assert failures == [("broken", error)]


def test_all_fail() -> None:
    levels = Levels(lambda _level, _trend: [Broken("learn")])
    levels.close(1)
    levels.close(0)
    assert chance(levels) == pytest.approx(1 / 3.5)
    assert levels.why(1) == ("usual", "used 2 min ago")


def test_a_slow_forecaster_is_left_out() -> None:
    now = [0.0]

    class Slow(Usual):
        name: ClassVar[str] = "slow"

        def forecast(self, past: Past) -> Forecast:
            now[0] += 0.2
            return super().forecast(past)

    levels = Levels(lambda _level, _trend: [Usual(), Slow()])
    levels.close(1, lambda: now[0])
    levels.close(0, lambda: now[0])
    assert levels.failed() == [("slow", "TimeoutError: took 0.200 s")]
    spent = now[0]
    levels.close(0, lambda: now[0])
    assert now[0] == spent


def test_a_stall_of_the_host_is_no_forecasters_fault() -> None:
    times = iter([0.0, 9.0, *[9.0] * 100])
    levels = Levels()
    levels.close(1)
    levels.close(0, lambda: next(times))
    assert levels.failed() == []


def test_saved_and_loaded() -> None:
    draw = random.Random(7)  # noqa: S311 - it only has to repeat
    needs = [draw.choice((0, 0, 0, 1, 2)) for _ in range(400)]
    levels = learned(needs.__getitem__, 400)
    again = Levels()
    data: dict[str, Any] = json.loads(json.dumps(levels.saved()))
    again.load(data)
    assert again.saved() == levels.saved()
    for minute in range(50):
        assert [chance(again, n) for n in (1, 2)] == [chance(levels, n) for n in (1, 2)]
        assert again.why(1) == levels.why(1)
        for each in (again, levels):
            each.close(needs[minute])
