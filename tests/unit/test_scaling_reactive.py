"""Scaling by the demand of the last seconds: up at once, down in steps, and no flapping."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest

from templated.scaling import Bounds, Policy, Scaler
from templated.scaling.demand import Demand
from templated.scaling.reactive import Reactive

Curve = Callable[[int], int]


def desired(curve: Curve, seconds: int, policy: Policy | None = None) -> list[tuple[int, str]]:
    """What is wanted after each second of demand."""
    demand, reactive = Demand(), Reactive(policy or Policy())
    found = []
    for second in range(seconds):
        demand.change(float(second), curve(second))
        demand.settle(second + 0.99)
        wanted = reactive.round(demand, second + 0.99)
        found.append((wanted.instances, wanted.reason))
    return found


def kept(curve: Curve, seconds: int) -> list[int]:
    """What the scaler keeps after each second of demand."""
    scaler = Scaler()
    scaler.add("f", Bounds(mib=128))
    found = []
    for second in range(seconds):
        scaler.under_way("f", float(second), curve(second))
        scaler.round(second + 0.99)
        found.append(scaler.decision("f").keep)
    return found


def rises(counts: list[int]) -> int:
    """How often a number rose."""
    return sum(after > before for before, after in itertools.pairwise(counts))


def test_a_step_is_wanted_at_once() -> None:
    wanted = desired(lambda second: 20 if second >= 5 else 0, 70)
    assert wanted[4][0] == 0
    assert wanted[5][0] == 20
    assert wanted[69] == (24, "reactive")  # with the buffer


def test_the_buffer_is_a_share_with_a_floor() -> None:
    assert desired(lambda _: 10, 100)[-1][0] == 12
    assert desired(lambda _: 1, 100)[-1][0] == 1
    policy = Policy(buffer_share=0.0, buffer_floor=3)
    assert desired(lambda _: 1, 100, policy)[-1][0] == 4


def test_the_reserve_is_ahead_of_what_grows() -> None:
    """One more each ten seconds: from some on there is one for it before it comes."""
    wanted = [count for count, _ in desired(lambda second: second // 10, 200)]
    assert all(wanted[second] > second // 10 for second in range(39, 200, 10))


def test_panic_holds_for_a_window_after_demand_doubled() -> None:
    def curve(second: int) -> int:
        return 40 if 100 <= second < 106 else 4 if second < 106 else 0

    # Many short requests at once: what is under way when asked says little, the mean says it.
    wanted = desired(curve, 500)
    most = max(count for count, _ in wanted)
    assert most >= 40
    after = wanted[106:160]
    assert all(count == most for count, _ in after)
    assert wanted[110][1] == "panic"
    assert wanted[499][0] == 0


def test_surplus_goes_in_steps() -> None:
    wanted = [count for count, _ in desired(lambda second: 32 if second < 600 else 0, 2000)]
    steps = [(b, a) for b, a in itertools.pairwise(wanted[600:]) if a < b]
    assert wanted[-1] == 0
    assert len(steps) >= 5
    assert all(before - after <= max(1, before // 2 + 1) for before, after in steps)


def test_scale_in_is_slower_after_long_work() -> None:
    def held(busy: int) -> int:
        wanted = [c for c, _ in desired(lambda s: 16 if s < busy else 0, busy + 2000)]
        return wanted[busy:].index(0)

    assert held(60) < held(300) < held(1800)


@pytest.mark.parametrize("period", [2, 6, 12, 30, 60, 90, 120])
def test_what_goes_up_and_down_does_not_flap(period: int) -> None:
    """Also at the windows' own periods. What the first swing brought too much may go, once."""
    counts = kept(lambda second: 10 if second % period < period / 2 else 0, 1800)
    assert rises(counts[60:]) == 0
    assert min(counts) == 10
    wanted = desired(lambda second: 10 if second % period < period / 2 else 0, 1800)
    assert rises([count for count, _ in wanted[60:]]) <= 1


def test_a_wave_does_not_flap() -> None:
    counts = kept(lambda second: 10 + (second // 10) % 6, 1800)
    assert rises(counts[120:]) == 0


def test_what_was_used_once_goes_by_its_forecast_alone() -> None:
    """No cool-down: it was never busy."""
    wanted = desired(lambda second: int(second == 5), 20)
    assert [count for count, _ in wanted[5:8]] == [1, 0, 0]


def test_a_burst_is_not_ended_all_at_once() -> None:
    counts = kept(lambda second: 20 if 5 <= second < 8 else 0, 86400 // 8)
    steps = [(b, a) for b, a in itertools.pairwise(counts) if a < b]
    assert counts[-1] == 0
    assert len(steps) >= 4
    assert all(before - after <= (before + 1) // 2 for before, after in steps)
