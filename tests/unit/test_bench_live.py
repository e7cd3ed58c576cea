"""`bench scaling --live`: the requests that it sends, and what the simulation says of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from templated.bench.scaling.requests import Request, part, requests
from templated.bench.scaling.simulate import World
from templated.bench.scaling.trace import Row, Trace, read
from templated.cli.main import main
from templated.errors import InvalidRequest
from templated.scaling import Policy

TRACE = Path(__file__).parents[1] / "data" / "azure2019-60apps.csv"


def trace(*needs: tuple[int, ...]) -> Trace:
    return Trace("t.csv", tuple(Row(f"f{n}", 128.0, row) for n, row in enumerate(needs)))


def cold(found: list[Request], functions: int = 1, start: float = 0.2) -> list[int]:
    world = World(functions, Policy(), mib=30.0, start=start, starts=2)
    world.run(found)
    return [crew.cold for crew in world.crews]


def test_what_a_minute_needs_comes_at_once() -> None:
    found = requests(part(trace((1, 0, 2), (0, 1, 0)), 0, 3), speed=6)
    assert [request.function for request in found] == [0, 1, 0, 0]
    first, _, *last = found
    assert last[0] == last[1]
    assert last[0].at == pytest.approx(first.at + 20), "at six times the speed a minute has 10 s"
    assert 0 <= first.at <= 6 and first.seconds == 2.5


@pytest.mark.parametrize(
    ("begin", "minutes", "said"),
    [(2, 2, "t.csv has 3 minutes: 2 from minute 2 go beyond"), (1, 1, "nothing is asked of 1")],
)
def test_a_part_that_is_not_there(begin: int, minutes: int, said: str) -> None:
    with pytest.raises(InvalidRequest, match=said):
        part(trace((1, 0, 1)), begin, minutes)


def test_an_instance_that_rests_serves_the_next() -> None:
    assert cold([Request(at, 0, 1.0) for at in (0.0, 5.0, 10.0)]) == [1]


def test_who_waits_for_an_instance_has_begun_one() -> None:
    """The second request comes while the first one's instance starts."""
    assert cold([Request(0.0, 0, 9.0), Request(0.1, 0, 9.0), Request(5.0, 0, 1.0)]) == [3]


def test_who_waits_is_served_by_one_that_comes_free() -> None:
    """Two starts at once. The next two are begun when these are up, which then serve all others."""
    assert cold([Request(0.0, 0, 0.1)] * 9, start=1.0) == [4]


def test_a_growing_load_is_met_ahead() -> None:
    """One more each ten seconds: the buffer is there before they are."""
    found = [Request(10.0 * n, 0, 300.0) for n in range(20)]
    assert cold(found)[0] < 10


def test_each_function_has_its_own() -> None:
    found = requests(part(trace((1, 1, 1), (2, 2, 2)), 0, 3), speed=1)
    assert cold(found, functions=2) == [1, 2]


def test_a_day_in_ten_minutes() -> None:
    whole = read(TRACE, first=10)
    found = requests(part(whole, 0, whole.minutes), speed=144)
    counts = cold(found, functions=10)
    assert len(found) == whole.needed
    assert all(1 <= count <= 8 for count in counts) and sum(counts) < 40


def test_live_needs_more(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "scaling", "--live", "6", "--trace", str(TRACE)]) == 2
    assert "--live needs a --trace and a --gateway" in capsys.readouterr().err
