"""The scaler as a whole: bounds, budget, jumps, restarts and what others expect."""

from __future__ import annotations

import json
import random
from typing import Any, ClassVar

import pytest

from templated.scaling import Bounds, Decision, Policy, Scaler
from templated.scaling.budget import SERVING, Claim, share
from templated.scaling.forecast.base import Forecast, Forecaster, Past
from templated.scaling.forecast.histogram import Usual
from templated.scaling.forecast.level import forecasters
from templated.scaling.forecast.trend import Trend

MIB = 128.0


def scaler(*keys: str, policy: Policy | None = None, **bounds: Any) -> Scaler:
    made = Scaler(policy)
    for key in keys or ("f",):
        made.add(key, Bounds(**{"mib": MIB, **bounds}))
    return made


def use(made: Scaler, key: str, now: float, requests: int = 1, seconds: float = 1.0) -> None:
    made.under_way(key, now, requests)
    made.under_way(key, now + seconds, 0)


def minutes(made: Scaler, needs: list[int], start: float = 0.0, key: str = "f") -> list[Decision]:
    """The decision for each minute, with what that minute then needs."""
    found = []
    for minute, need in enumerate(needs):
        now = start + minute * 60.0
        made.round(now)
        found.append(made.decision(key))
        if need:
            use(made, key, now + 30, need)
    return found


def test_nothing_is_kept_of_what_never_ran() -> None:
    made = scaler()
    assert made.round(0.0).decisions == []
    assert made.decision("f") == Decision("f", 0, 0, "idle", "idle", 0.0)


def test_a_step_of_twenty_is_desired_in_the_next_round() -> None:
    made = scaler()
    made.round(0.0)
    made.under_way("f", 0.5, 20, waiting=20)
    (decision,) = made.round(1.0).decisions
    assert (decision.desired, decision.keep, decision.kind) == (20, 20, "panic")


def test_only_changes_are_told() -> None:
    made = scaler()
    made.under_way("f", 0.0, 3)
    told = [made.round(float(second)).decisions for second in range(1, 29)]
    assert len(told[0]) == 1
    assert sum(map(len, told[3:])) <= 2


def test_a_timer_goes_between_and_is_back_before_its_time() -> None:
    needs = [int(minute % 10 == 0) for minute in range(200)]
    late = minutes(scaler(), needs)[150:]
    assert [d.keep for d in late[:11]] == [1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]
    assert {d.kind for d in late if d.keep} <= {"histogram", "lately", "rhythm", "period"}
    assert {d.reason for d in late if not d.keep} == {"idle"}


def test_a_timer_off_the_minute_by_some_seconds() -> None:
    """Its minutes begin where its first request puts them, half a minute before."""
    made, draw = scaler(), random.Random(2)  # noqa: S311 - it only has to repeat
    cold = 0
    for second in range(6 * 3600):
        made.round(float(second))
        if second % 300 == 17:
            at = second + draw.uniform(-12, 12)
            cold += made.decision("f").keep < 1 and second > 1800
            use(made, "f", max(second + 0.0, at), seconds=0.3)
    assert cold == 0


def test_bounds() -> None:
    made = scaler(least=2, most=3)
    made.round(0.0)
    assert (made.decision("f").keep, made.decision("f").reason) == (2, "min")
    made.under_way("f", 1.0, 5)
    made.round(2.0)
    assert (made.decision("f").keep, made.decision("f").reason) == (3, "max")
    made.add("f", Bounds(mib=MIB))
    made.round(3.0)
    assert made.decision("f").keep == 5


@pytest.mark.parametrize(
    ("bounds", "error"),
    [
        ({"mib": 0}, "an instance of 0 MiB"),
        ({"mib": -1.5}, "an instance of -1.5 MiB"),
        ({"mib": float("nan")}, "an instance of nan MiB"),
        ({"mib": 1, "least": -1}, "at least -1 and at most None instances"),
        ({"mib": 1, "least": 3, "most": 2}, "at least 3 and at most 2 instances"),
    ],
)
def test_bounds_that_cannot_be(bounds: dict[str, Any], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        Bounds(**bounds)


@pytest.mark.parametrize(
    "settings",
    [{"panic": 1}, {"panic": 30, "stable": 20}, {"stable": 61}, {"price": -1.0}, {"memory": -1}],
)
def test_policies_that_cannot_be(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"windows|below 0"):
        Policy(**settings)


def test_requests_below_none() -> None:
    with pytest.raises(ValueError, match="-1 requests under way"):
        scaler().under_way("f", 0.0, -1)


def test_the_budget_keeps_what_avoids_most_cold_starts() -> None:
    """Two that are needed each minute, one that was needed once; room for two."""
    made = scaler("often", "once", "also", policy=Policy(memory=2 * MIB))
    for minute in range(30):
        made.round(minute * 60.0)
        use(made, "often", minute * 60 + 30.0)
        use(made, "also", minute * 60 + 32.0)
        if minute == 25:
            use(made, "once", minute * 60 + 34.0)
    found = made.round(30 * 60.0)
    assert [made.decision(key).keep for key in ("often", "once", "also")] == [1, 0, 1]
    assert made.decision("once").reason == "budget"
    assert found.short > 0


def test_the_budget_counts_by_memory() -> None:
    """As likely each, but one large as two small ones."""
    made = scaler("small", "other", policy=Policy(memory=2 * MIB))
    made.add("large", Bounds(mib=2 * MIB))
    for at, key in enumerate(("large", "small", "other")):
        use(made, key, float(at), seconds=0.1)
    made.round(60.0)
    assert [made.decision(key).keep for key in ("small", "other", "large")] == [1, 1, 0]


def test_a_budget_below_one_instance() -> None:
    made = scaler(policy=Policy(memory=MIB / 2), least=1)
    made.round(0.0)
    assert (made.decision("f").keep, made.decision("f").reason) == (0, "budget")
    made.under_way("f", 1.0, 2)
    made.round(1.5)
    assert made.decision("f").keep == 2, "what serves is not up for choice"
    made.under_way("f", 2.0, 0)
    made.round(2.5)
    assert made.decision("f").keep == 0


def test_memory_that_is_there_again_is_used() -> None:
    made = scaler("a", "b", policy=Policy(memory=3 * MIB))
    made.under_way("a", 0.0, 3)
    use(made, "b", 0.5, seconds=0.1)
    made.round(1.0)
    assert made.decision("b").keep == 0
    made.remove("a")
    made.round(2.0)
    assert made.decision("b").keep == 1


def test_shares_have_no_holes_and_repeat() -> None:
    claims = [
        Claim(SERVING, "a", 1, 1, 10),
        Claim(-5.0, "a", 2, 4, 10),
        Claim(-4.0, "a", 6, 1, 1),
        Claim(-5.0, "b", 1, 1, 10),
    ]
    assert share(claims, 35) == ({"a": 3, "b": 0}, 5.0)
    assert share(reversed(claims), 35) == ({"a": 3, "b": 0}, 5.0)


def test_pressure_stops_growth_but_for_requests() -> None:
    made = scaler("f", "g", least=1)
    made.round(0.0, growth=False)
    assert (made.decision("f").keep, made.decision("f").reason) == (0, "pressure")
    made.under_way("f", 1.0, 4)
    made.round(2.0, growth=False)
    assert made.decision("f").keep == 4
    made.round(3.0)
    assert made.decision("g").keep == 1


def test_what_somebody_expects() -> None:
    made = scaler("b")
    made.expect("b", 0.0, 1, 5.0, "a calls it")
    made.expect("b", 0.1, 1, 5.0, "a calls it")
    (decision,) = made.round(1.0).decisions
    assert (decision.keep, decision.kind, decision.reason) == (2, "expected", "a calls it")
    assert made.round(4.9).decisions == []
    made.round(5.0)
    assert made.decision("b").keep == 0


def test_what_is_expected_comes_beside_what_is_under_way() -> None:
    made = scaler("b")
    made.under_way("b", 0.0, 3)
    made.expect("b", 0.1, 2, 5.0, "a calls it")
    made.round(1.0)
    assert made.decision("b").keep == 5


def test_what_is_hardly_expected_is_not_worth_it() -> None:
    made = scaler("b")
    made.expect("b", 0.0, 1, 5.0, "a calls it", chance=0.001)
    made.round(1.0)
    assert made.decision("b").keep == 0


def test_a_timer_where_minutes_meet() -> None:
    """They move, so that it comes in the middle of one."""
    made = scaler()
    use(made, "f", 30.0)
    ready = []
    for second in range(60, 4 * 3600):
        made.round(float(second))
        if second % 300 == 60:  # where the first request has put an end of its minutes
            ready.append(made.decision("f").keep)
            use(made, "f", second + (0.1 if second % 600 else -0.1) + 1, seconds=0.2)
    assert all(ready[20:])


@pytest.mark.parametrize("leap", [-1e9, -3600.0, -30.0, 3600.0, 1e9])
def test_a_clock_that_jumps(leap: float) -> None:
    """The timer is still known an hour later."""
    made = scaler()
    needs = [int(minute % 5 == 0) for minute in range(300)]
    minutes(made, needs)
    start = max(0.0, 300 * 60.0 + leap) if leap < 0 else 300 * 60.0 + leap
    ready = []
    for minute, need in enumerate(needs[:120]):
        now = start + minute * 60
        made.round(now + 29)
        ready.append(made.decision("f").keep)
        if need:
            use(made, "f", now + 30)
    assert all(keep >= need for keep, need in zip(ready[100:], needs[100:120], strict=True))
    assert sum(ready[100:]) <= 2 * sum(needs[100:120])


def test_saved_and_loaded() -> None:
    needs = [int(minute % 7 == 0) for minute in range(240)]
    made = scaler("f", "gone")
    use(made, "gone", -30.0)
    minutes(made, needs)
    data = json.loads(json.dumps(made.saved()))
    again = scaler("f", "new")
    again.load(data)
    assert "gone" not in again
    later = [int((minute + 240) % 7 == 0) for minute in range(40)]
    ours = [d.keep for d in minutes(again, later, start=240 * 60.0)]
    assert ours == [d.keep for d in minutes(made, later, start=240 * 60.0)]
    assert sum(ours) >= sum(later)
    assert again.demand("f").hours.arrivals.total(0, 10) == sum(needs) + sum(later)


def test_saved_in_parts() -> None:
    made = scaler("a", "b")
    use(made, "a", 0.0)
    use(made, "b", 2.0)
    made.round(120.0)
    again = scaler("a", "b")
    for key in ("a", "b"):
        again.load(json.loads(json.dumps(made.saved([key]))))
    assert again.saved() == made.saved()
    again.round(121.0)
    assert [again.decision(key) for key in "ab"] == [made.decision(key) for key in "ab"]


def test_half_of_a_version_is_not_loaded() -> None:
    made = scaler("a", "b")
    use(made, "a", 0.0)
    use(made, "b", 0.0)
    made.round(120.0)
    data = made.saved()
    del data["functions"]["b"]["levels"]["levels"][0]["bits"]
    again = scaler("a", "b")
    with pytest.raises(ValueError, match="no saved scaling: KeyError"):
        again.load(data)
    again.round(121.0)
    assert [again.decision(key).keep for key in "ab"] == [1, 0]


@pytest.mark.parametrize("data", [{}, {"format": 2}, [], None, {"format": 1, "clock": {}}])
def test_what_was_not_saved_is_not_loaded(data: Any) -> None:
    with pytest.raises(ValueError, match=r"format|saved"):
        scaler().load(data)


def test_removed_while_it_is_scaled() -> None:
    made = scaler("f", "g")
    made.under_way("f", 0.0, 5)
    made.round(1.0)
    made.remove("f")
    assert [d.key for d in made.round(200.0).decisions] == []
    with pytest.raises(KeyError):
        made.under_way("f", 201.0, 1)
    made.add("f", Bounds(mib=MIB))
    use(made, "f", 202.0)
    made.round(300.0)
    assert made.decision("f").keep == 1


def test_forecasters_that_raise_are_reported_and_left_out() -> None:
    class Broken(Usual):
        name: ClassVar[str] = "broken"

        def forecast(self, past: Past) -> Forecast:
            raise RuntimeError("no idea")

    def makers(level: int, trend: Trend) -> list[Forecaster]:
        return [*forecasters(level, trend), Broken()]

    made = Scaler(makers=makers)
    made.add("f", Bounds(mib=MIB))
    use(made, "f", 30.0)
    failures = [f for second in range(60, 600, 60) for f in made.round(float(second)).failures]
    assert failures == [("f", "broken", "RuntimeError: no idea")]
    assert made.decision("f").keep == 1


def test_a_thousand_functions_invoked_once() -> None:
    """All are kept for a while, and none for ever; an idle one is looked at once a minute."""
    keys = [str(number) for number in range(1000)]
    made = scaler(*keys, policy=Policy(price=0.8, memory=300 * MIB))
    for number, key in enumerate(keys):
        use(made, key, number * 0.01, seconds=0.001)
    made.round(61.0)
    assert sum(made.decision(key).keep for key in keys) == 300
    for minute in range(2, 15):
        made.round(minute * 60.0 + 1)
    assert not any(made.decision(key).keep for key in keys)
    assert made.round(14 * 60.0 + 2).decisions == []
    assert not made._lively


def test_time_only_has_to_be_a_number() -> None:
    with pytest.raises(ValueError, match="is no time"):
        scaler().round(float("nan"))


def test_foreseen_in_place_of_what_was() -> None:
    scaler = Scaler()
    scaler.add("g", Bounds(mib=30))
    for _ in range(3):
        scaler.foresee("g", 0.0, 2, 9, "f calls it")
        scaler.round(0.0)
    assert scaler.decision("g")[1:5] == (0, 2, "expected", "f calls it")
    scaler.foresee("g", 0.0, 0, 0.0, "")
    scaler.round(1)
    assert scaler.decision("g").keep == 0
